"""Which documents of a task are left out by the user's choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.corpus_decontaminate import contamination_of
from tools.corpus_dedup import REASONS, exact_path, read_drops
from tools.corpus_minhash import near_path
from tools.corpus_plan import Settings
from tools.corpus_rows import Document

# All others are defects, and count for --max_reject_rate.
CHOSEN = frozenset({"too short", "too long", "contaminated", *REASONS.values()})


def filter_of(task: int, settings: Settings, output: Path) -> Callable[[Document, int], str | None]:
    """A function of a task's document and its number that tells why it is left out, or None.

    Raises:
        UserError: what an earlier pass left is damaged.
    """
    drops = None
    if settings.dedup != "none":
        path = exact_path(output) if settings.dedup == "exact" else near_path(output)
        drops = read_drops(path, task)
    contamination = None
    if settings.decontaminate:
        contamination = contamination_of(output, settings.decontaminate)

    def reason(document: Document, number: int) -> str | None:
        if drops is not None and drops[number]:
            return REASONS[int(drops[number])]
        if contamination is not None and contamination.holds(document.data):
            return "contaminated"
        return None

    return reason
