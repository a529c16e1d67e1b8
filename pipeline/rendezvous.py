"""How ranks meet before their collectives work, and find out who is gone when these fail.

Rank 0 keeps a small store of keys behind the launcher's MASTER_ADDR and MASTER_PORT (torch's own,
which the process group then shares). Every rank counts there once a second that it is alive: after
a collective failed, whoever no longer counts is named, which the collective's own error cannot do.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from pipeline.agreement import Facts, heals, name_ranks, spans, verdict
from pipeline.options import AgreedError, Fault

BEAT_SECONDS = 1.0
ANSWER_SECONDS = 3.0  # in which a rank that is alive has counted
_SHARED_SECONDS = 10.0  # in which a shared file system shows what another node wrote
_HEARD_SECONDS = 10.0  # in which every rank has heard the verdict


@dataclass(frozen=True)
class Place:
    """Where this rank stands in the launch."""

    rank: int
    size: int
    address: str
    port: int

    @staticmethod
    def of(environ: Mapping[str, str]) -> Place:
        """As the launcher's environment says."""
        return Place(
            int(environ["RANK"]),
            int(environ["WORLD_SIZE"]),
            environ["MASTER_ADDR"],
            int(environ["MASTER_PORT"]),
        )


class Meeting:
    """One launch's ranks, talking through rank 0's store and not through collectives."""

    def __init__(self, place: Place, seconds: float) -> None:
        """Join within `seconds`. Raises Fault where that cannot be; another start may succeed."""
        self.hosts = [socket.gethostname()] * place.size  # of every rank, once they have met
        self._place = place
        self._seconds = seconds
        self._store = self._join()
        self._left = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="presence", daemon=True)
        self._pulse.start()

    def _join(self) -> dist.Store:
        place, host = self._place, socket.gethostname()
        where = f"MASTER_ADDR={place.address!r}, MASTER_PORT={place.port}"
        try:
            store = _open_store(place, self._seconds, serve=place.rank == 0)
        except dist.DistError as error:
            if place.rank == 0:
                raise Fault(
                    f"{where}: {host} cannot listen there ({_last_line(error)}); give the launcher "
                    "another --master_port"
                ) from error
            raise Fault(
                f"{where}: rank 0 did not answer {host} (rank {place.rank}) within start_timeout="
                f"{self._seconds:g} s; see what its node says, and whether this one reaches it"
            ) from error
        if place.rank > 0 and store.check(["verdict"]):
            raise Fault(
                f"{where}: is another run's, which has begun; give the launcher another "
                "--master_port"
            )
        return store

    def _beat(self) -> None:
        # A store that no longer answers belongs to a rank 0 that is gone.
        with contextlib.suppress(RuntimeError):
            while True:
                self._store.add(f"alive/{self._place.rank}", 1)
                if self._left.wait(BEAT_SECONDS):
                    return

    def leave(self) -> None:
        """Count no longer; the process may end."""
        self._left.set()
        self._pulse.join(ANSWER_SECONDS)

    def roll_call(self, facts: Facts, run_folder: Path | None) -> list[Facts]:
        """Wait for every rank's facts; on rank 0 those of all, elsewhere this rank's.

        Args:
            facts: this rank's.
            run_folder: where rank 0 leaves a file for the others to see; None where it has none.

        Raises:
            AgreedError: on every rank alike, naming the node that differs, has a problem or did not
                join in time; the last with exit code 1.
            Fault: rank 0 is gone.
        """
        if self._place.rank == 0:
            return self._hold_roll_call(facts, run_folder)
        mark = self._get("mark").decode()
        if mark and run_folder is not None and not _appears(run_folder / mark):
            problem = (
                f"run_dir={str(run_folder)!r}: does not show what {self._get('host').decode()} "
                "wrote there; give a folder on a file system that all nodes share"
            )
            facts = replace(facts, problem=facts.problem or problem)
        self._store.set(f"facts/{self._place.rank}", facts.to_json())
        told = self._get("verdict").decode()
        code = int(self._get("exit_code"))
        self.hosts = self._get("hosts").decode().split("\n")
        self._store.set(f"heard/{self._place.rank}", "")
        if told:
            raise AgreedError(told, exit_code=code)
        return [facts]

    def _hold_roll_call(self, facts: Facts, run_folder: Path | None) -> list[Facts]:
        place, mark = self._place, Path()
        if run_folder is not None:
            mark = run_folder / f".seen_by_all_{uuid.uuid4().hex}"
            try:
                mark.touch()
            except OSError as error:
                problem = f"run_dir={str(run_folder)!r}: {error.strerror}; see to its disk"
                facts = replace(
                    facts,
                    problem=facts.problem or problem,
                    may_heal=facts.may_heal or not facts.problem,
                )
                mark, run_folder = Path(), None
        try:
            self._store.set("host", facts.host)
            self._store.set("mark", mark.name)
            others = range(1, place.size)
            missing = self._missing([f"facts/{rank}" for rank in others], self._seconds)
            stated = {
                rank: Facts.from_json(self._store.get(f"facts/{rank}"))
                for rank in others
                if f"facts/{rank}" not in missing
            } | {0: facts}
        finally:
            if run_folder is not None:
                mark.unlink(missing_ok=True)
        if missing:
            told = self._absent(stated)
        else:
            told = verdict([stated[rank] for rank in range(place.size)])
        names = [stated[rank].host if rank in stated else "?" for rank in range(place.size)]
        self.hosts = names
        # Without that node another start may succeed; what differs is for a person to mend.
        code = 1 if missing or heals(list(stated.values())) else 2
        self._store.set("exit_code", str(code))
        self._store.set("hosts", "\n".join(names))
        self._store.set("verdict", told)
        self._missing([f"heard/{rank}" for rank in stated if rank], _HEARD_SECONDS)
        if told:
            raise AgreedError(told, exit_code=code)
        return [stated[rank] for rank in range(place.size)]

    def _absent(self, stated: Mapping[int, Facts]) -> str:
        place = self._place
        here = [stated[rank].host if rank in stated else "" for rank in range(place.size)]
        gone = spans([rank for rank in range(place.size) if rank not in stated])
        return (
            f"start_timeout={self._seconds:g}: {gone} did not join, {name_ranks(here, stated)} "
            "did; see what the launcher says on the node that is missing, and whether it reaches "
            f"{place.address}:{place.port}"
        )

    def _missing(self, keys: Sequence[str], seconds: float) -> set[str]:
        """Those of `keys` that nobody has set within `seconds`."""
        with contextlib.suppress(dist.DistStoreError):
            if keys:
                self._store.wait(list(keys), timedelta(seconds=seconds))
            return set()
        return {key for key in keys if not self._store.check([key])}

    def _get(self, key: str) -> bytes:
        try:
            # Rank 0 waits as long for the others, and tells who did not come.
            self._store.wait([key], timedelta(seconds=self._seconds + ANSWER_SECONDS))
            return self._store.get(key)
        except (dist.DistError, RuntimeError) as error:
            raise Fault(
                f"MASTER_ADDR={self._place.address!r}: rank 0 said nothing to "
                f"{socket.gethostname()} (rank {self._place.rank}) within start_timeout="
                f"{self._seconds:g} s; see what its node says"
            ) from error

    def find_lost(self) -> list[int]:
        """Ranks that no longer answer, found out within a few seconds."""
        place, ranks = self._place, range(self._place.size)
        try:
            store = self._store if place.rank == 0 else self._fresh_store()
            before = _counts(store, place.size)
            time.sleep(ANSWER_SECONDS)
            after = _counts(store, place.size)
        except ConnectionRefusedError:
            return [0]  # its host answers that the process is gone
        except (OSError, RuntimeError):
            there = [rank for rank in ranks if self.hosts[rank] == self.hosts[0]]
            return [rank for rank in there if rank != place.rank]
        return [rank for rank in ranks if before[rank] == after[rank] and rank != place.rank]

    def name_lost(self) -> tuple[str, int]:
        """One line on the ranks that no longer answer this one, "" where all do, and who tells it.

        Each side of a network that was cut tells of the other.
        """
        lost = self.find_lost()
        left = set(range(self._place.size)) - set(lost)
        if not lost:
            return "", min(left)
        return (
            f"{name_ranks(self.hosts, lost)} no longer answers "
            f"{name_ranks(self.hosts, [self._place.rank])}: killed, frozen, or cut off the network",
            min(left, default=self._place.rank),
        )

    def _fresh_store(self) -> dist.Store:
        """Another way to rank 0's store: the first may hang on a connection that is cut."""
        place = self._place
        socket.create_connection((place.address, place.port), ANSWER_SECONDS).close()
        return _open_store(place, ANSWER_SECONDS, serve=False)


