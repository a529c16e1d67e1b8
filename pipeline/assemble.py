"""One run put together: configuration → model, engine, batches, callbacks → FINISHED.

Pretraining and finetuning differ in their `Stage` alone: where batches come from, what is scored,
and where the weights start.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import platform
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from models.config import ModelConfig, named
from pipeline.config import (
    RunConfig,
    batch_problems,
    load_with_file,
    micro_batch_size,
    program_help,
    read_deepspeed_file,
)
from pipeline.data.manifest import Manifest, check_folder, read_manifest
from pipeline.options import UserError, convert
from pipeline.run_folder import RunFolder

# What a run may change when it goes on: nothing that moves a loss.
CHANGEABLE = frozenset(
    {
        "run_dir",
        "name",
        "data",
        "flan",
        "micro_batch",
        "ds_config",
        "eval_micro_batch",
        "checkpoint_every",
        "keep_checkpoints",
        "max_skipped_steps",
        "threads",
        "collective_timeout",
    }
)
C = TypeVar("C")
RECORDED_VERSIONS = ("isoflop", "torch", "deepspeed", "sentencepiece", "numpy")


@dataclass(frozen=True)
class Stage:
    """What tells pretraining from finetuning.

    Attributes:
        name: pretrain or finetune.
        program: the entry point's path, for messages.
        purpose: the first line of its help.
        check: mistakes that only this stage can make.
        prepare: (config, model config, tokenizer, world) → (source, evaluation sets).
        scores_start: whether the starting weights are scored too.
    """

    name: str
    program: str
    purpose: str
    check: Callable[[RunConfig], Iterable[str]]
    prepare: Callable[..., tuple[Any, list[Any]]]
    scores_start: bool = False


def run_stage(stage: Stage) -> None:
    """The whole of an entry point: read the command line, train, mark the run FINISHED."""
    argv = sys.argv[1:]
    if any(word in ("--help", "-h") for word in argv):
        print(program_help(stage.program, stage.purpose))
        return
    plan = check_run(stage, argv)
    main_rank = os.environ.get("RANK", "0") == "0"
    if main_rank and not plan.folder.is_finished:
        plan.folder.lock()
    if plan.folder.is_finished:
        if main_rank:
            print(f"{plan.config.name}: finished before; nothing to do", flush=True)
        return
    _train(stage, plan)


@dataclass(frozen=True)
class Plan:
    """A run whose every setting was checked, before any work."""

    config: RunConfig
    model: ModelConfig
    ds_settings: dict[str, Any]
    folder: RunFolder
    document: dict[str, Any]


def check_run(stage: Stage, argv: Sequence[str]) -> Plan:
    """Read and check all that a run is told. Raises UserError with every mistake at once."""
    config = load_with_file(RunConfig, argv, stage.program)
    config = dataclasses.replace(config, name=config.name or Path(config.run_dir).name)
    problems: list[str] = []

    def attempt(step: Callable[[], C]) -> C | None:
        try:
            return step()
        except UserError as error:
            problems.append(str(error))
            return None

    folder = RunFolder(config.run_dir)
    overrides = attempt(lambda: convert_overrides({**inherited_overrides(config), **config.model}))
    config = dataclasses.replace(config, model=overrides or {})
    ds_settings = attempt(lambda: read_deepspeed_file(config.ds_config))
    manifest = attempt(lambda: check_folder(config.data))
    if manifest is not None:
        problems += stage.check(config)
    problems += batch_problems(config, int(os.environ.get("WORLD_SIZE", "1")))
    model = attempt(lambda: resolve_model(config, manifest.tokenizer.vocab_size if manifest else 2))
    if problems or manifest is None or model is None or ds_settings is None:
        raise UserError("; ".join(problems))
    document = describe(stage, config, model, manifest)
    refuse_other_run(folder, document)
    return Plan(config, model, ds_settings, folder, document)


def inherited_overrides(config: RunConfig) -> dict[str, Any]:
    """What a finetuning run's parent changed of its named shape; the run's own, once it has begun.

    The parent may be gone by the time a finetuning goes on.
    """
    if config.init_from is None:
        return {}
    own = RunFolder(config.run_dir)
    source = own if own.config_file.exists() else RunFolder(config.init_from)
    return dict(source.read_config()["run"]["model"])


def convert_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The model's overrides with the types of ModelConfig's fields. Raises UserError."""
    hints = typing.get_type_hints(ModelConfig)
    for key in ("arch", "vocab_size"):
        # The run names its architecture, and the data their vocabulary.
        del hints[key]
    converted = {}
    for key, value in overrides.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            remedy = f"did you mean {close[0]}?" if close else f"give one of {', '.join(hints)}"
            raise UserError(f"model.{key}={value!r}: not a field of the model; {remedy}")
        try:
            converted[key] = convert(value, hints[key])
        except UserError as error:
            raise UserError(f"model.{key}={value!r}: {error}") from error
    return converted


def resolve_model(config: RunConfig, vocab_size: int) -> ModelConfig:
    """The model of a run: its named shape with the run's overrides. Raises UserError."""
    overrides = dict(config.model)
    length = overrides.setdefault("max_seq_len", config.seq_len)
    if isinstance(length, int) and length < config.seq_len:
        raise UserError(
            f"model.max_seq_len={length}: shorter than seq_len={config.seq_len}; give at least that"
        )
    try:
        return named(config.arch, config.size, vocab_size=vocab_size, **overrides)
    except (ValueError, TypeError) as error:
        raise UserError(f"model={config.model}: {error}") from error


