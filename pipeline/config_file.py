"""A configuration from a YAML file and the command line; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.config import RunConfig
from pipeline.options import UserError, help_text, load, split_flags

C = TypeVar("C")


def load_with_file(cls: type[C], argv: Sequence[str], prog: str) -> C:
    """`cls` from `--config FILE.yaml` and flags; flags override the file.

    Raises UserError for every mistake at once, those of the file included.
    """
    flags = split_flags(argv)
    words = flags.pop("", [])
    # The launcher gives every rank its number; the environment already says it.
    flags.pop("local_rank", None)
    if words:
        raise UserError(f"{' '.join(words)}: stands without a flag; see {prog} --help")
    values: dict[str, Any] = {}
    path = flags.pop("config", None)
    if path is not None:
        values = read_yaml(Path(path))
    for key, value in flags.items():
        head, _, rest = key.partition(".")
        if rest and isinstance(values.get(head), Mapping):
            values[head] = {**values[head], rest: value}
        else:
            values[key] = value
    return load(cls, values, source=f"{path} with its flags" if path and flags else path or prog)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds. Raises UserError."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config={str(path)!r}: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config={str(path)!r}: not YAML ({error}); mend the file") from error
    if not isinstance(values, dict):
        raise UserError(f"config={str(path)!r}: holds no `key: value` lines; add some")
    return {str(key): value for key, value in values.items()}


def program_help(prog: str, purpose: str) -> str:
    """The help page of an entry point that takes a RunConfig."""
    page = help_text(RunConfig, f"deepspeed {prog} --config run.yaml")
    return f"{purpose}\nFlags override the file.\n\n{page}"
