"""What a run says of its optimizer: the values that depend on which it is, and what cannot be.

Nothing heavy is imported: this is checked before any work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

# What a run gets where it says nothing. Adafactor's lr is relative to each parameter's RMS, and
# arXiv 2510.26622 ran it so: unfactored, decay_rate 0.8, no momentum, no decay. Muon's lr is in
# units of spectral norm; its updates are of one size whatever the gradients', so that it does not
# clip unless it is told to.
DEFAULTS: Mapping[str, Mapping[str, float]] = {
    "adamw": {"lr": 1e-3, "beta1": 0.9, "weight_decay": 0.1, "grad_clip": 1.0},
    "adafactor": {"lr": 0.01, "beta1": 0.0, "weight_decay": 0.0, "grad_clip": 1.0},
    "muon": {"lr": 0.02, "beta1": 0.9, "weight_decay": 0.1, "grad_clip": 0.0},
}
# Fields of one optimizer or two, with their defaults.
BELONGS: Mapping[str, tuple[tuple[str, ...], Any]] = {
    "beta2": (("adamw", "muon"), 0.95),
    "factored": (("adafactor",), False),
    "decay_rate": (("adafactor",), 0.8),
    "clipping_threshold": (("adafactor",), 1.0),
    "multiply_by_parameter_scale": (("adafactor",), True),
    "min_dim_size_to_factor": (("adafactor",), 128),
    "momentum": (("muon",), 0.95),
    "ns_method": (("muon",), "gram"),
    "adam_lr": (("muon",), 1e-3),
}


class Recipe(Protocol):
    """What of a run's configuration decides its optimizer; the other fields are in BELONGS."""

    @property
    def optimizer(self) -> str: ...


def factored_dims(shape: Sequence[int], minimum: int) -> tuple[int, int] | None:
    """The places p < q of the two largest dimensions, which are factored as in T5X and optax.

    None where there are not two or the second has fewer than `minimum` elements.
    """
    if len(shape) < 2:
        return None
    # Among equals the last ones, as a stable sort from small to large leaves them.
    by_size = sorted(range(len(shape)), key=lambda place: shape[place])
    if shape[by_size[-2]] < minimum:
        return None
    return min(by_size[-2:]), max(by_size[-2:])


def resolved(optimizer: str, given: Mapping[str, float | None]) -> dict[str, float]:
    """`given` with the optimizer's defaults where it says None."""
    return {
        name: DEFAULTS[optimizer][name] if value is None else value for name, value in given.items()
    }


def problems(run: Recipe) -> Iterable[str]:
    """What is wrong with a run's optimizer; each names the field, the value and the remedy."""
    for field, (owners, default) in BELONGS.items():
        value = getattr(run, field)
        if run.optimizer not in owners and value != default:
            yield (
                f"{field}={value!r}: {run.optimizer} has none; give optimizer="
                f"{' or '.join(owners)}, or leave it out"
            )
    for field in ("beta1", "beta2", "momentum"):
        value = getattr(run, field)
        if not 0 <= value < 1:
            yield f"{field}={value}: not a decay; give at least 0, below 1"


def deepspeed_problems(run: Recipe, settings: Mapping[str, Any]) -> Iterable[str]:
    """What a run's optimizer cannot do with its DeepSpeed file."""
    zero = settings["zero_optimization"]
    if run.optimizer != "muon":
        return
    if zero.get("stage") == 3 and zero.get("reduce_scatter"):
        yield (
            "zero_optimization.reduce_scatter=true: muon needs whole gradients at stage 3; leave "
            "it out"
        )
