"""Whether all nodes of a run have the same, and how one that differs is named; nothing is asked.

Pure functions of what the ranks state; `pipeline/preflight.py` states it.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

MAX_CLOCK_SKEW = 5.0  # seconds; what is told by several clocks is then still in order
_SHOWN_NODES, _SHOWN_FILES = 8, 3


@dataclasses.dataclass(frozen=True)
class Facts:
    """What one rank knows before the run.

    Attributes:
        host: its node's name.
        problem: why it cannot train, in one line, or "".
        may_heal: whether another start may be without that problem.
        same: what must be the same on every rank, by name.
        code: digest of each of the project's files, relative to the checkout.
        free_bytes: room where the run folder and the cache are.
        interface: that collectives take, "" on one host.
    """

    host: str
    problem: str = ""
    same: Mapping[str, str] = dataclasses.field(default_factory=dict)
    code: Mapping[str, str] = dataclasses.field(default_factory=dict)
    free_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    interface: str = ""
    may_heal: bool = False

    def to_json(self) -> str:
        """As one line."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Facts:
        """What `to_json` wrote."""
        return Facts(**json.loads(text))


def verdict(facts: Sequence[Facts]) -> str:
    """What keeps the run from starting, in one line; "" where all ranks agree.

    Args:
        facts: of every rank, in their order.
    """
    hosts = [each.host for each in facts]
    problems: dict[str, list[int]] = {}
    for rank, each in enumerate(facts):
        if each.problem:
            problems.setdefault(each.problem, []).append(rank)
    found = [
        problem if len(ranks) == len(facts) else f"{name_ranks(hosts, ranks)}: {problem}"
        for problem, ranks in problems.items()
    ]
    names = dict.fromkeys(name for each in facts for name in each.same)
    found += [line for name in names if (line := _difference(name, facts))]
    return "; ".join(found)


def heals(facts: Sequence[Facts]) -> bool:
    """Whether nothing keeps the run from starting but what another start may be without."""
    return not verdict([dataclasses.replace(f, problem="") if f.may_heal else f for f in facts])


def _difference(name: str, facts: Sequence[Facts]) -> str:
    values = {rank: each.same[name] for rank, each in enumerate(facts) if name in each.same}
    # Of values that equally many ranks have, the lowest rank's.
    usual = Counter(values.values()).most_common(1)[0][0]
    if all(value == usual for value in values.values()):
        return ""
    hosts = [each.host for each in facts]
    others: dict[str, list[int]] = {}
    for rank, value in values.items():
        if value != usual:
            others.setdefault(value, []).append(rank)
    standard = [rank for rank, value in values.items() if value == usual]
    parts = []
    for value, ranks in others.items():
        where = _where(name, facts[ranks[0]], facts[standard[0]])
        parts.append(f"{_owners(hosts, ranks)} {_shown(value)}{where}")
    parts.append(f"{_owners(hosts, standard)} {_shown(usual)}")
    return f"{name}: {', '.join(parts)}; {_remedy(name)}"


def _owners(hosts: Sequence[str], ranks: Sequence[int]) -> str:
    several = len({hosts[rank] for rank in ranks}) > 1
    return f"{name_ranks(hosts, ranks)} {'have' if several else 'has'}"


def _shown(value: str) -> str:
    """A digest by its beginning, anything else as it is unless it is long."""
    is_digest = len(value) == 64 and all(digit in "0123456789abcdef" for digit in value)
    return value[:12] if is_digest else value if len(value) <= 60 else f"{value[:57]}…"


def _where(name: str, one: Facts, usual: Facts) -> str:
    """Files of the code that differ."""
    if name != "code":
        return ""
    files = sorted(
        file for file in {*one.code, *usual.code} if one.code.get(file) != usual.code.get(file)
    )
    more = f" and {len(files) - _SHOWN_FILES} more" if len(files) > _SHOWN_FILES else ""
    return f" (other {', '.join(files[:_SHOWN_FILES])}{more})"


def _remedy(name: str) -> str:
    if name in ("data", "flan", "tokenizer"):
        return "bring the same folder to every node"
    if name == "code":
        return "bring the same checkout to every node"
    if name == "finished":
        return "give a run_dir on a file system that all nodes share"
    if name == "ds_config" or name.startswith("run."):
        return "give every node the same files and flags"
    return "install the same on every node"


def name_ranks(hosts: Sequence[str], ranks: Iterable[int]) -> str:
    """Nodes with their ranks, such as "n0 (ranks 0-3), n1 (rank 4)".

    Args:
        hosts: name of every rank's node.
        ranks: those to be named.
    """
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(hosts[rank], []).append(rank)
    named = [f"{host} ({spans(held)})" for host, held in by_host.items()]
    if len(named) > _SHOWN_NODES:
        named = [*named[:_SHOWN_NODES], f"and {len(named) - _SHOWN_NODES} more nodes"]
    return ", ".join(named)


def spans(ranks: Sequence[int]) -> str:
    """Sorted ranks as "rank 3" or "ranks 0-2, 5"."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in found)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def clock_problem(hosts: Sequence[str], offsets: Sequence[float]) -> str:
    """Which clocks are too far from rank 0's, in one line; "" where none is.

    Args:
        hosts: name of every rank's node.
        offsets: seconds by which every rank's clock is ahead of rank 0's.
    """
    with_rank_0 = sum(abs(offset) <= MAX_CLOCK_SKEW for offset in offsets)
    # Where most clocks differ from rank 0's, it is rank 0's that is wrong.
    middle = 0.0 if 2 * with_rank_0 >= len(offsets) else sorted(offsets)[len(offsets) // 2]
    wrong = [rank for rank, offset in enumerate(offsets) if abs(offset - middle) > MAX_CLOCK_SKEW]
    if not wrong:
        return ""
    worst = max(wrong, key=lambda rank: abs(offsets[rank] - middle))
    return (
        f"clock: {name_ranks(hosts, wrong)} is {offsets[worst] - middle:+.1f} s from the others' "
        f"(at most {MAX_CLOCK_SKEW:g} s); set it, as NTP or chrony do"
    )
