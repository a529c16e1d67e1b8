"""ENTP's exact step against the two ways of writing it down.

Theirs are GPT-2 blocks of torch's own operations, in this file: a loop that encodes every prefix
anew (what the authors' code does), and one padded batch of all prefixes. Both keep every prefix's
graph until one backward pass, as they would be written. Weights, batch, loss and gradient are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import (
    Benchmark,
    Contest,
    in_fresh_process,
    live_growth,
    memory_growth,
)
from tests.benchmarks.model_steps import (
    contest_of_steps,
    gradient_norm,
    one_thread,
    random_ids,
)

if TYPE_CHECKING:
    from torch import Tensor

VOCAB_SIZE = 1024
# The ENTP authors' models of these names.
SIZES = {"entp-small": "3 layers, d 192", "entp-medium": "6 layers, d 384"}


@dataclass(frozen=True)
class Shape:
    """What both sides compute."""

    seq_len: int
    batch: int = 4
    size: str = "entp-small"


Step = Callable[[], tuple[float, float]]


def build_entp(shape: Shape) -> Any:
    """ENTP with GPT-2 blocks."""
    from models.config import named
    from models.registry import build

    one_thread()
    return build(named("entp", shape.size, VOCAB_SIZE, max_seq_len=shape.seq_len))


def exact_step(shape: Shape) -> Step:
    """Ours: chunk by chunk, each back-propagated at once."""
    import torch

    from models.batch import Batch

    model = build_entp(shape)
    ids = random_ids(shape.batch, shape.seq_len + 1, VOCAB_SIZE)
    mask = torch.ones(shape.batch, shape.seq_len, dtype=torch.bool)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask)

    def step() -> tuple[float, float]:
        total = 0.0
        for terms in model.loss_chunks(batch):
            (terms.objective / mask.sum()).backward()
            total += float(terms.nll)
        return total / int(mask.sum()), norm_and_clear(model)

    return step


def norm_and_clear(model: Any) -> float:
    """The Euclidean norm of the gradient, which is let go."""
    norm = gradient_norm(model)
    model.zero_grad()
    return norm


def loop_step(shape: Shape) -> Step:
    """Every prefix encoded by itself, without padding; one backward pass."""
    import torch

    def read_ends(model: Any, ids: Tensor) -> Tensor:
        ends = [
            encode(model, ids[:, :length], None)[:, -1] for length in range(1, ids.shape[1] + 1)
        ]
        return torch.stack(ends, 1)

    return written_out(shape, read_ends)


def padded_step(shape: Shape) -> Step:
    """All prefixes of all rows as one padded batch [batch·seq, seq]; one backward pass."""
    import torch

    def read_ends(model: Any, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        place = torch.arange(length)
        real = place <= place.unsqueeze(1)  # [prefix, key]
        mask = real.repeat(rows, 1)[:, None, None]
        hidden = encode(model, ids.repeat_interleave(length, 0), mask)
        return hidden[torch.arange(rows * length), place.repeat(rows)].view(rows, length, -1)

    return written_out(shape, read_ends)


def written_out(shape: Shape, read_ends: Callable[[Any, Tensor], Tensor]) -> Step:
    """A step of ENTP's definition: `read_ends` gives [batch, seq, d], each prefix's last token."""
    import torch.nn.functional as F

    model = build_entp(shape)
    ids = random_ids(shape.batch, shape.seq_len + 1, VOCAB_SIZE)

    def step() -> tuple[float, float]:
        norm, eps = model.final_norm, model.config.norm_eps
        hidden = read_ends(model, ids[:, :-1])
        hidden = F.layer_norm(hidden, hidden.shape[-1:], norm.weight, norm.bias, eps)
        logits = F.linear(hidden, model.embedding.weight)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return float(loss.detach()), norm_and_clear(model)

    return step


def encode(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """A bidirectional GPT-2 stack on [rows, length] ids; `mask` [rows, 1, 1, length]: real keys.

    Only the model's weights are used, none of its code.
    """
    import torch.nn.functional as F

    config = model.config
    scale = config.d_model**0.5 if config.scale_embedding else 1.0
    rows, length = ids.shape
    hidden = F.embedding(ids, model.embedding.weight) * scale
    hidden = hidden + model.position_embedding.weight[:length]
    for block in model.blocks:
        attention, feed_forward = block.attention, block.feed_forward
        normed = _layer_norm(hidden, block.attention_norm, config.norm_eps)
        queries, keys, values = (
            _linear(normed, part).view(rows, length, config.num_heads, -1).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        )
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        hidden = hidden + _linear(attended.transpose(1, 2).flatten(2), attention.output)
        normed = _layer_norm(hidden, block.feed_forward_norm, config.norm_eps)
        inner = F.gelu(_linear(normed, feed_forward.up), approximate="tanh")
        hidden = hidden + _linear(inner, feed_forward.down)
    return hidden


def _linear(hidden: Tensor, module: Any) -> Tensor:
    import torch.nn.functional as F

    return F.linear(hidden, module.weight, module.bias)


def _layer_norm(hidden: Tensor, module: Any, eps: float) -> Tensor:
    import torch.nn.functional as F

    return F.layer_norm(hidden, hidden.shape[-1:], module.weight, module.bias, eps)


def contest(folder: Path, theirs: Callable[..., Step], shape: Shape) -> Contest:
    """See `BENCHMARKS`."""
    work = shape.batch * shape.seq_len
    steps = contest_of_steps(exact_step, theirs, shape, work=work, unit="tok")
    memory, resident = (
        tuple(
            partial(in_fresh_process, growth_of_second, growth, side, shape)
            for side in (exact_step, theirs)
        )
        for growth in (live_growth, memory_growth)
    )
    return dataclasses.replace(steps, memory=memory, resident=resident)


def growth_of_second(
    growth: Callable[[Step], float], make_step: Callable[[Shape], Step], shape: Shape
) -> float:
    """Peak MiB, by `growth`, of a step in a process that has made one and holds no gradient.

    The first maps torch's own code and makes oneDNN's kernels. Of resident memory, what malloc kept
    of the first's is not growth: only live tensors compare the two sides.
    """
    step = make_step(shape)
    step()
    return growth(step)


def _benchmark(kind: str, theirs: Callable[..., Step], described: str, shape: Shape) -> Benchmark:
    deep = "" if shape.size == "entp-small" else f"-{shape.size.removeprefix('entp-')}"
    return Benchmark(
        name=f"entp-{kind}{deep}-{shape.seq_len}",
        ours="ENTP's exact step",
        theirs=described,
        process="one process",
        prepare=partial(contest, theirs=theirs, shape=shape),
        note=f"{SIZES[shape.size]}, T {shape.seq_len}, batch {shape.batch}, V {VOCAB_SIZE}, fp32; "
        "peak MiB: tensors that a fresh process's second step holds at once, and beside it what "
        "that step adds to resident memory, malloc's habits included",
    )


_LOOP = "a loop that encodes every prefix anew, unpadded"
_PADDED = "one padded batch of all prefixes"
# Batch 4 where a pair stays within some 12 CPU-seconds.
BENCHMARKS = (
    _benchmark("loop", loop_step, _LOOP, Shape(64)),
    _benchmark("loop", loop_step, _LOOP, Shape(128)),
    _benchmark("loop", loop_step, _LOOP, Shape(256, batch=1)),
    _benchmark("loop", loop_step, _LOOP, Shape(64, size="entp-medium", batch=2)),
    _benchmark("loop", loop_step, _LOOP, Shape(128, size="entp-medium", batch=1)),
    _benchmark("padded", padded_step, _PADDED, Shape(64)),
    _benchmark("padded", padded_step, _PADDED, Shape(128)),
    _benchmark("padded", padded_step, _PADDED, Shape(256, batch=1)),
)
