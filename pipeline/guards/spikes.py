"""Loss spikes, by a score that the spikes themselves do not move."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

# The median absolute deviation of a normal distribution is this share of its standard deviation.
MAD_OF_NORMAL = 0.6744897501960817
# Losses that hardly differ, as those of a tiny model on few samples, make no spike of a ripple.
LEAST_SPREAD = 1e-3  # of the median


def score(losses: Sequence[float], loss: float) -> float:
    """How far `loss` lies above the median of `losses`, in robust standard deviations."""
    middle = median(losses)
    spread = median(abs(each - middle) for each in losses) / MAD_OF_NORMAL
    return (loss - middle) / max(spread, LEAST_SPREAD * abs(middle), 1e-12)


class Spikes:
    """The losses of the last applied steps, and whether a new one is out of line.

    It says nothing before it has seen `window` losses. Where `window` is 0 it keeps none.
    """

    def __init__(self, window: int, threshold: float, losses: Iterable[float] = ()) -> None:
        self._window = window
        self._threshold = threshold
        self.losses: deque[float] = deque(losses, maxlen=window)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` scores above the threshold; one that is no number is no spike."""
        is_ready = self._window > 0 and len(self.losses) == self._window
        return is_ready and score(self.losses, loss) > self._threshold

    def describe(self, loss: float) -> str:
        """The score in words."""
        return (
            f"its loss {loss:.4f} lies {score(self.losses, loss):.1f} robust deviations above the "
            f"median {median(self.losses):.4f} of the last {self._window} steps"
        )

    def add(self, loss: float) -> None:
        """Remember the loss of a step that was applied."""
        self.losses.append(loss)
