"""What training on a sample costs: blocks of T tokens, with and without documents, and pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch

from models.batch import Batch
from models.config import ModelConfig
from models.flops import Flops, pass_flops, training_flops
from models.masks import PADDING, run_numbers
from models.operations import HiddenPairs, Pass
from models.packed_flops import packed_flops
from models.registry import architecture
from pipeline.config import RunConfig


class BlockFlops:
    """Training FLOPs of micro-batches whose rows are blocks of T tokens.

    A row counts as one of T tokens, padding included; under `document_masks`, as one with its own
    documents, of which padding of a source is one.
    """

    def __init__(self, config: RunConfig, model: ModelConfig) -> None:
        step = block_pass(config)
        self._has_documents = config.document_masks
        self._row = pass_flops(model, step)
        self._packed = packed_flops(model, step) if config.document_masks else None

    def of(self, micro_batches: Sequence[Batch]) -> Flops:
        """Their sum."""
        rows = sum(len(batch.targets) for batch in micro_batches)
        if self._packed is None:
            return self._row * rows
        return self._packed(rows, sum(map(hidden_pairs, micro_batches), HiddenPairs()))


def block_pass(config: RunConfig) -> Pass:
    """The lengths of one sample of T tokens under the run's objective."""
    length, split = config.seq_len, config.split
    if architecture(config.arch).encodes_prefix:
        return Pass(tokens=length - split, scored=length - split, source=split)
    if config.resolved_objective == "prefix":
        # [BOS] and x[:split] see each other; logits exist for x[split:] alone.
        return Pass(tokens=length, scored=length - split, prefix=min(split + 1, length))
    return Pass(tokens=length, scored=length)


def hidden_pairs(batch: Batch) -> HiddenPairs:
    """What the masks of a batch with documents hide, all rows together.

    Documents are numbered upwards, from the source on into the targets, as `pipeline.objectives`
    numbers them: a row's source and targets share at most the source's last one.
    """
    documents = batch.document_ids
    assert documents is not None
    rows, length = documents.shape
    inside = _squares(documents)
    prefix, skipped = 0, 0
    if batch.prefix_lengths is None:
        skipped = rows * length**2 - inside
    else:
        before = torch.arange(length) < batch.prefix_lengths.unsqueeze(1)
        prefix = _squares(documents, before)
    own = rows * length**2 - (inside + prefix) / 2
    source = batch.encoder_document_ids
    if source is None:
        return HiddenPairs(own=own, skipped=skipped)
    if batch.encoder_mask is not None:
        source = source.masked_fill(~batch.encoder_mask, PADDING)
    size = source.shape[1]
    last = source.amax(1, keepdim=True)
    shared = int(((documents == last).sum(1) * (source == last).sum(1)).sum())
    return HiddenPairs(
        own=own,
        skipped=skipped,
        source_skipped=rows * size**2 - _squares(source),
        crossed=rows * length * size - shared,
    )


def _squares(documents: torch.Tensor, counted: torch.Tensor | None = None) -> int:
    """Σ n² over the documents of all rows of `documents` [batch, seq], n being a document's
    positions, or those of them where `counted` [batch, seq] is true."""
    rows, length = documents.shape
    numbers = run_numbers(documents) + torch.arange(rows).unsqueeze(1) * (length + 1)
    lengths = torch.bincount(numbers.flatten() if counted is None else numbers[counted])
    return int(lengths.square().sum())


def pairs_flops(
    model: ModelConfig, pairs: Iterable[tuple[np.ndarray, np.ndarray]], *, bidirectional: bool
) -> Flops:
    """Training FLOPs of pairs of inputs and targets, padding left out."""
    none = Flops(six_n=0.0, model_causal=0.0, model_full=0.0, hardware=0.0)
    parts = (
        pair_flops(model, len(inputs), len(targets), bidirectional) for inputs, targets in pairs
    )
    return sum(parts, none)


@lru_cache(maxsize=65_536)
def pair_flops(model: ModelConfig, source_len: int, target_len: int, bidirectional: bool) -> Flops:
    """Training FLOPs of one pair of inputs and targets without padding: the same for every cut."""
    if architecture(model.arch).encodes_prefix:
        return training_flops(model, seq_len=target_len, source_len=source_len)
    length = source_len + target_len
    seen = min(source_len + 1, length) if bidirectional else None
    return training_flops(model, seq_len=length, scored=target_len, prefix_len=seen)
