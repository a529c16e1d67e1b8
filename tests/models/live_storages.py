"""Bytes of all live tensor storages, over time: what a plan's memory is checked against.

Every storage that an operator returns is counted once, from that moment until it is freed, in the
thread that runs the step (a CPU's backward pass runs there too); another may free it. Scratch
inside an operator, and what gloo copies, are not seen; neither is on a GPU with NCCL.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        bytes: now.
        peak: the most since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._sizes: dict[int, int] = {}
        # Of one thread, which may free a storage while it counts another.
        self._lock = threading.RLock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # DeepSpeed keeps shapes as meta tensors, which have no memory.
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        with self._lock:
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        with self._lock:
            self.bytes -= self._sizes.pop(key)
