"""Finetuning: `deepspeed pipeline/finetune.py --config run.yaml [--key=value …]`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    # A script's own folder comes first on the path, where `evaluate` would hide a package's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from models.registry import ARCHITECTURES, architecture
from pipeline.assemble import run_stage
from pipeline.config import RunConfig
from pipeline.data.manifest import check_folder
from pipeline.options import UserError
from pipeline.plan import Stage, row_length_problems
from pipeline.program import run_as_program
from pipeline.run_folder import RunFolder


def check(config: RunConfig) -> Iterable[str]:
    """What only finetuning can get wrong."""
    if not architecture(config.arch).is_finetuned:
        can = ", ".join(name for name in ARCHITECTURES if architecture(name).is_finetuned)
        yield f"arch={config.arch!r}: is not finetuned on instructions; give one of: {can}"
    try:
        pairs, heldout, blocks = open_data(config)
        check_folder(str(config.flan_folder))
        yield from row_length_problems(config, (pairs, heldout))
    except UserError as error:
        yield str(error)
        return
    tokenizer = blocks.manifest.tokenizer.sha256
    if pairs.manifest.tokenizer.sha256 != tokenizer:
        yield (
            f"flan={config.flan!r}: was made with another tokenizer than data={config.data!r}; "
            "make it again with that folder's tokenizer.model"
        )
    if config.init_from is None:
        yield "init_from: missing; give --init_from RUN, a pretrained run folder"
        return
    if RunFolder(config.run_dir).config_file.exists():
        # Begun before: it has its weights, and its parent may be gone.
        return
    parent = RunFolder(config.init_from).read_config()
    for key in ("arch", "size"):
        if parent["run"][key] != getattr(config, key):
            yield (
                f"{key}={getattr(config, key)!r}: the run in {config.init_from} has "
                f"{parent['run'][key]!r}; give that"
            )
    if parent["data"]["tokenizer_sha256"] != tokenizer:
        yield (
            f"init_from={config.init_from!r}: was trained with another tokenizer than that of "
            f"data={config.data!r}; give matching ones"
        )


def open_data(config: RunConfig) -> tuple[Any, Any, Any]:
    """Training pairs, held-out pairs, held-out blocks of text. Raises UserError."""
    from pipeline.data.flan import FlanStore
    from pipeline.data.sequences import SequenceStore

    flan = config.flan_folder
    if flan is None:
        raise UserError("flan: missing; give --flan DIR, a folder made by isoflop flan")
    blocks = SequenceStore(config.data_folder, "validation", config.seq_len)
    return FlanStore(flan, "train"), FlanStore(flan, "heldout"), blocks


def prepare(config: RunConfig, model: Any, tokenizer: Any, world: Any) -> tuple[Any, list[Any]]:
    """Instruction pairs, the held-out pairs, and the pretraining's held-out blocks."""
    from pipeline.evaluation.perplexity import block_set, instruction_set
    from pipeline.sources import InstructionSource

    train, heldout, blocks = open_data(config)
    lengths = tokenizer.byte_lengths()
    special = {"bos": tokenizer.bos, "pad": tokenizer.pad}
    evalsets = [
        instruction_set("flan_heldout", heldout, config, lengths, world, **special),
        block_set("validation", blocks, config, lengths, world, **special),
    ]
    return InstructionSource(config, model, train, **special), evalsets


STAGE = Stage(
    name="finetune",
    program="pipeline/finetune.py",
    purpose="Finetune a pretrained run on instruction pairs.",
    check=check,
    prepare=prepare,
    scores_start=True,
)

if __name__ == "__main__":
    run_as_program(lambda: run_stage(STAGE))
