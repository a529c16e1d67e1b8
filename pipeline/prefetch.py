"""The next step's batches made while this step trains."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from pipeline.sources import Share, Source


class Prefetched:
    """A source whose next share is made in a thread of its own.

    A share is a pure function of (step, rank, ranks), so it is the same whenever it is made. What
    goes wrong in the thread is raised where its share is asked for, and only there.

    Args:
        source: makes the shares.
        steps: of the run; nothing is made beyond the last.
        pinned: copy batches to page-locked memory, from which a GPU copies while it computes.
    """

    def __init__(self, source: Source, steps: int, *, pinned: bool) -> None:
        self._source = source
        self.names = source.names
        self._steps = steps
        self._pinned = pinned
        self._next: _Making | None = None

    def epochs(self, step: int) -> dict[str, float]:
        """See `Source`."""
        return self._source.epochs(step)

    def share(self, step: int, rank: int, world_size: int) -> Share:
        """See `Source`."""
        asked = (step, rank, world_size)
        making, self._next = self._next, None
        if making is not None and making.asked == asked:
            share = making.wait()
        else:
            if making is not None:
                # Two threads in one order would each spoil what the other has prepared.
                making.thread.join()
            share = self._make(asked)
        if step + 1 < self._steps:
            self._next = _Making(self, (step + 1, rank, world_size))
        return share

    def close(self, patience: float | None = 10.0) -> None:
        """Wait for the thread, if there is one; what it made is dropped.

        No longer than `patience` seconds, as it may hang at a slow disk or a broken connection;
        None waits until it has ended. A share that is asked for later is made as the first was.
        """
        making, self._next = self._next, None
        if making is not None:
            making.thread.join(patience)

    def _make(self, asked: tuple[int, int, int]) -> Share:
        share = self._source.share(*asked)
        if not self._pinned:
            return share
        return replace(share, micro_batches=[batch.pin_memory() for batch in share.micro_batches])


class _Making:
    """One share under way."""

    def __init__(self, owner: Prefetched, asked: tuple[int, int, int]) -> None:
        self.asked = asked
        self._owner = owner
        self._share: Share | None = None
        self._error: BaseException | None = None
        # A daemon: what `close` did not wait for does not keep the run from ending.
        self.thread = threading.Thread(target=self._run, name=f"batches of {asked[0]}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            # The generator of the main thread's dropout is this thread's too: nothing may draw.
            with torch.no_grad():
                self._share = self._owner._make(self.asked)
        except BaseException as error:
            self._error = error

    def wait(self) -> Share:
        self.thread.join()
        if self._error is not None:
            raise self._error
        assert self._share is not None
        return self._share
