"""Scoring a finished or stopped run: `deepspeed pipeline/evaluate.py --run RUN [--key=value …]`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    # A script's own folder comes first on the path, where `evaluate` would hide a package's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pipeline.config import RunConfig, load_with_file, read_deepspeed_file
from pipeline.data.manifest import read_manifest
from pipeline.options import UserError, help_text, load, option, run_as_program
from pipeline.run_folder import RunFolder

PROGRAM = "pipeline/evaluate.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a run's newest checkpoint on held-out tokens; adds lines to the run's eval.jsonl."""

    run: str = option("run folder", metavar="DIR")
    data: str | None = option("shard folder to score (default: the run's own)", None, metavar="DIR")
    eval_set: str | None = option("name of the set (default: validation or the folder's)", None)
    eval_sequences: int = option("held-out sequences", 512, minimum=1)
    eval_micro_batch: int = option("sequences a rank holds at once", 32, minimum=1)
    ds_config: str | None = option("DeepSpeed file (default: the run's own)", None, metavar="FILE")
    threads: int = option("CPU threads of a rank (0: its share of the cores)", 0, minimum=0)


def resolve(asked: EvaluateConfig) -> tuple[RunFolder, RunConfig, str]:
    """The run, its configuration with what was asked for, and the set's name. Raises UserError."""
    folder = RunFolder(asked.run)
    stored = folder.read_config()
    changes: dict[str, Any] = {
        key: getattr(asked, key)
        for key in ("data", "ds_config", "eval_sequences", "eval_micro_batch", "threads")
        if getattr(asked, key) is not None
    }
    config = load(RunConfig, {**stored["run"], **changes}, source=str(folder.config_file))
    if read_manifest(config.data).tokenizer.sha256 != stored["data"]["tokenizer_sha256"]:
        raise UserError(
            f"data={config.data!r}: was made with another tokenizer than the run's; make it again "
            "with the tokenizer.model of the run's data"
        )
    own = asked.data is None or Path(asked.data) == Path(stored["run"]["data"])
    return folder, config, asked.eval_set or ("validation" if own else Path(config.data).name)


def main() -> None:
    """Score, print one JSON line, and add it to eval.jsonl."""
    if any(word in ("--help", "-h") for word in sys.argv[1:]):
        print(help_text(EvaluateConfig, f"deepspeed {PROGRAM}"))
        return
    folder, config, name = resolve(load_with_file(EvaluateConfig, sys.argv[1:], PROGRAM))
    ds_settings = read_deepspeed_file(config.ds_config)
    from pipeline import checkpoint, distributed
    from pipeline.assemble import make_engine
    from pipeline.data.loader import SequenceStore
    from pipeline.data.tokenizer import load as load_tokenizer
    from pipeline.evaluation.perplexity import block_set, evaluate

    store = SequenceStore(config.data, "validation", config.seq_len)
    tokenizer = load_tokenizer(Path(config.data) / "tokenizer.model")
    world = distributed.start(timeout_seconds=config.collective_timeout, threads=config.threads)
    lengths = tokenizer.byte_lengths()
    evalset = block_set(name, store, config, lengths, world, bos=tokenizer.bos)
    engine = make_engine(config, tokenizer.vocab_size, ds_settings, world)
    found = checkpoint.newest_good(folder.checkpoints, world)
    if found is None:
        raise UserError(f"run={str(folder.path)!r}: holds no checkpoint; train it first")
    state = checkpoint.load(engine, found, world, weights_only=True)
    result = evaluate(engine.module, evalset, world)
    record = {"step": state["step"], "attempt": state["attempt"], **dataclasses.asdict(result)}
    record |= {**state["totals"], "final": folder.is_finished}
    if world.is_main:
        folder.append("eval.jsonl", record)
        print(json.dumps(record), flush=True)
    distributed.stop()


if __name__ == "__main__":
    run_as_program(main)
