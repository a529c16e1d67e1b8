"""Model states of one rank as DeepSpeed 0.19.8 cuts and keeps them, to the byte.

Stage 3 cuts each parameter into ceil(n / ranks) elements; stages 1 and 2 lay a group's parameters
end to end, pad to a multiple of twice the ranks and cut the whole. Both keep fp32 masters of their
own, in fp32 too (DeepSpeed compares a device with its name and so never finds them to be the
parameters).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.optim.recipe import factored_dims
from tools.planning.request import Parameter, Request

# Gradients of several flat tensors travel together up to so many elements at stage 1 in bf16.
ALL_REDUCE_ELEMENTS = 500_000_000
# Elements of Adafactor's work buffer (pipeline/optim/pieces.py).
ADAFACTOR_PIECE, ADAFACTOR_CPU_PIECE = 1 << 24, 1 << 17
SUB_GROUP, BUCKET = 1_000_000_000, 500_000_000


@dataclass
class States:
    """Bytes of one rank, device and host."""

    parameters: int = 0
    """Working parameters; at stage 3 this rank's slices and those that stay whole."""
    gradients: int = 0
    """What outlives a backward pass."""
    masters: int = 0
    moments: int = 0
    """Of the optimizer."""
    buckets: int = 0
    """Kept from step to step."""
    host: dict[str, int] = field(default_factory=dict)
    """The same by name, of what waits in host memory."""

    @property
    def device(self) -> int:
        """All on the device."""
        return self.parameters + self.gradients + self.masters + self.moments + self.buckets


