"""Fields of the model that a command line or a file sets over a named shape's own."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from pipeline.conversion import convert
from pipeline.options import UserError


def convert_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The model's overrides with the types of ModelConfig's fields. Raises UserError."""
    hints = typing.get_type_hints(ModelConfig)
    for key in ("arch", "vocab_size"):
        # The run names its architecture, and the data their vocabulary.
        del hints[key]
    converted = {}
    for key, value in overrides.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"give one of {', '.join(hints)}"
            raise UserError(f"model.{key}={value!r}: not a field of the model; {remedy}")
        try:
            converted[key] = convert(value, hints[key])
        except ValueError as error:
            raise UserError(f"model.{key}={value!r}: {error}") from error
    return converted
