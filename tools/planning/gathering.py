"""What stage 3 has gathered at each moment of a pass: DeepSpeed 0.19.8's coordinator, replayed.

A module's parameters are gathered before it runs. When the order of modules is known (from the
third pass on) those to come are gathered ahead, up to `stage3_prefetch_bucket_size` elements and
while fewer than `stage3_max_live_parameters` are there; a module's parameters go after it, unless
they are used again within `stage3_max_reuse_distance` elements. Parameters gathered together lie in
one buffer until the last of them was used, and each in a tensor of its own from the first use on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from models.kept import Round
from tools.planning.request import Parameter, Request
from tools.planning.states import persistent

FORWARD, HEAD, LAST = "forward", "head", "last"
"""Moments of a pass; a backward pass's are the numbers of its segments."""
Moment = str | int


@dataclass(frozen=True)
class _Visit:
    moment: Moment
    parameters: tuple[str, ...]


# What was replayed, by all that it depends on: a search asks for the same many times.
_replayed: dict[tuple[Any, ...], dict[Moment, int]] = {}


def gathered(request: Request, run: Round) -> dict[Moment, int]:
    """Most bytes of gathered parameters at each moment of a pass, those apart that stay whole."""
    if not _gathers(request):
        return {}
    names = tuple(segment.module for segment in run.segments)
    zero = tuple(sorted((key, str(value)) for key, value in request.zero.items()))
    key = (request.model, zero, request.ranks, request.width, request.source > 0, names)
    if key not in _replayed:
        replay = _Replay(request, run)
        replay.run_pass()
        # What the first pass leaves is there when the next begins.
        replay.peaks.clear()
        replay.run_pass()
        _replayed[key] = replay.peaks
    return _replayed[key]


def gathered_by_evaluation(request: Request, run: Round) -> dict[Moment, int]:
    """Most bytes of gathered parameters in each segment of an evaluation, and in its head.

    Its modules come in another order than the training's, so nothing is gathered ahead: one module
    is there at a time, of several parameters their common buffer too.
    """
    if not _gathers(request):
        return {}
    modules: dict[str, list[int]] = {}
    whole = {p.name for p in persistent(request)}
    for parameter in request.parameters:
        if parameter.name not in whole:
            size = _padded(parameter, request.ranks) * request.width
            modules.setdefault(parameter.module, []).append(size)
    found: dict[Moment, int] = {}
    for module, sizes in modules.items():
        size = sum(sizes) * (2 if len(sizes) > 1 else 1)
        moment: Moment = HEAD if module == "embedding" else _segment_of(module, run)
        found[moment] = max(found.get(moment, 0), size)
    return found


def _gathers(request: Request) -> bool:
    """Whether there is anything to gather: a single rank's slices are the parameters."""
    return request.stage == 3 and (request.ranks > 1 or request.offloads_parameters)


def _visits(request: Request, run: Round) -> Iterator[_Visit]:
    """Modules with parameters in the order of their use, forward and backward."""
    whole = {p.name for p in persistent(request)}
    modules: dict[str, list[str]] = {}
    for parameter in request.parameters:
        if parameter.name not in whole:
            modules.setdefault(parameter.module, []).append(parameter.name)
    embedding = tuple(modules.pop("embedding", ()))
    positions = tuple(modules.pop("position_embedding", ()))
    by_segment: dict[int, list[tuple[str, ...]]] = {}
    for module, names in modules.items():
        by_segment.setdefault(_segment_of(module, run), []).append(tuple(names))
    yield _Visit(FORWARD, embedding)
    yield _Visit(FORWARD, positions)
    for index in sorted(by_segment):
        if request.source and run.segments[index].module == "decoder.0":
            yield _Visit(FORWARD, embedding)
        for used in by_segment[index]:
            yield _Visit(FORWARD, used)
    yield _Visit(HEAD, embedding)
    yield _Visit(len(run.segments) - 1, embedding)
    for index in sorted(by_segment, reverse=True):
        segment = run.segments[index]
        if request.model.activation_checkpointing and segment.kept != segment.entry:
            for used in by_segment[index]:
                yield _Visit(index, used)
        for used in reversed(by_segment[index]):
            yield _Visit(index, used)
    yield _Visit(LAST, embedding)


