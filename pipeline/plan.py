"""Everything a run is told, checked and resolved before any work; imports nothing heavy."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from models.config import ModelConfig, named
from models.flops import parameters
from pipeline.config import RunConfig
from pipeline.config_checks import CHANGEABLE, CHANGEABLE_IN_MODEL, batch_problems, fit_micro_batch
from pipeline.config_file import load_with_file
from pipeline.data.manifest import Manifest, check_folder, read_manifest
from pipeline.data.run_order import order_version, refuse_other_order
from pipeline.deepspeed_file import read_deepspeed_file, run_problems
from pipeline.model_overrides import convert_overrides
from pipeline.optim import recipe
from pipeline.options import UserError
from pipeline.run_folder import RunFolder

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


@dataclass(frozen=True)
class Plan:
    """A run whose every setting was checked, before any work.

    Attributes:
        config: as it was told, and fitted to the number of ranks.
        model: of the run.
        ds_settings: of its ds_config.
        folder: of the run.
        document: config.json.
        fitted: a line on what was fitted; "" where nothing was.
    """

    config: RunConfig
    model: ModelConfig
    ds_settings: dict[str, Any]
    folder: RunFolder
    document: dict[str, Any]
    fitted: str = ""


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
    if ds_settings is not None:
        problems += run_problems(ds_settings, precision=config.precision, compiled=config.compile)
        problems += recipe.deepspeed_problems(config, ds_settings)
    manifest = attempt(lambda: check_folder(config.data_folder))
    if manifest is not None:
        attempt(lambda: problems.extend(stage.check(config)))
    world_size, fitted = int(os.environ.get("WORLD_SIZE", "1")), ""
    if folder.config_file.exists():
        config, fitted = fit_micro_batch(config, world_size)
    problems += batch_problems(config, world_size)
    model = attempt(lambda: resolve_model(config, manifest.tokenizer.vocab_size if manifest else 2))
    if problems or manifest is None or model is None or ds_settings is None:
        raise UserError("; ".join(problems))
    document = describe(stage, config, model, manifest)
    refuse_other_run(folder, document)
    if not config.restart:
        folder.refuse_lost_checkpoints(document["run"])
    return Plan(config, model, ds_settings, folder, document, fitted)


def inherited_overrides(config: RunConfig) -> dict[str, Any]:
    """What a finetuning run's parent changed of its named shape; the run's own, once it has begun.

    The parent may be gone by the time a finetuning goes on.
    """
    if config.init_from is None:
        return {}
    own = RunFolder(config.run_dir)
    source = own if own.config_file.exists() else RunFolder(config.init_from)
    return dict(source.read_config()["run"]["model"])


def resolve_model(config: RunConfig, vocab_size: int) -> ModelConfig:
    """The model of a run: its named shape with the run's overrides. Raises UserError."""
    overrides = dict(config.model)
    longest = config.longest_stream
    length = overrides.setdefault("max_seq_len", longest)
    if isinstance(length, int) and length < longest:
        raise UserError(
            f"model.max_seq_len={length}: a sample of seq_len={config.seq_len} takes up to "
            f"{longest} positions under this objective; give at least that"
        )
    try:
        return named(config.arch, config.size, vocab_size=vocab_size, **overrides)
    except (ValueError, TypeError) as error:
        raise UserError(f"model={config.model}: {error}") from error


