"""How long a step takes: a roofline of products, memory traffic and messages.

Predictions that were never checked on a GPU. Each term is what must be done over what the data
sheet allows, times an efficiency that is assumed and given as a range; the pessimistic end of the
range hides no message behind arithmetic, the optimistic one hides ZeRO-3's gathers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from models.config import ModelConfig
from models.flops import training_flops
from tools.planning.cluster import Cluster, Range
from tools.planning.request import Request
from tools.planning.states import flat_sizes

# Shares of the data sheets' figures, assumed: pessimistic, optimistic.
PRODUCTS = Range(0.30, 0.60)
MEMORY = Range(0.50, 0.85)
MESSAGES = Range(0.50, 0.85)
# Bytes/s between a GPU and its host (PCIe 4.0 ×16), and of a host's own memory, assumed.
HOST_LINK, HOST_MEMORY = 32e9, 200e9
# Each tensor that is kept is written once and read once, and its gradient too.
PASSES = 4


@dataclass(frozen=True)
class Speed:
    """Predicted seconds of one optimizer step.

    Attributes:
        products, memory, messages, host: its parts; pessimistic in `high`.
        flops: hardware FLOPs of a rank.
        message_bytes: what a rank sends in a step.
    """

    products: Range
    memory: Range
    messages: Range
    host: Range
    step: Range
    flops: float
    message_bytes: float


def speed(request: Request, cluster: Cluster) -> Speed:
    """Of one step."""
    target = request.seq_len - request.source
    sequences = request.micro_batch * request.backward_calls
    flops = sequences * _flops_of_sequence(request.model, target, request.source)
    numbers = "bf16" if request.precision == "bf16" else "fp32"
    products = _seconds(flops, cluster.device.peak(numbers), PRODUCTS)
    memory = _seconds(_traffic(request), cluster.device.bandwidth, MEMORY)
    gathers, sums = _messages(request)
    messages = _seconds(gathers + sums, cluster.bandwidth, MESSAGES)
    hidden = _seconds(gathers, cluster.bandwidth, MESSAGES).low
    shown = messages.low - min(hidden, products.low)
    host = _host(request, cluster)
    return Speed(
        products,
        memory,
        messages,
        host,
        step=Range(
            products.low + memory.low + shown + host.low,
            products.high + memory.high + messages.high + host.high,
        ),
        flops=flops,
        message_bytes=gathers + sums,
    )


@lru_cache(maxsize=8)
def _flops_of_sequence(model: ModelConfig, target: int, source: int) -> float:
    return training_flops(model, seq_len=target, source_len=source).hardware


def _seconds(amount: float, rate: float, efficiency: Range) -> Range:
    return Range(amount / rate / efficiency.high, amount / rate / efficiency.low)


def _traffic(request: Request) -> float:
    """Bytes that a step reads and writes beside products' own: activations and model states."""
    width, on_cpu = request.width, request.on_cpu
    activations = max(
        sum(segment.kept.bytes(width, on_cpu=on_cpu) for segment in run.segments)
        for run in request.rounds
    )
    activations *= _chunks(request)
    again = 1.5 if request.model.activation_checkpointing else 1.0
    held = sum(size for _, size in flat_sizes(request))
    states = 0 if request.offloads_optimizer else held * (4 * 7 + request.width)
    return activations * PASSES * again * request.backward_calls + states


def _chunks(request: Request) -> int:
    """Backward calls of a micro-batch: more than one for ENTP alone."""
    return max(run.calls for run in request.rounds)


def _messages(request: Request) -> tuple[float, float]:
    """Bytes that a rank sends in a step: to gather parameters, and to add up gradients.

    Stage 3 gathers for every forward and every backward pass and scatters the sums of each
    backward pass: three times the parameters. Stages 1 and 2 all-reduce gradients, once a step and
    with every backward pass, and gather the new parameters once.
    """
    share = (request.ranks - 1) / request.ranks
    whole = share * sum(p.numel for p in request.parameters) * request.width
    calls = request.backward_calls
    if request.stage == 3:
        # Every chunk's backward pass scatters sums; what is gathered may stay.
        return 2 * whole * calls, whole * calls * _chunks(request)
    if request.stage == 0:
        return 0.0, 2 * whole
    return whole, 2 * whole * (calls if request.stage == 2 else 1)


def _host(request: Request, cluster: Cluster) -> Range:
    """Of what waits in host memory: gradients there, the host's own step, parameters back."""
    if not request.offloads_optimizer or cluster.on_cpu:
        return Range(0.0, 0.0)
    held = sum(size for _, size in flat_sizes(request))
    moved = held * (4 + request.width)
    if request.offloads_parameters:
        moved += held * request.width * 2 * request.backward_calls
    there = _seconds(moved, HOST_LINK, MESSAGES)
    on_node = held * 28 * min(cluster.devices, cluster.per_node)
    update = _seconds(on_node, HOST_MEMORY, MEMORY)
    return Range(there.low + update.low, there.high + update.high)