def describe(
    stage: Stage, config: RunConfig, model: ModelConfig, manifest: Manifest
) -> dict[str, Any]:
    """config.json: the resolved run with the versions and fingerprints it depends on."""
    from models.flops import parameters

    document: dict[str, Any] = {
        "format": 1,
        "stage": stage.name,
        "run": dataclasses.asdict(config),
        "model": dataclasses.asdict(model),
        "parameters": dataclasses.asdict(parameters(model)),
        "data": {
            "path": config.data,
            "fingerprint": manifest.fingerprint,
            "tokenizer_sha256": manifest.tokenizer.sha256,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in RECORDED_VERSIONS},
        },
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
    if config.flan is not None:
        document["flan"] = {
            "path": config.flan,
            "fingerprint": read_manifest(config.flan).fingerprint,
        }
    if config.init_from is not None:
        document["parent"] = config.init_from
    return document


def refuse_other_run(folder: RunFolder, document: dict[str, Any]) -> None:
    """Raise UserError where the folder holds a run of another configuration or other data."""
    if not folder.config_file.exists():
        return
    before = folder.read_config()
    for key, value in document["run"].items():
        known = before["run"].get(key, value)
        # JSON has no tuples; what was written is compared with what would be.
        if key not in CHANGEABLE and known != value:
            raise UserError(
                f"{key}={value!r}: the run in {folder.path} has {known!r}; give that, or another "
                "run_dir"
            )
    for section in ("data", "flan"):
        if section in document:
            old, new = before.get(section, {}), document[section]
            for key in ("fingerprint", "tokenizer_sha256"):
                if key in new and old.get(key) != new[key]:
                    raise UserError(
                        f"{section}={new['path']!r}: not what the run in {folder.path} was started "
                        f"on ({key} differs); give the same data, or another run_dir"
                    )


def make_engine(config: RunConfig, vocab_size: int, ds_settings: dict[str, Any], world: Any) -> Any:
    """The DeepSpeed engine of a run, its weights drawn from the run's seed."""
    import torch

    from models.registry import build
    from pipeline import distributed
    from pipeline.optim.build import build_optimizer

    torch.manual_seed(config.seed)
    model = build(resolve_model(config, vocab_size))
    settings = distributed.deepspeed_settings(
        ds_settings,
        micro_batch=micro_batch_size(config, world.size),
        precision=config.precision,
        grad_clip=config.grad_clip,
    )
    return distributed.start_engine(model, build_optimizer(model, config), settings)


def _train(stage: Stage, plan: Plan) -> None:
    config, folder = plan.config, plan.folder
    # torch and deepspeed take seconds to import: only now, when nothing is left to be refused.
    from pipeline import checkpoint, distributed
    from pipeline.callbacks.evaluation import Evaluation
    from pipeline.callbacks.progress import Progress
    from pipeline.callbacks.records import Ledger, Metrics
    from pipeline.callbacks.saving import Saving
    from pipeline.data.tokenizer import load as load_tokenizer
    from pipeline.trainer import Totals, Trainer

    world = distributed.start(timeout_seconds=config.collective_timeout, threads=config.threads)
    tokenizer = load_tokenizer(Path(config.data) / "tokenizer.model")
    source, evalsets = stage.prepare(config, plan.model, tokenizer, world)
    engine = make_engine(config, plan.model.vocab_size, plan.ds_settings, world)
    if world.is_main:
        folder.cut_torn_lines()
    found = checkpoint.newest_good(folder.checkpoints, world)
    before = distributed.same_everywhere(folder.last_attempt() if world.is_main else None)
    evaluated = distributed.same_everywhere(folder.evaluated_steps() if world.is_main else None)
    state: dict[str, Any] = {"step": 0, "totals": {}}
    if found is not None:
        state = checkpoint.load(engine, found, world)
    elif config.init_from is not None:
        parent = RunFolder(config.init_from)
        weights = checkpoint.newest_good(parent.checkpoints, world)
        if weights is None:
            raise UserError(f"init_from={config.init_from!r}: holds no checkpoint; train it first")
        inherited = checkpoint.load(engine, weights, world, weights_only=True)
        state = {"step": 0, "totals": inherited["totals"]}
    if world.is_main:
        folder.write_config(plan.document)
        start = "starts"
        if found is not None:
            start = f"goes on from step {state['step']}"
        elif before:
            start = "was stopped before its first checkpoint and starts over"
        print(
            f"{config.name}: {start}; {config.arch} {config.size}, "
            f"{plan.document['parameters']['total']:,} parameters, {config.steps} steps, "
            f"{world.size} rank(s), ZeRO-{engine.zero_optimization_stage()}",
            flush=True,
        )
    trainer = Trainer(
        config,
        world,
        engine,
        source,
        folder,
        # The evaluation comes last: what it scores is saved.
        [
            Metrics(),
            Ledger(),
            Progress(),
            Saving(),
            Evaluation(evalsets, evaluated, at_start=stage.scores_start),
        ],
        step=state["step"],
        totals=Totals(**state["totals"]),
        attempt=before + 1,
    )
    finished = trainer.run()
    if world.is_main:
        if finished:
            folder.finish()
        else:
            print(f"{config.name}: stopped after step {trainer.step}; the same command goes on")
    distributed.stop()
    if not finished:
        sys.exit(STOPPED)


# The exit code of a run that was asked to stop and saved its state: the shell's for SIGINT.
STOPPED = 130
