"""Scoring a finished or stopped run: `deepspeed pipeline/evaluate.py --run RUN [--key=value …]`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    # A script's own folder comes first on the path, where `evaluate` would hide a package's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipeline import finetune, pretrain
from pipeline.config import RunConfig
from pipeline.config_file import load_with_file
from pipeline.data.manifest import check_folder
from pipeline.deepspeed_file import read_deepspeed_file
from pipeline.network import spans_hosts
from pipeline.options import UserError, help_text, load, option
from pipeline.plan import Stage, resolve_model
from pipeline.preflight import REFUSED_START_TIMEOUT, agree_without_plan
from pipeline.program import run_as_program
from pipeline.run_folder import RunFolder

if TYPE_CHECKING:
    from pipeline.rendezvous import Meeting

PROGRAM = "pipeline/evaluate.py"
STAGES = {"pretrain": pretrain.STAGE, "finetune": finetune.STAGE}


@dataclasses.dataclass(frozen=True, kw_only=True)
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


def _resolve_with_others(
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


def main() -> None:
    """Score, print one JSON line a set, and add them to eval.jsonl."""
    if any(word in ("--help", "-h") for word in sys.argv[1:]):
        print(help_text(EvaluateConfig, f"deepspeed {PROGRAM}"))
        return
    asked = load_with_file(EvaluateConfig, sys.argv[1:], PROGRAM)
    (folder, stage, config, suffix), meeting = _resolve_with_others(asked)
    ds_settings = read_deepspeed_file(config.ds_config)
    from pipeline import checkpoint, distributed
    from pipeline.assemble import make_engine
    from pipeline.data.tokenizer import load as load_tokenizer
    from pipeline.evaluation.perplexity import evaluate

    world = distributed.start(timeout_seconds=config.collective_timeout, threads=config.threads)
    tokenizer = load_tokenizer(config.data_folder / "tokenizer.model")
    model = resolve_model(config, tokenizer.vocab_size)
    _, evalsets = stage.prepare(config, model, tokenizer, world)
    engine = make_engine(config, tokenizer.vocab_size, ds_settings)
    found = checkpoint.newest_good(folder.checkpoints, world, tidy=False)
    if found is None:
        raise UserError(f"run={str(folder.path)!r}: holds no checkpoint; train it first")
    state = checkpoint.load(engine, found, world, weights_only=True)
    for evalset in evalsets:
        result = evaluate(engine.module, evalset, world)
        record = {"step": state["step"], "attempt": state["attempt"], **dataclasses.asdict(result)}
        record |= {"eval_set": evalset.name + suffix, **state["totals"]}
        record["final"] = folder.is_finished
        if world.is_main:
            folder.cut_torn_lines()
            folder.append("eval.jsonl", record)
            print(json.dumps(record), flush=True)
    distributed.stop()
    if meeting is not None:
        meeting.leave()


if __name__ == "__main__":
    run_as_program(main)
