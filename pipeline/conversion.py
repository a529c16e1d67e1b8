"""One value, from a flag or a file, as the type that a field is declared with, without guessing.

Text (from a flag) is parsed; typed values (from YAML) are checked. The declared type alone decides:
`None`, `a,b` and `1e-3` are text where text is asked for.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin


def is_mapping(hint: Any) -> bool:
    """Whether a field declared as `hint` takes name: value pairs."""
    return (get_origin(hint) or hint) in (dict, Mapping)


def convert(value: object, hint: Any) -> Any:
    """`value` as the type `hint`. Raises ValueError that says what to give instead."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if type(None) in arguments:
                return None
        else:
            arguments = tuple(a for a in arguments if a is not type(None))
        errors = []
        for candidate in arguments:
            try:
                return convert(value, candidate)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[-1])
    if origin is Literal:
        if value in arguments:
            return value
        choices = ", ".join(str(a) for a in arguments)
        raise ValueError(f"not one of the choices; give one of: {choices}")
    if origin in (tuple, list):
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)):
            raise ValueError("not a list; give values separated by commas")
        return (tuple if origin is tuple else list)(convert(part, arguments[0]) for part in parts)
    if is_mapping(hint):
        if isinstance(value, str):
            pairs = [part.partition("=") for part in value.split(",") if part]
            if not all(separator for _, separator, _ in pairs):
                raise ValueError("not a mapping; give name=value,name=value")
            value = {key: text for key, _, text in pairs}
        if not isinstance(value, Mapping):
            raise ValueError("not a mapping; give name: value pairs")
        inner = arguments[1] if arguments else Any
        return {str(key): convert(item, inner) for key, item in value.items()}
    return _convert_scalar(value, hint)


def _convert_scalar(value: object, hint: Any) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ValueError("not a truth value; give true or false")
    if hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return int(value)
        raise ValueError("not a whole number; give one such as 4096")
    if hint is float:
        number = None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = float(value)
        if isinstance(value, str):
            # YAML 1.1 reads 1e-3 as text, so text is parsed here from wherever it came.
            with contextlib.suppress(ValueError):
                number = float(value)
        if number is None:
            raise ValueError("not a number; give one such as 0.001")
        if not math.isfinite(number):
            raise ValueError("not finite; give a number such as 0.001")
        return number
    if hint is str:
        if isinstance(value, str):
            return value
        raise ValueError("not text; put it in quotes")
    raise TypeError(f"option type {hint!r} is not supported")
