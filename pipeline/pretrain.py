"""Pretraining: `deepspeed pipeline/pretrain.py --config run.yaml [--key=value …]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    # A script's own folder comes first on the path, where `evaluate` would hide a package's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipeline.assemble import run_stage
from pipeline.config import RunConfig
from pipeline.options import UserError
from pipeline.plan import Stage
from pipeline.program import run_as_program


def check(config: RunConfig) -> Iterable[str]:
    """What only pretraining can get wrong."""
    if config.flan is not None:
        yield f"flan={config.flan!r}: is for pipeline/finetune.py; leave it out"
    if config.init_from is not None:
        yield f"init_from={config.init_from!r}: is for pipeline/finetune.py; leave it out"
    try:
        open_data(config)
        if config.resolved_objective == "denoise":
            from pipeline.data.tokenizer import load as load_tokenizer

            make_denoising(config, load_tokenizer(config.data_folder / "tokenizer.model"))
    except UserError as error:
        yield str(error)


def open_data(config: RunConfig) -> tuple[Any, Any]:
    """The order of training samples and the held-out sequences. Raises UserError."""
    from pipeline.data.run_order import pretraining_order
    from pipeline.data.sequences import SequenceStore

    return pretraining_order(config), SequenceStore(
        config.data_folder, "validation", config.seq_len
    )


def make_denoising(config: RunConfig, tokenizer: Any) -> Any:
    """The mixture of denoisers where the objective is one, else None. Raises UserError."""
    if config.resolved_objective != "denoise":
        return None
    from pipeline.denoising import mixture

    return mixture(tokenizer.extra_ids, tokenizer.eod, config.seed, config.denoisers)


def prepare(config: RunConfig, model: Any, tokenizer: Any, world: Any) -> tuple[Any, list[Any]]:
    """Blocks in the run's order, and the held-out blocks."""
    from pipeline.evaluation.perplexity import block_set
    from pipeline.sources import PretrainingSource

    order, heldout = open_data(config)
    special = {
        "bos": tokenizer.bos,
        "pad": tokenizer.pad,
        "denoising": make_denoising(config, tokenizer),
    }
    lengths = tokenizer.byte_lengths()
    evalset = block_set("validation", heldout, config, lengths, world, **special)
    return PretrainingSource(config, model, order, **special), [evalset]


STAGE = Stage(
    name="pretrain",
    program="pipeline/pretrain.py",
    purpose="Train a model on shards of tokens.",
    check=check,
    prepare=prepare,
)

if __name__ == "__main__":
    run_as_program(lambda: run_stage(STAGE))
