"""Where training batches come from: each rank's share of the global batch of any step.

Both sources are stateless: the share is a pure function of (step, rank, world size) and the run's
configuration, and the union over ranks is the same global batch for every world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from models.batch import Batch
from models.config import ModelConfig
from models.flops import Flops
from pipeline import objectives
from pipeline.config import RunConfig
from pipeline.config_checks import micro_batch_size
from pipeline.data.flan import FlanStore
from pipeline.data.loader import TrainingOrder
from pipeline.data.run_order import InstructionOrder, rows_hash, sequences_hash
from pipeline.denoising import Denoising
from pipeline.sample_flops import BlockFlops, pairs_flops


@dataclass(frozen=True)
class Share:
    """One rank's part of one global batch."""

    micro_batches: list[Batch]
    target_tokens: int
    processed_tokens: int
    flops: Flops
    sample_hash: int  # sum modulo 2**64 over the samples of xxh3(sample number ‖ ids)
    row_sources: Sequence[int] = ()  # the index in `Source.names` of each row, in order


class EndOfData(Exception):
    """A source has no further batch; the message says why."""


class Source(Protocol):
    """What the trainer asks for batches."""

    names: Sequence[str]  # the sources of which losses are told apart; none where it has one

    def share(self, step: int, rank: int, world_size: int) -> Share:
        """This rank's part of the global batch `step`, counted from 0.

        Raises EndOfData where there is none, and UserError where it cannot be read.
        """
        ...

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source has been gone through after `step` steps."""
        ...


def positions(step: int, global_batch: int, rank: int, world_size: int) -> range:
    """The places in the order that `rank` reads for `step`."""
    share = global_batch // world_size
    start = step * global_batch + rank * share
    return range(start, start + share)


class PretrainingSource:
    """Blocks of T tokens in the run's order, under the run's objective."""

    def __init__(
        self,
        config: RunConfig,
        model: ModelConfig,
        order: TrainingOrder,
        *,
        bos: int,
        pad: int,
        denoising: Denoising | None = None,
    ) -> None:
        """`denoising` is the mixture of the objective denoise."""
        self._config = config
        self._model = model
        self._order = order
        self._bos = bos
        self._flops = BlockFlops(config, model)
        self._pad = pad
        self._denoising = denoising
        self._eod = order.store.manifest.tokenizer.special_ids["eod"]
        self.names = order.store.sources
        counts = [order.store.num_sequences[name] for name in self.names]
        self._source_ends = np.cumsum(counts)

    def share(self, step: int, rank: int, world_size: int) -> Share:
        """See `Source`."""
        config = self._config
        places = positions(step, config.global_batch, rank, world_size)
        samples = self._order.batch(places.start, len(places), stride=config.global_batch)
        size = micro_batch_size(config, world_size)
        hashed = sequences_hash(samples.sample_numbers, samples.ids)
        # Sample numbers run through the sources one after the other.
        row_sources = np.searchsorted(
            self._source_ends, samples.sample_numbers, side="right"
        ).tolist()
        if config.resolved_objective in ("random_prefix", "denoise"):
            pairs = [
                self._pair(ids[:valid], place)
                for ids, valid, place in zip(
                    samples.ids, samples.valid.tolist(), places, strict=True
                )
            ]
            micro = pair_batches(
                pairs, config.arch, size, bos=self._bos, pad=self._pad, bidirectional=True
            )
            return Share(
                micro_batches=micro,
                target_tokens=sum(int(batch.loss_mask.sum()) for batch in micro),
                processed_tokens=sum(len(inputs) + len(targets) for inputs, targets in pairs),
                flops=pairs_flops(self._model, pairs, bidirectional=True),
                sample_hash=hashed,
                row_sources=row_sources,
            )
        ids = torch.from_numpy(samples.ids.astype(np.int64))
        valid = torch.from_numpy(samples.valid)
        micro = [
            objectives.build(
                config.resolved_objective,
                config.arch,
                ids[start : start + size],
                valid[start : start + size],
                self._bos,
                config.split,
                eod=self._eod if config.document_masks else None,
            )
            for start in range(0, len(ids), size)
        ]
        return Share(
            micro_batches=micro,
            target_tokens=sum(int(batch.loss_mask.sum()) for batch in micro),
            processed_tokens=int(valid.sum()),
            flops=self._flops.of(micro),
            sample_hash=hashed,
            row_sources=row_sources,
        )

    def epochs(self, step: int) -> dict[str, float]:
        """See `Source`."""
        return self._order.epochs(step * self._config.global_batch)

    def _pair(self, ids: np.ndarray, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of one sample without its padding, as the objective cuts it."""
        if self._denoising is not None:
            return self._denoising.pair(ids, place)
        split = objectives.random_split(len(ids), self._config.seed, place)
        return ids[:split], ids[split:]


class InstructionSource:
    """Instruction pairs, one per row and never packed, shuffled anew each epoch."""

    names: Sequence[str] = ()

    def __init__(
        self, config: RunConfig, model: ModelConfig, store: FlanStore, *, bos: int, pad: int
    ) -> None:
        self._config = config
        self._model = model
        self._order = InstructionOrder(store, config.seed)
        self._bos = bos
        self._pad = pad

    def share(self, step: int, rank: int, world_size: int) -> Share:
        """See `Source`."""
        config = self._config
        places = positions(step, config.global_batch, rank, world_size)
        rows = self._order.rows(places.start, len(places))
        pairs = [(row.inputs, row.targets) for row in rows]
        width = micro_batch_size(config, world_size)
        micro = pair_batches(
            pairs,
            config.arch,
            width,
            bos=self._bos,
            pad=self._pad,
            bidirectional=config.bidirectional_inputs,
        )
        return Share(
            micro_batches=micro,
            target_tokens=sum(int(batch.loss_mask.sum()) for batch in micro),
            processed_tokens=sum(len(inputs) + len(targets) for inputs, targets in pairs),
            flops=pairs_flops(self._model, pairs, bidirectional=config.bidirectional_inputs),
            sample_hash=rows_hash(rows),
        )

    def epochs(self, step: int) -> dict[str, float]:
        """See `Source`."""
        return {"flan": step * self._config.global_batch / len(self._order.store)}


def pair_batches(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    arch: str,
    size: int,
    *,
    bos: int,
    pad: int,
    bidirectional: bool,
) -> list[Batch]:
    """Micro-batches of `size` pairs of inputs and targets."""
    return [
        objectives.instruction(
            pairs[start : start + size], arch, bos=bos, pad=pad, bidirectional=bidirectional
        )
        for start in range(0, len(pairs), size)
    ]
