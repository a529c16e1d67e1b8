"""Scoring a finished or stopped run: `deepspeed pipeline/evaluate.py --run RUN [--key=value …]`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    # A script's own folder comes first on the path, where `evaluate` would hide a package's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipeline.config_file import load_with_file
from pipeline.deepspeed_file import read_deepspeed_file
from pipeline.evaluation.request import EvaluateConfig, resolve_with_others
from pipeline.options import UserError, help_text
from pipeline.plan import resolve_model
from pipeline.program import run_as_program

PROGRAM = "pipeline/evaluate.py"


def main() -> None:
    """Score, print one JSON line a set, and add them to eval.jsonl."""
    if any(word in ("--help", "-h") for word in sys.argv[1:]):
        print(help_text(EvaluateConfig, f"deepspeed {PROGRAM}"))
        return
    asked = load_with_file(EvaluateConfig, sys.argv[1:], PROGRAM)
    (folder, stage, config, suffix), meeting = resolve_with_others(asked)
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
