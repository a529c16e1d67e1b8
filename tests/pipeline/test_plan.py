"""What is refused before any work, beyond single settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.assemble import compile_settings
from pipeline.data.flan import FlanStore
from pipeline.data.manifest import read_manifest
from pipeline.options import UserError
from pipeline.plan import (
    describe,
    identity,
    redrawn,
    refuse_other_identity,
    refuse_other_run,
    resolve_model,
    row_length_problems,
)
from pipeline.pretrain import STAGE
from pipeline.run_folder import RunFolder
from tests.distributed.parity import Case, run_config


def test_a_parent_may_be_spelled_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = {"run": {"init_from": "parents/one"}, "data": {}, "model": {}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    folder = RunFolder(tmp_path)
    for spelled in ("parents/one", "parents/../parents/one/", str(tmp_path / "parents" / "one")):
        refuse_other_run(folder, {"run": {"init_from": spelled}})
    for other in ("parents/two", None):
        with pytest.raises(UserError, match="init_from="):
            refuse_other_run(folder, {"run": {"init_from": other}})


def test_rows_longer_than_learned_positions_are_refused(flan_dir: Path) -> None:
    stores = [FlanStore(flan_dir, split) for split in ("train", "heldout")]
    lengths = [
        len(inputs) + len(targets)
        for store in stores
        for inputs, targets, _ in map(store.read, range(len(store)))
    ]
    longest = max(lengths)
    assert max(store.longest_row() for store in stores) == longest
    config = dataclasses.replace(run_config(Case(), Path(), 2), flan=str(flan_dir))

    def problems(**model: object) -> list[str]:
        return list(row_length_problems(dataclasses.replace(config, model=model), stores))

    assert problems(positions="learned", max_seq_len=longest) == []
    assert (
        f"its longest row has {longest} tokens"
        in (problems(positions="learned", max_seq_len=longest - 1)[0])
    )
    assert problems(positions="rotary", max_seq_len=longest - 1) == []


def test_a_shape_whose_default_changed_is_another_run(shards_dir: Path) -> None:
    config, manifest = run_config(Case(), shards_dir, 2), read_manifest(str(shards_dir))
    model = resolve_model(config, manifest.tokenizer.vocab_size)
    document = describe(STAGE, config, model, manifest)
    refuse_other_identity(identity(document), document, "checkpoint c")
    wider = dataclasses.replace(model, d_ffn=model.d_ffn * 2)
    changed = describe(STAGE, config, wider, manifest)
    for before in (identity(document), document):
        with pytest.raises(UserError, match=rf"model.d_ffn={wider.d_ffn}: checkpoint c has"):
            refuse_other_identity(before, changed, "checkpoint c")
    # A checkpoint from before shapes were part of its identity goes on.
    old = {key: value for key, value in identity(document).items() if key != "model"}
    refuse_other_identity(old, document, "checkpoint c")


def test_what_memory_running_out_advises_is_the_same_run(shards_dir: Path) -> None:
    manifest = read_manifest(str(shards_dir))
    documents = []
    for model in ({}, {"activation_checkpointing": True}, {"activation_checkpointing": False}):
        config = dataclasses.replace(run_config(Case(), shards_dir, 2), model=model)
        made = resolve_model(config, manifest.tokenizer.vocab_size)
        documents.append(describe(STAGE, config, made, manifest))
    before, recomputing, plain = documents
    assert before["model"] != recomputing["model"]
    for document in (recomputing, plain):
        refuse_other_identity(identity(before), document, "checkpoint c")
        refuse_other_identity(document, before, "checkpoint c")
    other = {**before, "run": {**before["run"], "model": {"dropout": 0.5}}}
    with pytest.raises(UserError, match="model="):
        refuse_other_identity(before, other, "checkpoint c")


def test_a_run_whose_order_this_version_cannot_make_is_refused(shards_dir: Path) -> None:
    manifest = read_manifest(str(shards_dir))
    assert len(manifest.sources("train")) > 1

    def document(**changed: object) -> dict:
        config = dataclasses.replace(run_config(Case(), shards_dir, 2), **changed)
        model = resolve_model(config, manifest.tokenizer.vocab_size)
        return describe(STAGE, config, model, manifest)

    def earlier(made: dict) -> dict:
        data = {key: value for key, value in made["data"].items() if key != "order"}
        return {**identity(made), "data": data}

    natural = document()
    refuse_other_identity(identity(natural), natural, "checkpoint c")
    with pytest.raises(UserError, match=r"weights=\{\}: checkpoint c reads .* order 1, .* order 2"):
        refuse_other_identity(earlier(natural), natural, "checkpoint c")
    # Given weights come in the order in which they always came.
    weighted = document(weights={"github": 1.0})
    refuse_other_identity(earlier(weighted), weighted, "checkpoint c")


def test_random_draws_that_another_cut_changes_are_told() -> None:
    config = run_config(Case(), Path(), 2)
    plain = resolve_model(config, 64)
    dropping = dataclasses.replace(plain, dropout=0.1)
    sampling = dataclasses.replace(
        resolve_model(run_config(Case("entp"), Path(), 2), 64), entp_sampled_prefixes=4
    )
    two, three = {"ranks": 2, "micro_batch": 6}, {"ranks": 3, "micro_batch": 4}
    finer = {"ranks": 2, "micro_batch": 3}
    assert redrawn(plain, two, three) is None
    assert redrawn(dropping, two, dict(two)) is None
    for model, part in (
        (dropping, "model.dropout=0.1"),
        (sampling, "model.entp_sampled_prefixes=4"),
    ):
        for now in (three, finer):
            line = redrawn(model, two, now) or ""
            assert line.startswith(f"{part}: drawn anew on {now['ranks']} rank(s) × micro_batch")
            assert "(before: 2 rank(s) × micro_batch 6)" in line


@pytest.mark.parametrize(
    ("arch", "changes", "varies"),
    [
        ("decllm", {}, False),
        ("redllm", {}, False),
        ("decllm", {"document_masks": True}, False),
        ("decllm", {"flan": "f"}, True),
        ("redllm", {"objective": "random_prefix"}, True),
        ("decllm", {"objective": "denoise"}, True),
        ("entp", {}, True),
    ],
)
def test_only_batches_of_one_shape_are_compiled_for_it(
    arch: str, changes: dict[str, object], varies: bool
) -> None:
    config = dataclasses.replace(run_config(Case(arch), Path(), 2), **changes)  # type: ignore[arg-type]
    assert compile_settings(config) == ({} if varies else {"dynamic": False})
