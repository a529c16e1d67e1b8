"""What one rank states before training: its code, and whether there is room for the run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from pipeline import preflight, pretrain
from pipeline.options import UserError
from pipeline.plan import Plan, check_run
from tests.distributed.entry import flags

ROOT = Path(__file__).resolve().parent.parent.parent


def plan(run: Path, shards: object, **changes: Any) -> Plan:
    """A tiny run's."""
    asked = {**flags(run, ROOT), "data": shards, **changes}
    return check_run(pretrain.STAGE, [f"--{key}={value}" for key, value in asked.items()])


def test_every_file_of_the_code_is_in_its_fingerprint() -> None:
    files = preflight.code_files()
    for name in ("models/decllm.py", "pipeline/data/loader.py", "tools/cli.py"):
        assert files[name] == hashlib.sha256((ROOT / name).read_bytes()).hexdigest()[:16]
    assert len(preflight.code_digest()) == 64


def test_a_run_without_room_for_one_checkpoint_is_refused(
    shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(tmp_path / "run", shards_dir)
    # AdamW keeps three numbers of four bytes for each parameter.
    needed = 12 * made.document["parameters"]["total"]
    monkeypatch.setattr(preflight, "_free_bytes", lambda plan: {"run_dir": free, "cache_dir": 0})
    free = needed
    assert preflight.Preflight(lambda: made).facts[0].problem == ""
    free = needed - 1
    with pytest.raises(UserError, match=r"run_dir='.*/run': 0\.001 GB are free, a checkpoint"):
        preflight.Preflight(lambda: made)
    patient = plan(tmp_path / "run", shards_dir, on_failed_save="go_on")
    assert preflight.Preflight(lambda: patient).facts[0].problem == ""


def test_what_a_killed_save_has_left_is_room_for_the_next(
    shards_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plan(tmp_path / "run", shards_dir)
    used = preflight.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: used)
    before = preflight._free_bytes(made)
    for name in (".step_4.partial", "step_2"):
        folder = made.folder.checkpoints / name
        folder.mkdir(parents=True)
        (folder / "rank_00000.safetensors").write_bytes(bytes(1 << 20))
    after = preflight._free_bytes(made)
    assert after["cache_dir"] == before["cache_dir"]
    # A file system may count a block more for itself.
    assert 1 << 20 <= after["run_dir"] - before["run_dir"] < (1 << 20) + (1 << 16)
    # One that is whole is restored, and not removed.
    (made.folder.checkpoints / ".step_4.partial" / "COMPLETE.json").write_text("{}")
    assert preflight._free_bytes(made) == before


def test_a_cache_without_room_for_what_it_may_take_is_refused(
    shards_dir: Path, tmp_path: Path
) -> None:
    made = plan(tmp_path / "run", f"file://{shards_dir}", cache_dir=tmp_path / "cache")
    shards = sum(path.stat().st_size for path in shards_dir.rglob("*.tar"))
    free = {"run_dir": 1 << 40, "cache_dir": shards}
    problems = list(preflight.room_problems(made, free))
    assert problems == []
    free["cache_dir"] = 0
    (problem,) = preflight.room_problems(made, free)
    assert f"cache_dir='{tmp_path}/cache': 0.000 GB are free, cache_gb=100 may take" in problem
