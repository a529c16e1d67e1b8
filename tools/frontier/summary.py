"""The closing table: what each run reached, and at what cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tools.frontier.points import Point, final_points, points_of
from tools.frontier.run_folder import Run

LONGEST_NAME = 40


@dataclass(frozen=True)
class FinalRow:
    """A run at its last evaluation; None where the table it came from does not say."""

    arch: str
    run: str
    stage: str  # "pretrain" or "finetune"
    params: float
    params_non_embedding: float | None
    tokens: float
    flops: float  # model_causal
    loss: float  # held-out nats per matched target token
    bits_per_byte: float | None
    unigram_entropy: float | None  # nats, of exactly the scored tokens

    @property
    def margin(self) -> float | None:
        """Nats by which the loss is below the unigram entropy: what context has taught."""
        return None if self.unigram_entropy is None else self.unigram_entropy - self.loss


def final_rows(runs: Iterable[Run], eval_set: str = "validation") -> list[FinalRow]:
    """One row for each run that was measured on `eval_set`, pretraining first, then by size."""
    rows = []
    for stage in ("pretrain", "finetune"):
        points = points_of(run for run in runs if run.stage == stage)
        rows += rows_of([p for p in points if p.eval_set == eval_set], stage)
    return rows


def rows_of(points: Iterable[Point], stage: str = "pretrain") -> list[FinalRow]:
    """One row for each run of `points`, by architecture and size."""
    finals = sorted(final_points(points), key=lambda p: (p.arch, p.params, p.tokens, p.run))
    return [
        FinalRow(
            arch=point.arch,
            run=point.run,
            stage=stage,
            params=point.params,
            params_non_embedding=point.params_non_embedding,
            tokens=point.tokens,
            flops=point.flops,
            loss=point.loss,
            bits_per_byte=point.bits_per_byte,
            unigram_entropy=point.unigram_entropy,
        )
        for point in finals
    ]


def text_table(rows: Sequence[FinalRow]) -> str:
    """`rows` for a terminal, columns aligned; finetuned runs are marked."""
    header = (
        "architecture",
        "run",
        "parameters",
        "tokens",
        "FLOPs",
        "held-out loss",
        "bits/byte",
        "unigram entropy",
        "margin",
    )
    cells = [header]
    for row in rows:
        name = row.run if len(row.run) <= LONGEST_NAME else row.run[: LONGEST_NAME - 1] + "…"
        name += "" if row.stage == "pretrain" else f" [{row.stage}]"
        cells.append(
            (
                row.arch,
                name,
                f"{row.params:,.0f}",
                f"{row.tokens:,.0f}",
                f"{row.flops:.3e}",
                f"{row.loss:.4f}",
                _decimals(row.bits_per_byte),
                _decimals(row.unigram_entropy),
                _decimals(row.margin),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _decimals(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"