def _open_store(place: Place, seconds: float, *, serve: bool) -> dist.Store:
    """Rank 0's store. Raises DistError where it cannot be had."""
    made: list[dist.Store] = []
    failed: list[dist.DistError] = []

    def make() -> None:
        try:
            store = dist.TCPStore(
                place.address,
                place.port,
                place.size,
                is_master=serve,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,  # the process group's own store is then the same one
            )
            made.append(dist.PrefixStore("isoflop", store))
        except dist.DistError as error:
            failed.append(error)

    # For a greeting that another program there never sends torch would wait without end.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(seconds + ANSWER_SECONDS)
    if not made:
        raise failed[0] if failed else dist.DistNetworkError("what listens there says nothing")
    return made[0]


def _counts(store: dist.Store, size: int) -> list[int]:
    """How often each rank has counted; adding nothing never waits."""
    return [store.add(f"alive/{rank}", 0) for rank in range(size)]


def _appears(path: Path) -> bool:
    """Whether `path` is there; a network's file system may take a moment to show it."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:199]}…"


def is_lost_collective(error: BaseException) -> bool:
    """Whether a collective raised `error` because another rank did not take part."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def meet(seconds: float) -> Meeting | None:
    """Join the launch's other ranks; None where there are none. Raises Fault."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    return Meeting(Place.of(os.environ), seconds)