def describe(
    stage: Stage, config: RunConfig, model: ModelConfig, manifest: Manifest
) -> dict[str, Any]:
    """config.json: the resolved run with the versions and fingerprints it depends on."""
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
            "order": order_version(config, manifest),
        },
        "versions": recorded_versions(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
    if config.flan is not None:
        document["flan"] = {
            "path": config.flan,
            "fingerprint": read_manifest(str(config.flan_folder)).fingerprint,
        }
    if config.init_from is not None:
        document["parent"] = config.init_from
    return document


@functools.cache
def recorded_versions() -> dict[str, str]:
    """The versions that a run's numbers may depend on."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in RECORDED_VERSIONS},
    }


def _same_setting(key: str, known: Any, value: Any) -> bool:
    """Whether two values mean the same: a folder may be spelled in several ways."""
    if key == "init_from" and known is not None and value is not None:
        return Path(known).resolve() == Path(value).resolve()
    if key == "model":
        known, value = (
            {name: said for name, said in fields.items() if name not in CHANGEABLE_IN_MODEL}
            for fields in (known, value)
        )
    return bool(known == value)


def row_length_problems(config: RunConfig, stores: Sequence[Any]) -> Iterable[str]:
    """Rows longer than the learned positions of a model, which would fail when they come up."""
    model = resolve_model(config, stores[0].manifest.tokenizer.vocab_size)
    if model.positions != "learned":
        return
    longest = max(store.longest_row() for store in stores)
    if longest > model.max_seq_len:
        yield (
            f"flan={config.flan!r}: its longest row has {longest} tokens, and the model learned "
            f"{model.max_seq_len} positions; make it again with a smaller --max_input, or finetune "
            "a run pretrained with a larger model.max_seq_len"
        )


def refuse_other_run(folder: RunFolder, document: dict[str, Any]) -> None:
    """Raise UserError where the folder holds a run of another configuration or other data."""
    if folder.config_file.exists():
        refuse_other_identity(folder.read_config(), document, f"the run in {folder.path}")


def identity(document: Mapping[str, Any]) -> dict[str, Any]:
    """What of config.json a checkpoint belongs to: all that moves a loss, in JSON's types."""
    fixed = {key: value for key, value in document["run"].items() if key not in CHANGEABLE}
    sections = {key: document[key] for key in ("model", "data", "flan") if key in document}
    kept: dict[str, Any] = json.loads(json.dumps({"run": fixed, **sections}))
    return kept


def refuse_other_identity(
    before: Mapping[str, Any], document: Mapping[str, Any], owner: str
) -> None:
    """Raise UserError, naming the field, where `document` is not the run that `before` is of."""
    for key, value in document["run"].items():
        known = before["run"].get(key, value)
        # JSON has no tuples; what was written is compared with what would be.
        if key not in CHANGEABLE and not _same_setting(key, known, value):
            raise UserError(
                f"{key}={value!r}: {owner} has {known!r}; give that, or another run_dir"
            )
    for section in ("data", "flan"):
        if section in document:
            old, new = before.get(section, {}), document[section]
            for key in ("fingerprint", "tokenizer_sha256"):
                if key in new and old.get(key) != new[key]:
                    raise UserError(
                        f"{section}={new['path']!r}: not what {owner} was started on ({key} "
                        "differs); give the same data, or another run_dir"
                    )
    if "data" in document:
        known, made = (run.get("data", {}).get("order") for run in (before, document))
        refuse_other_order(known, made, owner)
    # Last: what a run says moves these, and so do its data. Otherwise a shape's default is another.
    resolved = json.loads(json.dumps(document.get("model", {})))
    for key, value in resolved.items():
        known = before.get("model", {}).get(key, value)
        if known != value and key not in CHANGEABLE_IN_MODEL:
            raise UserError(
                f"model.{key}={value!r}: {owner} has {known!r}; give --model.{key}={known}, or "
                "another run_dir"
            )


def redrawn(model: ModelConfig, before: Mapping[str, int], now: Mapping[str, int]) -> str | None:
    """One line where a run that goes on draws other random numbers in its model; None where not.

    What dropout leaves out, and ENTP's sampled prefixes, follow from the seed, the step, the rank
    and the shapes of the rank's batches.

    Args:
        model: of the run.
        before: the `cut` of the checkpoint that the run goes on from.
        now: this attempt's.
    """
    drawing = [
        f"model.{field}={getattr(model, field)}"
        for field in ("dropout", "entp_sampled_prefixes")
        if getattr(model, field)
    ]
    if not drawing or before == now:
        return None
    old, new = (
        f"{one['ranks']} rank(s) × micro_batch {one['micro_batch']}" for one in (before, now)
    )
    return (
        f"{' and '.join(drawing)}: drawn anew on {new} (before: {old}); losses are not those of an "
        "undisturbed run"
    )
