"""What is exported for DeepSpeed: its own loader goes on where the run was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.options import UserError
from tests.distributed.harness import run_ranks
from tests.distributed.test_checkpoint_layouts import OPTIMIZERS, engine_at, first_leg, train
from tools.cli import dispatch

pytestmark = pytest.mark.distributed
# Both moments, the second alone, both again: the stages to load them at. And what is not carried.
CARRIED = {"adamw": [3, 1], "adafactor": [3], "adafactor_with_momentum": [2]}
REFUSED = {"factored": "column, exp_avg, exp_avg_sq, row", "muon": "exp_avg_sq, momentum_buffer"}


def trained_with(folder: Path, optimizers: list[str]) -> dict[str, list[float]]:
    """On this rank: by optimizer, the losses of three steps, a save, and three more."""
    return {name: first_leg(folder / name / "checkpoints", 3, name, "fp32") for name in optimizers}


def goes_on_in_deepspeed(folder: Path, optimizers: dict[str, list[int]]) -> list[list[float]]:
    """On this rank: DeepSpeed loads each universal checkpoint at its stages and trains on."""
    from pipeline import distributed, zero_layout

    distributed.start(timeout_seconds=60, threads=1)
    found = []
    for optimizer, stages in optimizers.items():
        for stage in stages:
            engine = engine_at(stage, optimizer, "fp32", 7, checkpoint={"load_universal": True})
            path, _ = engine.load_checkpoint(str(folder / optimizer))
            assert path is not None
            # DeepSpeed 0.19.8 gives every flat tensor the same counter of updates, which torch's
            # AdamW then advances once for each: a fault of its stage-3 loader with any universal
            # checkpoint. Adafactor counts for itself.
            if optimizer == "adamw":
                for state in zero_layout.client_optimizer(engine).state.values():
                    state["step"] = state["step"].clone()
            found.append(train(engine, range(3, 6)))
            assert engine.global_steps == 6
            engine.destroy()
    return found


def export(run: Path, out: Path) -> None:
    """By the command, of a run folder that has what the command reads."""
    optimizer = OPTIMIZERS[run.name].get("optimizer", "adamw")
    document = {
        "run": {"optimizer": optimizer, "grad_clip": 1.0},
        "model": {},
        "data": {"path": str(run / "shards"), "tokenizer_sha256": ""},
    }
    (run / "config.json").write_text(json.dumps(document))
    dispatch(["export", str(run), "--output", str(out), "--format", "universal"])


def test_deepspeed_loads_a_universal_export_at_other_stages_and_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "universal"
    whole = run_ranks(trained_with, 2, tmp_path, [*CARRIED, *REFUSED], timeout=240)[0]
    for name in CARRIED:
        export(tmp_path / name, out / name)
        assert "parameters and their moments of" in capsys.readouterr().out
    for name, has in REFUSED.items():
        with pytest.raises(UserError, match=f"optimizer=.*this run has .*{has}; give --format"):
            export(tmp_path / name, out / name)
        assert not (out / name).exists()
    found = run_ranks(goes_on_in_deepspeed, 1, out, CARRIED, timeout=240)[0]
    expected = [whole[name][3:] for name, stages in CARRIED.items() for _ in stages]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    # What a moment that is not there takes: an element.
    sizes = [(out / "adafactor").rglob("exp_avg*.pt"), (out / "adamw").rglob("exp_avg*.pt")]
    none, both = (sum(file.stat().st_size for file in files) for files in sizes)
    assert none < 0.7 * both