@dataclass(frozen=True)
class Group:
    """Parameters that DeepSpeed lays into flat tensors of their own."""

    members: tuple[Parameter, ...]
    kind: str
    """Which state their optimizer keeps: adam, whole, factored or muon."""

    def slices(self, ranks: int) -> int:
        """Elements of a rank at stage 3."""
        return sum(-(-p.numel // ranks) for p in self.members)

    def aligned(self, ranks: int) -> int:
        """Elements of the flat tensor at stages 1 and 2."""
        numel, unit = sum(p.numel for p in self.members), 2 * ranks
        return -(-numel // unit) * unit


def groups(request: Request) -> list[Group]:
    """As `pipeline.optim.build` makes them."""
    if request.optimizer == "muon":
        matrices = [p for p in request.parameters if len(p.shape) > 1]
        hidden = [p for p in matrices if "embedding." not in p.name]
        # DeepSpeed's optimizer sorts them.
        hidden.sort(key=lambda p: p.shape, reverse=True)
        embeddings = [p for p in matrices if "embedding." in p.name]
        vectors = [p for p in request.parameters if len(p.shape) == 1]
        parted = [("muon", hidden), ("adam", embeddings), ("adam", vectors)]
        return [Group(tuple(members), kind) for kind, members in parted if members]
    found = []
    for is_matrix in (True, False):
        members = [p for p in request.parameters if (len(p.shape) > 1) is is_matrix]
        if request.optimizer == "adamw":
            found.append(Group(tuple(members), "adam"))
            continue
        kinds: dict[str, list[Parameter]] = {}
        for parameter in members:
            is_factored = request.factored and factored_dims(parameter.shape, 128) is not None
            kinds.setdefault("factored" if is_factored else "whole", []).append(parameter)
        found += [Group(tuple(parts), kind) for kind, parts in kinds.items()]
    return [group for group in found if group.members]


def sub_groups(request: Request, group: Group) -> list[Group]:
    """The parts that stage 3 steps one after the other."""
    most, parts, part, size = request.setting("sub_group_size", SUB_GROUP), [], [], 0
    if most >= group.slices(request.ranks):
        return [group]
    for parameter in group.members:
        part.append(parameter)
        size += -(-parameter.numel // request.ranks)
        if size >= most or parameter is group.members[-1]:
            parts.append(Group(tuple(part), group.kind))
            part, size = [], 0
    return parts


def persistent(request: Request) -> list[Parameter]:
    """Parameters that stage 3 leaves whole on every rank."""
    if request.stage != 3:
        return []
    most = request.setting("stage3_param_persistence_threshold", 100_000)
    limit = request.zero.get("stage3_model_persistence_threshold", float("inf"))
    found, total = [], 0
    for parameter in request.parameters:
        if parameter.numel <= most and total + parameter.numel <= limit:
            found.append(parameter)
            total += parameter.numel
    return found


def flat_sizes(request: Request) -> list[tuple[Group, int]]:
    """Each flat tensor that the optimizer steps, and its elements."""
    found = []
    for group in groups(request):
        if request.stage == 3:
            found += [(g, g.slices(request.ranks)) for g in sub_groups(request, group)]
        elif request.stage:
            found.append((group, group.aligned(request.ranks) // request.ranks))
        else:
            found.append((group, sum(p.numel for p in group.members)))
    return found


def states(request: Request) -> States:
    """What rank 0 holds between two steps."""
    flats = flat_sizes(request)
    held = sum(size for _, size in flats)
    whole = sum(p.numel for p in request.parameters)
    found = States(moments=sum(_moments(request, group, size) for group, size in flats))
    if request.stage == 0:
        found.parameters = whole * 4
        return found
    found.masters = held * 4
    if request.stage == 3:
        found.parameters = held * request.width
        found.gradients = held * 4
        if request.ranks > 1:
            found.parameters += sum(p.numel for p in persistent(request)) * request.width
        if request.zero.get("contiguous_gradients", True):
            found.buckets = request.setting("reduce_bucket_size", BUCKET) * request.width
    else:
        aligned = sum(group.aligned(request.ranks) for group in groups(request))
        found.parameters = aligned * request.width
        if request.stage == 1 and request.precision == "bf16" and not request.offloads_optimizer:
            found.gradients = aligned * 4
    return _offloaded(request, found, held)


def _offloaded(request: Request, found: States, held: int) -> States:
    """Move to the host what the file moves there."""
    if request.offloads_optimizer:
        found.host = {"masters": found.masters, "moments": found.moments, "gradients": held * 8}
        found.masters = found.moments = found.gradients = 0
    if request.offloads_parameters:
        found.host["parameters"] = held * request.width
        found.parameters -= held * request.width
    return found


def _moments(request: Request, group: Group, size: int) -> int:
    """Bytes of the optimizer's state for one flat tensor of `size` elements."""
    if group.kind == "adam":
        return 8 * size
    if group.kind == "muon":
        return 8 * _whole_matrices(request, group) if _keeps_whole(request) else 4 * size
    kept = 4 * size if request.momentum else 0
    most = ADAFACTOR_CPU_PIECE if request.on_cpu else ADAFACTOR_PIECE
    if group.kind == "whole":
        return kept + 4 * size + 4 * min(most, size)
    for parameter in group.members:
        p, q = factored_dims(parameter.shape, 128) or (0, 1)
        kept += 4 * (parameter.numel // parameter.shape[p] + parameter.numel // parameter.shape[q])
    return kept + 4 * max(_block(p, size, most, request) for p in group.members)


def _block(parameter: Parameter, size: int, most: int, request: Request) -> int:
    """Elements of the largest piece of a factored matrix that Adafactor walks through: whole rows,
    as many as make `most`, of the `size` or fewer that a rank holds."""
    held = -(-parameter.numel // request.ranks) if request.stage == 3 else parameter.numel
    held, row = min(held, size), parameter.shape[-1]
    if held <= row:
        return held
    return max(1, min(most, held) // row) * row


def _keeps_whole(request: Request) -> bool:
    """Whether Muon's momentum is kept of whole matrices, and twice: as it is, and as it will be if
    the step is applied."""
    if request.offloads_optimizer:
        return False
    return request.stage == 2 or (request.stage == 1 and request.precision == "fp32")


def _whole_matrices(request: Request, group: Group) -> int:
    """Elements of the matrices that the fullest rank has a slice of."""
    piece = group.aligned(request.ranks) // request.ranks
    per_rank: dict[int, int] = {}
    start = 0
    for parameter in group.members:
        for rank in range(start // piece, (start + parameter.numel - 1) // piece + 1):
            per_rank[rank] = per_rank.get(rank, 0) + parameter.numel
        start += parameter.numel
    return max(per_rank.values())
