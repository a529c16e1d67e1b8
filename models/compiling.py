"""What torch.compile is to leave alone: loops that it would unroll, for each length anew."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def left_eager(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """`function`, which compiled code calls as it is.

    Without the compiler, which takes seconds to import, where nothing has asked for it so far. To
    be called outside of compiled code.
    """
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return function
    disabled: Callable[Given, Result] = torch.compiler.disable(function)
    return disabled
