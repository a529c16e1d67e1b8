"""The fullest moment of a step on one rank, and what fills it.

A step is walked through moment by moment: the head at the end of the forward pass, each segment's
backward pass, the end of the backward pass, the optimizer's step; and an evaluation, each segment
and the head. Each holds the model states and what is its own; the largest sum is the plan's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from models.head_rows import head_bytes, nll_bytes
from models.kept import Amount, Round, Segment
from tools.planning.disk import checkpoint_bytes
from tools.planning.gathering import HEAD, LAST, gathered, gathered_by_evaluation
from tools.planning.request import Parameter, Request
from tools.planning.states import (
    ALL_REDUCE_ELEMENTS,
    BUCKET,
    States,
    flat_sizes,
    groups,
    states,
)

# Input ids, targets and their mask, of a position.
BATCH_BYTES = 8 + 8 + 1
# DeepSpeed's limit on what Muon's gathers keep.
MUON_BUFFERS = 256 << 20
EVALUATION = "evaluation"
"""What the names of its moments begin with."""
SAVE_COPY = "checkpoint copy"


@dataclass(frozen=True)
class Moment:
    """What a rank holds at one moment of a step, in bytes by component."""

    name: str
    parts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Of all components."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The component that takes the most."""
        return max(self.parts, key=lambda name: self.parts[name])


def peak(request: Request) -> Moment:
    """The fullest moment, of a step or of an evaluation."""
    return fullest(moments(request))


def fullest(some: Iterable[Moment]) -> Moment:
    """Of some moments."""
    return max(some, key=lambda moment: moment.total)


def moments(request: Request) -> Iterator[Moment]:
    """Every moment that may be the fullest."""
    yield from step_moments(request)
    yield from evaluation_moments(request)


def step_moments(request: Request) -> Iterator[Moment]:
    """Those of a training step."""
    held = states(request)
    base = _base(request, held, request.micro_batch)
    for run in request.rounds:
        yield from _round_moments(request, base, run)
    yield Moment("optimizer step", _added(base, **_step(request, held)))


def evaluation_moments(request: Request) -> Iterator[Moment]:
    """Those of an evaluation; none where nothing is scored."""
    base = _base(request, states(request), request.evaluated)
    for run in request.evaluation_rounds:
        yield from _evaluation_moments(request, base, run)


def _base(request: Request, held: States, sequences: int) -> dict[str, int]:
    """What is there in every moment with a batch of so many sequences."""
    base = {
        "parameters": held.parameters,
        "gradients": held.gradients,
        "fp32 masters": held.masters,
        "optimizer states": held.moments,
        "buckets": held.buckets + _muon_buffers(request),
        "batch": sequences * request.seq_len * BATCH_BYTES,
    }
    return base | (_save_copy(request) if request.on_cpu else {})


def host(request: Request) -> dict[str, int]:
    """Bytes of a rank by name in the memory of a GPU's host: what is offloaded, and the copy that a
    checkpoint is written from while the training goes on."""
    held = dict(states(request).host)
    return held if request.on_cpu else held | _save_copy(request)


