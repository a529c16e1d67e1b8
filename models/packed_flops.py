"""Training FLOPs of rows that documents are packed into, each in its own way; without torch.

The table of operations is affine in the pairs that masks hide (`HiddenPairs`), the same in every
row but for these. So it is summed once for a row that hides nothing and once for each kind of pair,
and a batch costs its own sums of pairs: exact, and no table for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from models.config import ModelConfig
from models.flops import Flops, pass_flops
from models.operations import HiddenPairs, Pass

# Many at once, whose FLOPs a float tells apart from a long row's; a power of 2 divides exactly.
UNIT = 1 << 20


def packed_flops(config: ModelConfig, step: Pass) -> Callable[[int, HiddenPairs], Flops]:
    """A function: number of rows, pairs hidden in all of them together → their training FLOPs.

    Args:
        step: the lengths of every row; its documents do not count.

    Raises:
        ValueError: lengths that the architecture cannot have.
    """

    def of_row(hidden: HiddenPairs) -> Flops:
        return pass_flops(config, replace(step, documents=(), source_documents=(), hidden=hidden))

    kinds = [field.name for field in fields(HiddenPairs)]
    nothing = of_row(HiddenPairs())
    # What so many pairs of a kind take off.
    unit = {kind: of_row(HiddenPairs(**{kind: UNIT})) + nothing * -1 for kind in kinds}

    def of_rows(rows: int, hidden: HiddenPairs) -> Flops:
        total = nothing * rows
        for kind in kinds:
            total += unit[kind] * (getattr(hidden, kind) / UNIT)
        return total

    return of_rows