def _segment_of(module: str, run: Round) -> int:
    """The segment that runs `module`; one that none names runs with the last."""
    for index, segment in enumerate(run.segments):
        if f"{module}.".startswith(f"{segment.module}."):
            return index
    return len(run.segments) - 1


class _Buffer:
    """Parameters gathered together: their one buffer, and who has yet to be used."""

    def __init__(self, names: list[str], elements: int) -> None:
        self.names, self.elements = names, elements
        self.waiting = set(names)
        self.is_split = len(names) == 1  # a single one's tensor is the buffer


class _Replay:
    def __init__(self, request: Request, run: Round) -> None:
        self.numel = {p.name: p.numel for p in request.parameters}
        self.padded = {p.name: _padded(p, request.ranks) for p in request.parameters}
        self.width = request.width
        self.ahead = request.setting("stage3_prefetch_bucket_size", 50_000_000)
        self.most = request.setting("stage3_max_live_parameters", 1_000_000_000)
        self.reuse = request.setting("stage3_max_reuse_distance", 1_000_000_000)
        self.visits = [visit for visit in _visits(request, run) if visit.parameters]
        self.there: set[str] = set()
        self.in_flight: dict[str, _Buffer] = {}
        self.buffers: list[_Buffer] = []
        self.available = 0
        self.peaks: dict[Moment, int] = {}

    def run_pass(self) -> None:
        """One forward and backward pass."""
        for name in list(self.in_flight):
            self._wait(name)
            self.there.discard(name)
        self.available = 0
        queue = deque(
            (name, step) for step, visit in enumerate(self.visits) for name in visit.parameters
        )
        fetched_for: dict[str, int] = {}
        for step, visit in enumerate(self.visits):
            self._gather([n for n in visit.parameters if n not in self.there | set(self.in_flight)])
            for name in visit.parameters:
                self._wait(name)
            for _ in [n for n in visit.parameters if fetched_for.get(n, -1) < step]:
                name, used = queue.popleft()
                fetched_for[name] = used
            self._look_ahead(queue, fetched_for)
            self._note(visit.moment)
            self._release(step + 1, visit, fetched_for)

    def _look_ahead(self, queue: deque[tuple[str, int]], fetched_for: dict[str, int]) -> None:
        room, chosen, numel = min(self.most - self.available, self.ahead), [], 0
        while queue and numel < room:
            name, used = queue.popleft()
            fetched_for[name] = max(fetched_for.get(name, -1), used)
            if name not in self.there and name not in self.in_flight and name not in chosen:
                chosen.append(name)
                numel += self.numel[name]
        self._gather(chosen)

    def _gather(self, names: list[str]) -> None:
        if names:
            self.available += sum(self.numel[name] for name in names)
            buffer = _Buffer(names, sum(self.padded[name] for name in names))
            self.buffers.append(buffer)
            self.in_flight |= dict.fromkeys(names, buffer)

    def _wait(self, name: str) -> None:
        buffer = self.in_flight.pop(name, None)
        if buffer is None:
            return
        if not buffer.is_split:
            self.there |= set(buffer.names)
            buffer.is_split = True
        elif len(buffer.names) == 1:
            self.there.add(name)
        buffer.waiting.discard(name)
        if not buffer.waiting:
            self.buffers.remove(buffer)

    def _release(self, step: int, visit: _Visit, fetched_for: dict[str, int]) -> None:
        going = {name for name in visit.parameters if fetched_for.get(name, -1) <= step}
        passed = 0
        for later in self.visits[step:]:
            if passed >= self.reuse or not going:
                break
            for name in later.parameters:
                going.discard(name)
                passed += self.numel[name]
        for name in going & self.there:
            self.there.remove(name)
            self.available -= self.numel[name]

    def _note(self, moment: Moment) -> None:
        elements = sum(self.numel[name] for name in self.there)
        elements += sum(buffer.elements for buffer in self.buffers)
        held = elements * self.width
        self.peaks[moment] = max(self.peaks.get(moment, 0), held)


def _padded(parameter: Parameter, ranks: int) -> int:
    return -(-parameter.numel // ranks) * ranks
