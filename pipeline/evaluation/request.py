"""What a scoring is asked for, and what of the run and of all ranks it takes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import finetune, pretrain
from pipeline.config import RunConfig
from pipeline.data.manifest import check_folder
from pipeline.deepspeed_file import read_deepspeed_file
from pipeline.network import spans_hosts
from pipeline.options import UserError, load, option
from pipeline.plan import Stage
from pipeline.preflight import REFUSED_START_TIMEOUT, agree_without_plan
from pipeline.run_folder import RunFolder

if TYPE_CHECKING:
    from pipeline.rendezvous import Meeting

STAGES = {"pretrain": pretrain.STAGE, "finetune": finetune.STAGE}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a run's newest checkpoint on held-out tokens; adds lines to the run's eval.jsonl."""

    run: str = option("run folder", metavar="DIR")
    data: str | None = option("shard folder to score (default: the run's own)", None, metavar="DIR")
    eval_sequences: int | None = option("held-out sequences (default: the run's)", None, minimum=1)
    eval_micro_batch: int = option("sequences a rank holds at once", 32, minimum=1)
    ds_config: str | None = option("DeepSpeed file (default: the run's own)", None, metavar="FILE")
    threads: int = option("CPU threads of a rank (0: its share of the cores)", 0, minimum=0)


def resolve(asked: EvaluateConfig) -> tuple[RunFolder, Stage, RunConfig, str]:
    """The run, its stage, its configuration with what was asked for, and a suffix for its sets.

    The suffix keeps another choice of held-out tokens apart from the run's own. Raises UserError.
    """
    folder = RunFolder(asked.run)
    stored = folder.read_config()
    keys = ("data", "ds_config", "eval_sequences", "eval_micro_batch", "threads")
    changes = {key: value for key in keys if (value := getattr(asked, key)) is not None}
    config = load(RunConfig, stored["run"] | changes | {"compile": False}, source=asked.run)
    if check_folder(config.data_folder).tokenizer.sha256 != stored["data"]["tokenizer_sha256"]:
        raise UserError(
            f"data={config.data!r}: was made with another tokenizer than the run's; make it again "
            "with the tokenizer.model of the run's data"
        )
    suffix = f"@{Path(config.data).name}" if config.data != stored["run"]["data"] else ""
    if config.eval_sequences != stored["run"]["eval_sequences"]:
        suffix += f"-{config.eval_sequences}"
    return folder, STAGES[stored["stage"]], config, suffix


def resolve_with_others(
    asked: EvaluateConfig,
) -> tuple[tuple[RunFolder, Stage, RunConfig, str], Meeting | None]:
    """As `resolve`; what one rank cannot do or has otherwise ends all, in one line.

    And the ranks' meeting, which lasts as long as they have something to do with each other.
    Raises UserError.
    """
    problem, resolved, same, seconds = None, None, {}, REFUSED_START_TIMEOUT
    try:
        resolved = resolve(asked)
        folder, _, config, _ = resolved
        seconds = config.start_timeout
        data = check_folder(config.data_folder)
        same = {"data": data.fingerprint, "tokenizer": data.tokenizer.sha256}
        same["ds_config"] = json.dumps(read_deepspeed_file(config.ds_config), sort_keys=True)
        same["eval_sequences"] = str(config.eval_sequences)
        if os.environ.get("RANK", "0") == "0":
            # Its records are written by one process at a time.
            folder.lock()
    except UserError as error:
        if not spans_hosts(os.environ):
            raise  # the others find the same
        problem = error
    meeting = agree_without_plan(problem, same, seconds, Path(asked.run))
    assert resolved is not None
    return resolved, meeting
