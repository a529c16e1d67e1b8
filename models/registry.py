"""The architectures by name. A new one is a module and a line here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from models.config import ModelConfig

if TYPE_CHECKING:
    from models.language_model import LanguageModel

ARCHITECTURES: dict[str, tuple[str, str]] = {
    "decllm": ("models.decllm", "DecLLM"),
    "redllm": ("models.redllm", "RedLLM"),
    "entp": ("models.entp", "ENTP"),
    "ared": ("models.ared", "ARED"),
}


def build(config: ModelConfig) -> LanguageModel:
    """The model that `config` describes, initialised from torch's global generator.

    Raises:
        ValueError: the architecture is not known, or cannot be what the config asks for.
    """
    if config.arch not in ARCHITECTURES:
        raise ValueError(
            f"arch={config.arch!r}: not known; give one of: {', '.join(ARCHITECTURES)}"
        )
    module, name = ARCHITECTURES[config.arch]
    return getattr(importlib.import_module(module), name)(config)
