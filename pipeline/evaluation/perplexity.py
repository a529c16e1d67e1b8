"""Held-out loss on the same target tokens for every architecture.

An evaluation set fixes which tokens are scored: for blocks of T tokens the targets x[k:] after the
split, for instruction pairs the targets. `loss` is nats per such token, `bits_per_byte` the same
nats over the UTF-8 bytes the tokens stand for, `unigram_entropy` the entropy of exactly those
tokens' frequencies: what a model that knew only frequencies could reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from models.batch import Batch
from pipeline import objectives
from pipeline.callbacks.base import StopRun
from pipeline.config import RunConfig
from pipeline.data.flan import FlanStore
from pipeline.data.sequences import SequenceStore
from pipeline.data.validation import stream_sequences
from pipeline.denoising import Denoising
from pipeline.distributed import World, sum_over_ranks

PREFIX_OBJECTIVES = ("prefix", "random_prefix")


BATCHES_BETWEEN_STOPS = 4


@dataclass(frozen=True)
class EvalSet:
    """This rank's share of an evaluation set, and the whole set's measures.

    Every rank holds equally many batches: ZeRO-3 gathers parameters together.
    """

    name: str
    batches: list[Batch]
    target_tokens: int
    target_bytes: int
    unigram_entropy: float


@dataclass(frozen=True)
class EvalResult:
    """The outcome of one evaluation."""

    eval_set: str
    loss: float
    eval_tokens: int
    bits_per_byte: float
    unigram_entropy: float


def block_set(
    name: str,
    store: SequenceStore,
    config: RunConfig,
    byte_lengths: np.ndarray,
    world: World,
    *,
    bos: int,
    pad: int,
    denoising: Denoising | None = None,
) -> EvalSet:
    """Held-out blocks of T tokens, scored on x[split:].

    Always the same targets; a prefix model sees its prefix as it was trained to, and a denoiser is
    asked for them as for a last span.
    """
    rows = store.evaluation_choice(config.eval_sequences)
    mine, real = _share(len(rows), world)
    samples = stream_sequences(store, [rows[index] for index in mine])
    if denoising is not None:
        whole = objectives.asked_after_split(
            samples, config.arch, config.split, denoising, bos=bos, pad=pad
        )
        return _finish(name, [whole], real, config.eval_micro_batch, byte_lengths, world)
    ids = torch.from_numpy(np.stack([ids for ids, _ in samples]).astype(np.int64))
    valid = torch.tensor([length for _, length in samples])
    objective = "prefix" if config.resolved_objective in PREFIX_OBJECTIVES else "matched"
    eod = store.manifest.tokenizer.special_ids["eod"] if config.document_masks else None
    whole = objectives.build(objective, config.arch, ids, valid, bos, config.split, eod=eod)
    return _finish(name, [whole], real, config.eval_micro_batch, byte_lengths, world)


def instruction_set(
    name: str,
    store: FlanStore,
    config: RunConfig,
    byte_lengths: np.ndarray,
    world: World,
    *,
    bos: int,
    pad: int,
) -> EvalSet:
    """Held-out instruction pairs, scored on their targets."""
    chosen = store.evaluation_choice(config.eval_sequences)
    mine, real = _share(len(chosen), world)
    pairs = [store.read(chosen[index])[:2] for index in mine]
    size = config.eval_micro_batch
    batches = [
        objectives.instruction(
            pairs[start : start + size],
            config.arch,
            bos=bos,
            pad=pad,
            bidirectional=config.bidirectional_inputs,
        )
        for start in range(0, len(pairs), size)
    ]
    return _finish(name, batches, real, size, byte_lengths, world)


def _share(count: int, world: World) -> tuple[list[int], int]:
    """This rank's rows, filled up to equally many on every rank, and how many of them are real."""
    mine = list(range(world.rank, count, world.size))
    each = math.ceil(count / world.size)
    return mine + [0] * (each - len(mine)), len(mine)


def _finish(
    name: str,
    batches: Sequence[Batch],
    real: int,
    size: int,
    byte_lengths: np.ndarray,
    world: World,
) -> EvalSet:
    """Unscore the rows that only fill up, cut to `size`, and measure the targets of all ranks."""
    cut: list[Batch] = []
    seen = 0
    for batch in batches:
        rows = torch.arange(len(batch.targets)) + seen < real
        seen += len(batch.targets)
        masked = replace(batch, loss_mask=batch.loss_mask & rows[:, None])
        cut += [masked.rows(start, start + size) for start in range(0, len(batch.targets), size)]
    counts = torch.zeros(len(byte_lengths), dtype=torch.int64)
    for batch in cut:
        counts += torch.bincount(batch.targets[batch.loss_mask], minlength=len(byte_lengths))
    counts = sum_over_ranks(counts.to(world.device)).cpu()
    total = int(counts.sum())
    share = counts[counts > 0].double() / max(1, total)
    return EvalSet(
        name=name,
        batches=cut,
        target_tokens=total,
        target_bytes=int((counts * torch.from_numpy(byte_lengths.astype(np.int64))).sum()),
        unigram_entropy=float(-(share * share.log()).sum()),
    )


def evaluate(
    model: nn.Module,
    evalset: EvalSet,
    world: World,
    stop_agreed: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """The loss of `model` on `evalset`; every rank calls it and gets the same result.

    Raises StopRun where `stop_agreed`, which is asked now and then on every rank, says so.
    """
    training = model.training
    model.eval()
    nll = torch.zeros((), dtype=torch.float64, device=world.device)
    with torch.no_grad():
        for number, batch in enumerate(evalset.batches):
            if number % BATCHES_BETWEEN_STOPS == 0 and stop_agreed():
                model.train(training)
                raise StopRun
            nll += model.token_nll(batch.to(world.device)).double().sum()  # type: ignore[operator]
    model.train(training)
    total = float(sum_over_ranks(nll))
    return EvalResult(
        eval_set=evalset.name,
        loss=total / max(1, evalset.target_tokens),
        eval_tokens=evalset.target_tokens,
        bits_per_byte=total / math.log(2) / max(1, evalset.target_bytes),
        unigram_entropy=evalset.unigram_entropy,
    )
