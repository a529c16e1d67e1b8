"""What all ranks settle in one collective before each step, so that none of them goes on alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.callbacks.base import StopRun
from pipeline.distributed import World, sum_over_ranks
from pipeline.options import Fault, UserError
from pipeline.sources import EndOfData, Share


@dataclass(frozen=True)
class Counts:
    """Of one global batch, over all ranks."""

    target_tokens: int
    processed_tokens: int
    sample_hash: int


def settle(share: Share | Exception, *, stop: bool, world: World) -> Counts:
    """Whether all ranks have their batch and go on with it; a collective.

    Args:
        share: this rank's part of the global batch, or why it has none.
        stop: whether this rank was asked to stop.

    Raises:
        UserError: on every rank, where one could not read its part; names the rank.
        StopRun: on every rank, where one was asked to stop.
        EndOfData: on every rank, where one's source has ended.
    """
    has_failed = isinstance(share, Exception) and not isinstance(share, EndOfData)
    row = [0, 0, int(stop), int(isinstance(share, EndOfData)), int(has_failed), 0]
    if isinstance(share, Share):
        signed = share.sample_hash - 2**64 * (share.sample_hash >= 2**63)
        row = [share.target_tokens, share.processed_tokens, int(stop), 0, 0, signed]
    summed = sum_over_ranks(torch.tensor(row, dtype=torch.int64, device=world.device))
    targets, processed, stops, ends, failures, hashed = summed.tolist()
    if failures:
        raise _failure(share if has_failed else None, world)
    if stops:
        raise StopRun
    if ends:
        raise EndOfData(_gathered(str(share) if isinstance(share, EndOfData) else "", world))
    return Counts(targets, processed, hashed % 2**64)


def _failure(own: Share | Exception | None, world: World) -> Exception:
    """The same error on every rank: that of the first that failed."""
    kind = next((k for k in (UserError, OSError) if isinstance(own, k)), None)
    told = "" if own is None else f"rank {world.rank}: {str(own) or type(own).__name__}"
    text, known = _gathered(told, world), _gathered(kind.__name__ if kind else "", world)
    if isinstance(own, Exception) and kind is None:
        # Nobody thought of it: its own traceback says more.
        return own
    if known == UserError.__name__:
        return UserError(text)
    # A disk that did not answer may answer the next time.
    teller = 0 if known else int(text.partition(":")[0].split()[-1])
    return Fault(text, told_by=teller)


def _gathered(text: str, world: World) -> str:
    """The first rank's `text` that is not empty, on every rank."""
    texts = [""] * world.size
    dist.all_gather_object(texts, text)
    return next((each for each in texts if each), "")
