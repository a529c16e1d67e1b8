"""The order of samples as a pure function of (seed, epoch, position): nothing to store or replay.

A keyed Feistel network is a permutation of [0, 2^bits); walking along its cycle until the value
falls below n makes it one of [0, n) (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002, §3). It is good shuffling, not cryptography.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

ShuffleWindow = int | Literal["all"]
_ROUNDS = 6  # even, so that halves of unequal width end where they began
_MASK64 = (1 << 64) - 1


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): 64 bits to 64 bits, one to one."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """One 64-bit key from several numbers."""
    key = 0x9E3779B97F4A7C15
    for part in parts:
        key = _mix((key + (part & _MASK64) * 0x9E3779B97F4A7C15 + 1) & _MASK64)
    return key


class Permutation:
    """A keyed permutation of range(n).

    Args:
        n: size, from 1 to 2^62.
        key: any 64-bit number; other keys give other permutations.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"n={n}: a permutation has from 1 to 2^62 elements")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._right_bits = np.uint64(bits // 2)
        self._left_bits = np.uint64(bits - bits // 2)
        self._round_keys = [np.uint64(derive_key(key, index)) for index in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Images of `positions` (int64, each in [0, n)), same shape, int64."""
        values = np.asarray(positions).astype(np.uint64)
        values = self._encipher(values)
        outside = values >= np.uint64(self.n)
        while outside.any():
            values[outside] = self._encipher(values[outside])
            outside = values >= np.uint64(self.n)
        return values.astype(np.int64)

    def _encipher(self, values: np.ndarray) -> np.ndarray:
        one = np.uint64(1)
        left_bits, right_bits = self._left_bits, self._right_bits
        left = values >> right_bits
        right = values & ((one << right_bits) - one)
        for key in self._round_keys:
            # (L, R) becomes (R, L xor F(R)): the halves trade places, and so do their widths.
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            mixed ^= mixed >> np.uint64(32)
            left, right = right, left ^ (mixed & ((one << left_bits) - one))
            left_bits, right_bits = right_bits, left_bits
        return (left << right_bits) | right


class WindowedOrder:
    """Visits every sample of one source exactly once an epoch, window by window.

    Shards are permuted; runs of `window` consecutive shards of that permutation form a window;
    samples are permuted inside it. "all" is one window over everything: a uniform order.

    Args:
        shard_samples: number of samples of each shard, [shards].
        seed: keys the order; a source's own number should be mixed into it.
        window: shards a window, or "all".
    """

    def __init__(
        self, shard_samples: Sequence[int] | np.ndarray, seed: int, window: ShuffleWindow
    ) -> None:
        if window != "all" and window < 1:
            raise ValueError(f"shuffle_window={window}: give a number of shards, or all")
        self._samples = np.asarray(shard_samples, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._samples)])
        self._seed = seed
        self._window: ShuffleWindow = window
        self._epoch = -1
        self._whole: Permutation | None = None
        self._shards = self._shard_ends = self._window_ends = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Samples an epoch."""
        return int(self._starts[-1])

    def locate(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample index (counted over all shards in their own order) at each position of `epoch`.

        `positions` is int64 with values in [0, len(self)); the result has its shape.
        """
        positions = np.asarray(positions, np.int64)
        self._prepare(epoch)
        if self._whole is not None:
            return self._whole(positions)
        located = np.empty_like(positions)
        windows = np.searchsorted(self._window_ends, positions, side="right")
        for window in sorted(set(windows.tolist())):
            chosen = windows == window
            begin = 0 if window == 0 else int(self._window_ends[window - 1])
            size = int(self._window_ends[window]) - begin
            inside = Permutation(size, derive_key(self._seed, epoch, window + 1))
            located[chosen] = begin + inside(positions[chosen] - begin)
        # From the permuted sequence of shards back to the samples' own numbers.
        rank = np.searchsorted(self._shard_ends, located, side="right")
        shard = self._shards[rank]
        return self._starts[shard] + located - (self._shard_ends[rank] - self._samples[shard])

    def shards_ahead(self, epoch: int, position: int) -> list[int]:
        """Shards of the window that holds `position`, then those of the next one."""
        count = len(self._samples)
        if self._window == "all":
            return list(range(count))
        self._prepare(epoch)
        begin = int(np.searchsorted(self._window_ends, position, side="right")) * self._window
        ahead = self._shards[begin : begin + 2 * self._window].tolist()
        if begin + self._window >= count:
            key = derive_key(self._seed, epoch + 1, 0)
            ahead += Permutation(count, key)(np.arange(min(self._window, count))).tolist()
        return list(dict.fromkeys(ahead))

    def _prepare(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._epoch = epoch
        if self._window == "all":
            self._whole = Permutation(len(self), derive_key(self._seed, epoch))
            return
        count = len(self._samples)
        self._shards = Permutation(count, derive_key(self._seed, epoch, 0))(np.arange(count))
        self._shard_ends = np.cumsum(self._samples[self._shards])
        last = np.minimum(np.arange(self._window, count + self._window, self._window), count) - 1
        self._window_ends = self._shard_ends[last]
