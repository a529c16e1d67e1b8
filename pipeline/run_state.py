"""What a run goes on from, beside tensors: counted in training, kept in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.guards.positions import Positions
from pipeline.guards.spikes import Spikes


@dataclass
class Totals:
    """Counts since the start of the run, those of its parent included."""

    loss_tokens: int = 0
    processed_tokens: int = 0
    flops_6n: float = 0
    flops_model_causal: float = 0
    flops_model_full: float = 0
    flops_hardware: float = 0
    skipped_steps: int = 0

    def add(self, loss_tokens: int, processed_tokens: int, flops: Sequence[float]) -> None:
        """Count one step; `flops` in the order of the fields."""
        self.loss_tokens += loss_tokens
        self.processed_tokens += processed_tokens
        self.flops_6n += flops[0]
        self.flops_model_causal += flops[1]
        self.flops_model_full += flops[2]
        self.flops_hardware += flops[3]

    def as_record(self) -> dict[str, float]:
        """The counts under the names that the run folder uses."""
        return asdict(self)


@dataclass
class RunState:
    """Where a run is.

    Attributes:
        step: optimizer steps made, skipped ones included.
        totals: counts up to there.
        skipped_in_a_row: how many of the last steps were skipped.
        positions: which batch each step trains on.
        spikes: the losses that the next one is held against.
    """

    step: int
    totals: Totals
    skipped_in_a_row: int
    positions: Positions
    spikes: Spikes

    @classmethod
    def of(cls, config: RunConfig, record: Mapping[str, Any] | None = None) -> RunState:
        """The state that `as_record` gave, or that of a run's start."""
        record = record or {}
        window = config.spike_window if config.loss_spikes != "off" else 0
        return cls(
            step=record.get("step", 0),
            totals=Totals(**record.get("totals", {})),
            skipped_in_a_row=record.get("skipped_in_a_row", 0),
            positions=Positions(config.global_batch, frozenset(record.get("discarded", ()))),
            spikes=Spikes(window, config.spike_threshold, record.get("losses", ())),
        )

    def as_record(self) -> dict[str, Any]:
        """What state.json holds of it."""
        return {
            "step": self.step,
            "totals": self.totals.as_record(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "discarded": sorted(self.positions.discarded),
            "losses": list(self.spikes.losses),
        }