def _save_copy(request: Request) -> dict[str, int]:
    if not request.copies_saves:
        return {}
    return {SAVE_COPY: -(-checkpoint_bytes(request) // request.ranks)}


def _evaluation_moments(request: Request, base: dict[str, int], run: Round) -> Iterator[Moment]:
    model, width, on_cpu = request.model, request.width, request.on_cpu
    whole = gathered_by_evaluation(request, run)
    carried = run.carried.bytes(width, on_cpu=on_cpu)
    for index, segment in enumerate(run.segments):
        held = segment.passing.bytes(width, on_cpu=on_cpu) + carried
        yield Moment(
            f"{EVALUATION}, {segment.module}",
            _added(base, activations=held, gathered=whole.get(index, 0)),
        )
    head = nll_bytes(
        model.vocab_size,
        model.d_model,
        states=run.states,
        scored=run.scored,
        width=width,
        on_cpu=on_cpu,
    )
    yield Moment(f"{EVALUATION}, head", _added(base, logits=head, gathered=whole.get(HEAD, 0)))


def _round_moments(request: Request, base: dict[str, int], run: Round) -> Iterator[Moment]:
    model, width = request.model, request.width
    whole = gathered(request, run)
    embedding = model.vocab_size * model.d_model
    calls = request.backward_calls * run.calls
    beside = run.beside.bytes(width, on_cpu=request.on_cpu)
    held = [_held(request, segment).bytes(width, on_cpu=request.on_cpu) for segment in run.segments]
    head = head_bytes(
        model.vocab_size,
        model.d_model,
        states=run.states,
        scored=run.scored,
        width=width,
        on_cpu=request.on_cpu,
    )
    states_bytes = 2 * run.states * model.d_model * width + embedding * 4
    before = _sums(request, set()) if calls == 1 else _sums(request, None)
    yield Moment(
        "head, at the end of the forward pass",
        _added(
            base,
            activations=sum(held) + beside,
            logits=max(head, states_bytes + run.after_head.bytes(width, on_cpu=request.on_cpu)),
            gathered=whole.get(HEAD, 0),
            **before,
        ),
    )
    passed: set[str] = set()
    for index in reversed(range(len(run.segments))):
        segment = run.segments[index]
        full = (segment.kept + segment.working).bytes(width, on_cpu=request.on_cpu)
        passed.add(segment.module)
        parts = _sums(request, passed) if calls == 1 else _sums(request, None)
        yield Moment(
            f"backward pass of {segment.module}",
            _added(
                base,
                activations=sum(held[:index]) + full + beside,
                # The embedding's gradient waits for the one of its other use.
                logits=embedding * width,
                gathered=whole.get(index, 0),
                **_added(parts, buckets=_reducing(request)),
            ),
        )
    # The gradients of its two uses and, where it is not among those that wait, their sum.
    last = (2 if request.stage < 2 and request.precision == "fp32" else 3) * embedding * width
    yield Moment(
        "end of the backward pass",
        _added(
            base,
            logits=last,
            gathered=whole.get(LAST, 0),
            **_added(_sums(request, None), buckets=_reducing(request)),
        ),
    )


def _held(request: Request, segment: Segment) -> Amount:
    return segment.entry if request.model.activation_checkpointing else segment.kept


def _sums(request: Request, passed: set[str] | None) -> dict[str, int]:
    """Gradients that wait for the step beside those of `states`; `passed`: of these segments alone,
    None: of all parameters."""
    if request.stage == 2 and not request.offloads_optimizer and passed != set():
        return {"gradients": sum(size for _, size in flat_sizes(request)) * 4}
    is_kept = request.stage == 0 or (request.stage == 1 and request.precision == "fp32")
    if not is_kept:
        return {}
    numel = sum(
        p.numel
        for p in request.parameters
        if passed is None or any(f"{p.module}.".startswith(f"{name}.") for name in passed)
    )
    return {"gradients": numel * 4}


def _reducing(request: Request) -> int:
    """Bytes that reductions of gradients hold beside `states`' buckets."""
    if request.stage == 2 or (request.stage == 1 and request.precision == "fp32"):
        return request.setting("reduce_bucket_size", BUCKET) * request.width
    return 0


def _muon_buffers(request: Request) -> int:
    """At stage 3 gradients and their momentum are gathered whole to be orthogonalised, a few
    matrices at a time, in buffers of which DeepSpeed keeps one a length, as its limit allows."""
    kept = 0
    for size in sorted(set(_muon_batches(request)), reverse=True):
        if kept + 4 * size * (request.ranks + 1) <= MUON_BUFFERS:
            kept += 4 * size * (request.ranks + 1)
    return kept


def _muon_batches(request: Request) -> list[int]:
    """A rank's elements of the matrices that are gathered together."""
    if request.optimizer != "muon" or request.stage != 3 or request.ranks == 1:
        return []
    most = request.setting("reduce_bucket_size", BUCKET)
    batches: list[list[Parameter]] = []
    for group in (part for part, _ in flat_sizes(request) if part.kind == "muon"):
        batch: list[Parameter] = []
        for parameter in group.members:
            if batch and sum(p.numel for p in batch) + parameter.numel > most:
                batches.append(batch)
                batch = []
            batch.append(parameter)
        batches.append(batch)
    return [sum(-(-p.numel // request.ranks) for p in batch) for batch in batches]


def _step(request: Request, held: States) -> dict[str, int]:
    """What the optimizer's step holds beside the states."""
    sizes = [size for _, size in flat_sizes(request)]
    sums = _sums(request, None)
    if request.stage == 0:
        return sums
    largest = max(p.numel for p in request.parameters)
    if request.stage == 3:
        slices = -(-largest // request.ranks)
        return _added(sums, **{"step copies": max(4 * max(sizes), 8 * slices)})
    aligned = [group.aligned(request.ranks) for group in groups(request)]
    if request.stage == 1 and request.precision == "bf16":
        together = sum(aligned) <= ALL_REDUCE_ELEMENTS and len(aligned) > 1
        flat = sum(aligned) if together else max(aligned)
        copies = flat * 2 + (flat * 4 if together else 0)
        return _added(sums, **{"step copies": copies})
    if request.stage == 1:
        sums["buckets"] = request.setting("reduce_bucket_size", BUCKET) * request.width
        # Then the gradients of other ranks' parts go, and a flat copy of the own ones is made.
        own = {"gradients": 4 * sum(sizes), "step copies": 4 * max(sizes)}
        return max(sums, sums | own, key=lambda parts: sum(parts.values()))
    norms = 8 * min(largest, max(sizes))
    return _added(sums, **{"step copies": max(norms, 4 * max(sizes))})


def _added(base: dict[str, int], **more: int) -> dict[str, int]:
    found = dict(base)
    for name, value in more.items():
        found[name] = found.get(name, 0) + value
    return found
