"""What settings of a run cannot be together, which may change, and how its batch is cut.

Each mistake names the field, the value and the remedy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from models.config import named
from models.registry import architecture
from pipeline.optim import recipe, schedule

if TYPE_CHECKING:
    from pipeline.config import RunConfig

# What a run may change when it goes on: nothing that moves a loss, but micro_batch where steps draw
# at random (`plan.redrawn`), and what is done about steps that went wrong.
CHANGEABLE = frozenset(
    {
        "run_dir",
        "name",
        "data",
        "flan",
        "micro_batch",
        "prefetch",
        "cache_dir",
        "cache_gb",
        "ds_config",
        "eval_micro_batch",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "log_spaced_checkpoints",
        "async_checkpoints",
        "on_failed_save",
        "restart",
        "max_skipped_steps",
        "on_nonfinite",
        "loss_spikes",
        "spike_threshold",
        "spike_window",
        "max_rollbacks",
        "check_ranks_every",
        "threads",
        "collective_timeout",
        "stall_timeout",
        "start_timeout",
    }
)


# Fields of `model` that move no loss.
CHANGEABLE_IN_MODEL = frozenset({"activation_checkpointing"})


def config_problems(config: RunConfig) -> Iterable[str]:
    """What single fields cannot say."""
    if not 0 < config.split < config.seq_len:
        yield (
            f"prefix_len={config.prefix_len}: leaves no prefix or no target; give 1 to "
            f"{config.seq_len - 1} (seq_len={config.seq_len})"
        )
    described = architecture(config.arch)
    if described.encodes_prefix and config.objective == "causal":
        yield (
            f"objective='causal': {config.arch} needs a prefix for its encoder; give prefix or auto"
        )
    takes_prefix = described.encodes_prefix or described.has_prefix_mask
    if config.resolved_objective != "causal" and not takes_prefix:
        yield f"objective={config.objective!r}: {config.arch} reads causally; give causal or auto"
    yield from _denoiser_problems(config)
    window = str(config.shuffle_window)
    if window != "all" and not (window.isdecimal() and int(window) > 0):
        yield (
            f"shuffle_window={config.shuffle_window!r}: not a window; give all or a positive "
            "number of shards"
        )
    yield from _rollback_problems(config)
    yield from _order_problems(config)
    yield from recipe.problems(config)
    yield from schedule.problems(config)
    if config.bidirectional_inputs and (not described.has_prefix_mask or config.flan is None):
        yield (
            "bidirectional_inputs=True: only for finetuning an architecture with a prefix "
            "mask, such as decllm; leave it out"
        )
    if config.max_epochs is not None and config.max_epochs <= 0:
        yield f"max_epochs={config.max_epochs}: not above 0; give a number such as 1"
    try:
        named(config.arch, config.size, vocab_size=1024)
    except ValueError as error:
        yield f"size={config.size!r}: {error}"


def _rollback_problems(config: RunConfig) -> Iterable[str]:
    saves = config.checkpoint_every or config.keep_every or config.log_spaced_checkpoints
    for name in ("loss_spikes", "on_nonfinite"):
        if getattr(config, name) == "rollback" and not saves:
            yield (
                f"{name}='rollback': checkpoint_every=0 leaves only the start to go back to; give "
                "--checkpoint_every"
            )


def _order_problems(config: RunConfig) -> Iterable[str]:
    for begin, weights in config.weight_stages.items():
        if not (begin.isdecimal() and int(begin) > 0):
            yield (
                f"weight_stages.{begin}: not a sample number; give one above 0, and the first "
                "weights as weights"
            )
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            yield f"weight_stages.{begin}={weights}: give none below zero and one above"
    if config.document_masks and not architecture(config.arch).has_document_mask:
        yield f"document_masks=True: {config.arch} has no mask for documents; leave it out"
    if config.document_masks and config.resolved_objective in ("random_prefix", "denoise"):
        yield (
            f"document_masks=True: objective={config.objective} cuts samples in pieces of its "
            "own; leave one out"
        )
    if (config.weight_stages or config.document_masks) and config.flan is not None:
        yield "weight_stages, document_masks: are for pretraining; leave them out"


def _denoiser_problems(config: RunConfig) -> Iterable[str]:
    shares = config.denoisers
    if config.objective in ("random_prefix", "denoise") and config.flan is not None:
        yield f"objective={config.objective!r}: is for pretraining; leave it out"
    if shares and config.objective != "denoise":
        yield f"denoisers={shares}: only for objective=denoise; leave it out"
    foreign = sorted(set(shares) - {"R", "S", "X"})
    if foreign:
        yield f"denoisers.{foreign[0]}={shares[foreign[0]]}: no denoiser; give R, S and X"
    elif shares and (min(shares.values()) < 0 or sum(shares.values()) <= 0):
        yield f"denoisers={shares}: not shares; give none below zero and one above"


def batch_problems(config: RunConfig, world_size: int) -> Iterable[str]:
    """What is wrong with the batch for `world_size` ranks: every world sees the same batches."""
    batch = config.global_batch
    micro = micro_batch_size(config, world_size)
    unit = world_size * micro
    if batch % unit == 0:
        return
    below, above = batch // unit * unit, (batch // unit + 1) * unit
    other = f"global_batch {below} or {above}" if below else f"global_batch {above}"
    remedy = f"give {other}"
    if batch % world_size == 0:
        remedy = f"give micro_batch {_whole_micro_batch(batch // world_size, micro)}, or {other}"
    else:
        counts = " or ".join(str(count) for count in _nearest_divisors(batch, world_size))
        # What a run that has begun can change: its batches are fixed.
        remedy += f", or a number of ranks that divides it, such as {counts}"
    yield (
        f"global_batch={batch}: does not divide by {world_size} ranks × micro_batch {micro}; "
        f"{remedy}"
    )


def fit_micro_batch(config: RunConfig, world_size: int) -> tuple[RunConfig, str]:
    """A run that has begun, for `world_size` ranks, by the command it was started with.

    Its micro_batch may be more than a rank's share then, or not divide it: the largest below that
    does is taken, which changes no loss and needs less memory.

    Returns:
        The configuration, and a line on what was changed; "" where nothing was or can be.
    """
    share, rest = divmod(config.global_batch, world_size)
    asked = config.micro_batch
    if asked is None or rest or share % asked == 0:
        return config, ""
    size = _whole_micro_batch(share, asked)
    return dataclasses.replace(config, micro_batch=size), (
        f"micro_batch={asked}: does not divide a rank's {share} sequences on {world_size} ranks; "
        f"it goes on with {size}"
    )


def _whole_micro_batch(share: int, most: int) -> int:
    """The largest size, at most `most`, that divides a rank's share."""
    return next(size for size in range(min(most, share), 0, -1) if share % size == 0)


def _nearest_divisors(number: int, at: int) -> list[int]:
    """The divisors of `number` next to `at`, which is none: one below, and one above if any."""
    below = next(each for each in range(min(at, number), 0, -1) if number % each == 0)
    above = next((each for each in range(at, number + 1) if number % each == 0), None)
    return [below] if above is None else [below, above]


def micro_batch_size(config: RunConfig, world_size: int) -> int:
    """Sequences a rank holds at once."""
    return config.micro_batch or max(1, config.global_batch // world_size)


def cut(config: RunConfig, world_size: int) -> dict[str, int]:
    """How a run's global batch is cut: what its model's random draws depend on beside its seed."""
    return {"ranks": world_size, "micro_batch": micro_batch_size(config, world_size)}
