"""Large tensors that are allocated and never written: as many bytes, and none of them resident.

What a rank of an 8-billion-parameter model allocates is so counted in a process of a few hundred
megabytes, and in the time that it takes to ask for it. The numbers in such tensors mean nothing.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

# Elements from which on a tensor is not written.
LARGE = 1 << 16
# Linux's MAP_NORESERVE, without which it promises no more than the machine has.
NO_RESERVE = 0x4000


class Untouched(TorchDispatchMode):
    """While it is entered, operators on large tensors give back memory of the right size alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_shape = kwargs.get("device") == torch.device("meta")
        if func.is_view or func.namespace != "aten" or is_shape:
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not given and kwargs.get("device") is not None:
            made = _on_meta(func, args, kwargs)
            return _unwritten(made) if made.numel() >= LARGE else func(*args, **kwargs)
        if all(x.numel() < LARGE or x.is_meta for x in given):
            return func(*args, **kwargs)
        arguments = func._schema.arguments
        written = [
            value
            for argument, value in zip(arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if written:
            return written[0]
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
        return tree_map_only(torch.Tensor, _unwritten, _on_meta(func, args, kwargs))


def _on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": "meta"}
    return func(*args, **kwargs)


def _unwritten(shape: torch.Tensor) -> torch.Tensor:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, shape.untyped_storage().nbytes(), flags=flags)
    return torch.frombuffer(memory, dtype=shape.dtype).as_strided(shape.size(), shape.stride())
