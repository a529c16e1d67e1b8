"""Exports, read back by others: safetensors' reader, a plain model, transformers' Llama."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from pipeline.options import UserError
from tests.distributed.entry import flags, records, run_entry
from tools.cli import dispatch
from tools.export.llama import refusals

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def run(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained DecLLM that is a Llama but for the scale of its embedding."""
    run = tmp_path_factory.mktemp("export") / "run"
    changes = {"model.qkv_norm": "false", "steps": 4, "checkpoint_every": 2, "eval_every": 2}
    run_entry("pretrain", 2, flags(run, shards_dir, **changes))
    return run


def model_of(folder: Path) -> Any:
    """The model that an export describes, with its weights, by nothing of ours that writes them."""
    from models.config import ModelConfig
    from models.registry import build

    document = json.loads((folder / "config.json").read_text())
    model = build(ModelConfig(**document["model"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def held_out(shards: Path) -> torch.Tensor:
    """The held-out sequences that the run's evaluations score, [10, 16]."""
    from pipeline.data.loader import SequenceStore

    store = SequenceStore(shards, "validation", 16)
    rows = [store.read(*row)[0].astype("int64") for row in store.evaluation_choice(10)]
    return torch.stack([torch.from_numpy(row) for row in rows])


@torch.no_grad()
def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Nats of the second halves, by torch's own cross-entropy."""
    return float(F.cross_entropy(logits[:, 8:].flatten(0, 1).double(), ids[:, 8:].flatten()))


@torch.no_grad()
def test_one_file_holds_the_model_that_was_scored(
    run: Path, shards_dir: Path, tmp_path: Path
) -> None:
    from pipeline.objectives import causal

    ids = held_out(shards_dir)
    batch = causal(ids, torch.full((10,), 16), 1)
    evals = {r["step"]: r["loss"] for r in records(run, "eval.jsonl")}
    best = min(evals, key=evals.__getitem__)
    for step, expected in (("newest", evals[4]), ("2", evals[2]), ("best", evals[best])):
        out = tmp_path / step
        dispatch(["export", str(run), "--output", str(out), "--step", step])
        model = model_of(out)
        assert loss_of(model.logits(batch), ids) == pytest.approx(expected, rel=1e-6)
        assert (out / "tokenizer.model").read_bytes() == (
            shards_dir / "tokenizer.model"
        ).read_bytes()
    dispatch(["export", str(run), "--output", str(tmp_path / "bf16"), "--dtype", "bf16"])
    whole, half = (load_file(tmp_path / n / "model.safetensors") for n in ("newest", "bf16"))
    assert all(torch.equal(whole[name].bfloat16(), half[name]) for name in whole)


def test_a_universal_checkpoint_holds_the_weights_and_the_moments(
    run: Path, tmp_path: Path
) -> None:
    """DeepSpeed itself goes on from one in tests/distributed/test_universal.py."""
    dispatch(["export", str(run), "--output", str(tmp_path / "own")])
    out = tmp_path / "universal"
    dispatch(["export", str(run), "--output", str(out), "--format", "universal"])
    zero = out / (out / "latest_universal").read_text() / "zero"
    for name, weights in load_file(tmp_path / "own" / "model.safetensors").items():
        held = {file.stem: torch.load(file) for file in (zero / name).iterdir()}
        assert torch.equal(held["fp32"]["param"], weights), name
        assert held["step"] == 4
        assert held["exp_avg"]["param"].any(), name
        assert (held["exp_avg_sq"]["param"] >= 0).all(), name
    other = ["--output", str(tmp_path / "x"), "--format", "universal", "--dtype", "bf16"]
    with pytest.raises(UserError, match="dtype='bf16': a universal checkpoint holds fp32"):
        dispatch(["export", str(run), *other])


@torch.no_grad()
def test_transformers_llama_gives_the_same_logits(
    run: Path, shards_dir: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from pipeline.objectives import causal

    dispatch(["export", str(run), "--output", str(tmp_path / "own")])
    dispatch(["export", str(run), "--output", str(tmp_path / "hf"), "--format", "hf"])
    ids = held_out(shards_dir)
    batch = causal(ids, torch.full((10,), 16), 1)
    llama, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    theirs = llama(batch.input_ids).logits
    torch.testing.assert_close(theirs, model_of(tmp_path / "own").logits(batch))
    assert loss_of(theirs, ids) == pytest.approx(records(run, "eval.jsonl")[-1]["loss"], rel=1e-5)


def test_a_model_that_is_no_llama_is_refused_field_by_field(run: Path, tmp_path: Path) -> None:
    model = json.loads((run / "config.json").read_text())["model"]
    assert list(refusals(model)) == []
    told = list(refusals({**model, "qkv_norm": True, "arch": "redllm"}))
    assert [line.partition("=")[0] for line in told] == ["arch", "qkv_norm"]
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    document = json.loads((run / "config.json").read_text())
    document["model"]["qkv_norm"] = True
    (changed / "config.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="qkv_norm=True: Llama does not norm Q, K and V"):
        dispatch(["export", str(changed), "--output", str(tmp_path / "o"), "--format", "hf"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "run"
    shutil.copytree(run, changed)
    part = changed / "checkpoints" / "step_4" / "rank_00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    dispatch(["export", str(changed), "--output", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "step_4 is refused: rank_00000.safetensors is not as it was written" in told
    assert json.loads((tmp_path / "out" / "config.json").read_text())["step"] == 2
    for step, words in (("4", "no whole checkpoint"), ("3", "has checkpoints of 2, 4; give one")):
        with pytest.raises(UserError, match=words):
            dispatch(["export", str(changed), "--output", str(tmp_path / "x"), "--step", step])
    with pytest.raises(UserError, match="is there already"):
        dispatch(["export", str(run), "--output", str(tmp_path / "out")])
