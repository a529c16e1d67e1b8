"""Which samples a run sees at each position, from its configuration alone; imports no torch.

Training reads batches through this, and `isoflop verify` proves afterwards, without a model, that a
ledger holds the hashes of exactly these samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from pipeline.config import RunConfig
from pipeline.data.flan import FlanStore
from pipeline.data.loader import TrainingOrder
from pipeline.data.manifest import Manifest
from pipeline.data.order import Permutation, derive_key
from pipeline.data.sequences import SequenceStore
from pipeline.options import UserError

_NATURAL_ORDER = 2  # 1 was of weights in units of 1/65536, which repeated small sources


def order_version(config: RunConfig, manifest: Manifest) -> int | None:
    """Tells the run's order from those that other versions make of the same settings.

    None where all versions make the same: of given weights, one source, or instruction rows.
    """
    if config.weights or config.flan is not None or len(manifest.sources("train")) < 2:
        return None
    return _NATURAL_ORDER


def refuse_other_order(known: int | None, version: int | None, owner: str) -> None:
    """Raise UserError where `owner` reads its sources in an order that this version cannot make."""
    if known != version:
        raise UserError(
            f"weights={{}}: {owner} reads natural proportions in order {known or 1}, this version "
            f"makes order {version}; go on with the version that began it, or start another run_dir"
        )


def pretraining_order(config: RunConfig) -> TrainingOrder:
    """The order of a pretraining run's sequences. Raises UserError."""
    return TrainingOrder(
        SequenceStore(config.data_folder, "train", config.seq_len),
        seed=config.seed,
        shuffle_window="all" if config.shuffle_window == "all" else int(config.shuffle_window),
        weights=config.weights or None,
        weight_stages={int(begin): stage for begin, stage in config.weight_stages.items()},
    )


@dataclass(frozen=True)
class InstructionRow:
    """One row at its place: its number in the store, and the ids of both sides."""

    number: int
    inputs: np.ndarray
    targets: np.ndarray


class InstructionOrder:
    """Instruction rows, each once an epoch, shuffled anew in each."""

    def __init__(self, store: FlanStore, seed: int) -> None:
        self.store = store
        self.seed = seed

    def rows(self, start: int, count: int) -> list[InstructionRow]:
        """Rows at positions [start, start + count). Raises CorruptShardError."""
        places = np.arange(start, start + count)
        epochs, numbers = np.divmod(places, len(self.store))
        for epoch in np.unique(epochs).tolist():
            shuffle = Permutation(len(self.store), derive_key(self.seed, epoch))
            numbers[epochs == epoch] = shuffle(numbers[epochs == epoch])
        return [InstructionRow(n, *self.store.read(n)[:2]) for n in numbers.tolist()]


def sample_hash(number: int, ids: np.ndarray) -> int:
    """xxh3 of one sample: its number (8 bytes, little-endian) and its ids as uint32."""
    digest = xxhash.xxh3_64(number.to_bytes(8, "little"))
    digest.update(np.ascontiguousarray(ids, dtype="<u4").data)
    return digest.intdigest()


def sequences_hash(numbers: np.ndarray, ids: np.ndarray) -> int:
    """The sum modulo 2^64 of the hashes of sequences: the same in any order and for any cut.

    Args:
        numbers: of the samples, int64 [n].
        ids: [n, seq_len].
    """
    rows = np.ascontiguousarray(ids, dtype="<u4")
    return sum(map(sample_hash, numbers.tolist(), rows)) % 2**64


def rows_hash(rows: Iterable[InstructionRow]) -> int:
    """The same of instruction rows: the ids are the inputs' and then the targets'."""
    joined = (sample_hash(row.number, np.concatenate([row.inputs, row.targets])) for row in rows)
    return sum(joined) % 2**64


def batch_hash(order: TrainingOrder | InstructionOrder, start: int, count: int) -> int:
    """The hash of the samples at positions [start, start + count), as the ledger holds it.

    Raises CorruptShardError.
    """
    if isinstance(order, InstructionOrder):
        return rows_hash(order.rows(start, count))
    batch = order.batch(start, count)
    return sequences_hash(batch.sample_numbers, batch.ids)
