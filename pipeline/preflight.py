"""What a rank states before training, for all nodes to agree on; imports nothing heavy.

Rank 0 compares what they state (`pipeline/agreement.py`); what differs is told in one line with the
node that differs, what it has and what the others have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.agreement import Facts, clock_problem, name_ranks
from pipeline.atomic import write_atomically
from pipeline.checkpointing.names import partial_bytes
from pipeline.network import choose_interfaces, spans_hosts
from pipeline.options import AgreedError, Fault, UserError
from pipeline.plan import recorded_versions

if TYPE_CHECKING:
    from pipeline.distributed import World
    from pipeline.plan import Plan
    from pipeline.rendezvous import Meeting

FILE_NAME = "preflight.json"
REFUSED_START_TIMEOUT = 300.0  # seconds for all nodes to join where the run's own is not known
# Bytes of a parameter in a checkpoint, at least: its fp32 master and the optimizer's state.
CHECKPOINT_BYTES = {"adamw": 12, "muon": 8, "adafactor": 4}
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("models", "pipeline", "tools")


class Preflight:
    """A run's start: its plan, what its ranks stated, and how they talk outside of collectives.

    Attributes:
        plan: of this rank; on several nodes all have the same.
        facts: of every rank on rank 0, elsewhere this rank's at most.
        meeting: with the other ranks; None before `join` on one host, and where there are none.
    """

    def __init__(self, make_plan: Callable[[], Plan]) -> None:
        """Make the plan; on several nodes wait until all have it.

        Raises UserError: what `make_plan` does, and where nodes differ.
        """
        self.meeting: Meeting | None = None
        if spans_hosts(os.environ):
            self._agree(make_plan)
            return
        self.plan = make_plan()
        self.facts: list[Facts] = []
        if os.environ.get("RANK", "0") == "0":
            self.facts = [own_facts(self.plan)] * int(os.environ.get("WORLD_SIZE", "1"))
            if self.facts[0].problem:
                raise UserError(self.facts[0].problem)

    def _agree(self, make_plan: Callable[[], Plan]) -> None:
        """What one node refuses must end all, at once and in one line: so it is told to rank 0."""
        plan, interface, problem, may_heal = None, "", "", False
        try:
            interface = choose_interfaces(os.environ) or ""
            plan = make_plan()
        except UserError as error:
            problem, may_heal = str(error), isinstance(error, Fault)
        from pipeline.distributed import device_kind
        from pipeline.rendezvous import meet

        try:
            self.meeting = meet(plan.config.start_timeout if plan else REFUSED_START_TIMEOUT)
        except Fault as error:
            # What this rank refuses stands, whether the others hear of it or not.
            kind = UserError if problem and not may_heal else Fault
            raise kind("; ".join(filter(None, (problem, str(error))))) from error
        assert self.meeting is not None
        facts = own_facts(plan, problem, interface, device_kind())
        facts = dataclasses.replace(facts, may_heal=may_heal)
        try:
            self.facts = self.meeting.roll_call(facts, plan.folder.path if plan else None)
        except UserError:
            self.meeting.leave()
            raise
        assert plan is not None
        self.plan = plan

    def join(self) -> Meeting | None:
        """Meet the other ranks, if that was not done; None where there are none.

        Raises Fault where rank 0 does not come or its port is taken.
        """
        if self.meeting is None:
            from pipeline.rendezvous import meet

            self.meeting = meet(self.plan.config.start_timeout)
        return self.meeting

    def leave(self) -> None:
        """No longer be there for the other ranks."""
        if self.meeting is not None:
            self.meeting.leave()

    def check_links(self, world: World) -> None:
        """Time collectives, compare clocks, and write it all down; a collective.

        Raises AgreedError where a clock is off, RuntimeError where a collective does not end.
        """
        from pipeline.interconnect import measure

        hosts = [socket.gethostname()] if self.meeting is None else self.meeting.hosts
        links = measure(world) if world.size > 1 else None
        if links is not None and (problem := clock_problem(hosts, links.clock_offsets)):
            raise AgreedError(problem)
        if not world.is_main:
            return
        found = report(self.facts, links.record() if links else {})
        text = json.dumps(found, indent=2) + "\n"
        write_atomically(self.plan.folder.path / FILE_NAME, text)
        if links is not None and spans_hosts(os.environ):
            nodes = name_ranks(hosts, range(world.size))
            print(f"{self.plan.config.name}: {nodes} agree; {links}", flush=True)


def agree_without_plan(
    problem: UserError | None, same: Mapping[str, str], seconds: float, folder: Path
) -> Meeting | None:
    """Meet the launch's other ranks and compare what they have; None where there are none.

    Args:
        problem: why this rank cannot go on, or None.
        same: what must be the same on all beside code and versions, by name.
        seconds: in which all must have come.
        folder: that all must see.

    Raises UserError, on every rank alike where they have met.
    """
    from pipeline.rendezvous import meet

    meeting = meet(seconds)
    if meeting is None and problem is not None:
        raise problem
    if meeting is not None:
        facts = own_facts(None, str(problem or ""))
        may_heal = isinstance(problem, Fault)
        facts = dataclasses.replace(facts, same={**facts.same, **same}, may_heal=may_heal)
        try:
            meeting.roll_call(facts, folder if folder.is_dir() else None)
        except UserError:
            meeting.leave()
            raise
    return meeting


def own_facts(plan: Plan | None, problem: str = "", interface: str = "", device: str = "") -> Facts:
    """The facts of this process; without a plan, those that a refused run has too."""
    same = {"code": code_digest(), **recorded_versions()}
    if device:
        same["device"] = device
    free: dict[str, int] = {}
    if plan is not None:
        same |= _plan_facts(plan)
        free = _free_bytes(plan)
        problem = problem or "; ".join(room_problems(plan, free))
    return Facts(socket.gethostname(), problem, same, code_files(), free, interface)


@cache
def code_files() -> dict[str, str]:
    """The first 16 hexadecimal digits of the SHA-256 of each of the project's .py files."""
    files = sorted(path for name in _PACKAGES for path in (_ROOT / name).rglob("*.py"))
    return {
        path.relative_to(_ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in files
    }


def code_digest() -> str:
    """One digest of `code_files`."""
    return hashlib.sha256(json.dumps(code_files()).encode()).hexdigest()


def _plan_facts(plan: Plan) -> dict[str, str]:
    """The data, the settings and the model: one entry each, so that what differs has a name."""
    document = plan.document
    facts = {
        "data": document["data"]["fingerprint"],
        "tokenizer": document["data"]["tokenizer_sha256"],
        "ds_config": json.dumps(plan.ds_settings, sort_keys=True),
        "finished": str(plan.folder.is_finished).lower(),
    }
    if "flan" in document:
        facts["flan"] = document["flan"]["fingerprint"]
    run = json.loads(json.dumps(document["run"]))
    return facts | {f"run.{key}": json.dumps(value) for key, value in run.items()}


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _free_bytes(plan: Plan) -> dict[str, int]:
    places = {"run_dir": plan.folder.path, "cache_dir": Path(plan.config.cache_dir)}
    free = {name: shutil.disk_usage(_existing(path)).free for name, path in places.items()}
    # A save that was killed makes room for the next one.
    free["run_dir"] += partial_bytes(plan.folder.checkpoints)
    return free


def room_problems(plan: Plan, free: Mapping[str, int]) -> Iterable[str]:
    """Disks that have no room for what the run is bound to write.

    One checkpoint must fit beside those that are there; with `on_failed_save: go_on` a full disk is
    what the run was told to live with. A cache must hold what it is allowed, or all shards.
    """
    config = plan.config
    needed = plan.document["parameters"]["total"] * CHECKPOINT_BYTES[config.optimizer]
    if config.on_failed_save == "stop" and not plan.folder.is_finished:
        yield from _no_room("run_dir", config.run_dir, free, needed, "a checkpoint takes at least")
    from pipeline.data.manifest import read_manifest
    from pipeline.data.remote import cache_of

    folder = config.data_folder
    cache_here = cache_of(folder)
    if cache_here is not None:
        wanted = min(
            cache_here.limit_bytes, sum(shard.bytes for shard in read_manifest(folder).shards)
        )
        missing = wanted - cache_here.held_bytes()
        yield from _no_room(
            "cache_dir", config.cache_dir, free, missing, f"cache_gb={config.cache_gb:g} may take"
        )


def _no_room(
    field: str, place: str, free: Mapping[str, int], needed: int, why: str
) -> Iterable[str]:
    if free[field] < needed:
        yield (
            f"{field}={place!r}: {free[field] / 1e9:.3f} GB are free, {why} {needed / 1e9:.3f} GB; "
            "make room or give another place"
        )


def report(facts: Sequence[Facts], measured: Mapping[str, Any]) -> dict[str, Any]:
    """What preflight.json says: each node once, what all have, and the links between them."""
    nodes: dict[str, dict[str, Any]] = {}
    for rank, each in enumerate(facts):
        node = nodes.setdefault(
            each.host,
            {"ranks": [], "interface": each.interface, "free_bytes": dict(each.free_bytes)},
        )
        node["ranks"].append(rank)
    kept = {key: value for key, value in facts[0].same.items() if not key.startswith("run.")}
    return {"nodes": nodes, "same": kept, **measured}
