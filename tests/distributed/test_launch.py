"""DeepSpeed's own launcher: a run from start to end, mistakes, stops; kills in test_kills.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.network import free_port
from tests.distributed.entry import flags, losses, records
from tools.demo.command import interrupt_tree

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parent.parent.parent


def launch(entry: str, asked: dict[str, Any], ranks: int = 2) -> subprocess.Popen[str]:
    """`deepspeed --num_gpus RANKS pipeline/ENTRY.py --key=value …`, started."""
    launcher = Path(sys.executable).parent / "deepspeed"
    options = ["--quiet", "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return subprocess.Popen(
        [sys.executable, str(launcher), *options, f"pipeline/{entry}.py"]
        + [f"--{key}={value}" for key, value in asked.items()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str]:
    """Exit code and output, within `timeout` seconds."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def wait_for_step(run: Path, step: int, timeout: float = 90) -> None:
    """Until the run has made `step` steps."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        file = run / "metrics.jsonl"
        if file.exists() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{run} made no {step} steps in {timeout} s")


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and everything below it, children first gathered."""
    top = psutil.Process(pid)
    family = [*top.children(recursive=True), top]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)


@pytest.fixture(scope="module")
def whole(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nobody disturbed."""
    run = tmp_path_factory.mktemp("launch") / "whole"
    code, output = finish(launch("pretrain", long_run(run, shards_dir)))
    assert code == 0, output
    # Of two ranks' DeepSpeed and torch not a word.
    assert [line for line in output.splitlines() if not line.startswith("whole: ")] == []
    assert "whole: starts; decllm nano, " in output
    return run


def long_run(run: Path, shards: Path) -> dict[str, Any]:
    """Long enough to be caught in the middle."""
    return flags(run, shards, steps=150, checkpoint_every=20, **{"model.dropout": 0.1})


def test_a_launched_run_finishes_and_a_second_launch_leaves_it_alone(
    whole: Path, shards_dir: Path
) -> None:
    assert (whole / "FINISHED").exists()
    before = (whole / "metrics.jsonl").read_bytes()
    code, output = finish(launch("pretrain", long_run(whole, shards_dir)))
    assert code == 0
    assert "finished before; nothing to do" in output
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_mistake_under_the_launcher_is_one_line_and_no_run_folder(
    shards_dir: Path, tmp_path: Path
) -> None:
    asked = {**flags(tmp_path / "run", shards_dir), "global_batch": 7}
    code, output = finish(launch("pretrain", asked))
    assert code == 2, output
    assert output.count("error: ") == 1
    assert (
        "global_batch=7: does not divide by 2 ranks × micro_batch 3; give global_batch 6 or 12"
        in output
    )
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_goes_on_where_it_was(
    whole: Path, shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = launch("pretrain", long_run(run, shards_dir))
    wait_for_step(run, 30)
    interrupt_tree(first.pid)
    _, output = finish(first)
    assert "the same command goes on" in output
    assert not (run / "FINISHED").exists()
    code, output = finish(launch("pretrain", long_run(run, shards_dir)))
    assert code == 0, output
    assert "goes on from step" in output
    assert losses(run) == losses(whole)
    # Nothing was repeated: it went on exactly where it stopped.
    assert len(records(run, "metrics.jsonl")) == 150


def test_two_launches_of_one_run_do_not_disturb_each_other(
    whole: Path, shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = launch("pretrain", long_run(run, shards_dir))
    wait_for_step(run, 1)
    # Held still, so that it is not at its end before the other has come to the lock.
    running = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    for process in running:
        process.suspend()
    try:
        code, output = finish(launch("pretrain", long_run(run, shards_dir)))
    finally:
        for process in running:
            process.resume()
    assert code == 1
    assert "is working on it; wait for it or stop it" in output
    code, output = finish(first)
    assert code == 0, output
    assert losses(run) == losses(whole)


@pytest.mark.parametrize(
    ("entry", "argv", "part"),
    [
        ("pretrain", ["--stps=3"], "stps='3': not an option of pipeline/pretrain.py"),
        ("pretrain", ["--config", "nowhere.yaml"], "config='nowhere.yaml': No such file"),
        ("finetune", ["--config=README.md"], "README.md"),
        ("evaluate", ["--run=nowhere"], "run='nowhere': holds no config.json"),
    ],
)
def test_a_mistake_is_told_before_torch_is_imported(entry: str, argv: list[str], part: str) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", f"pipeline/{entry}.py", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(lines) == 1
    assert part in lines[0]
    assert not any(line.endswith(" torch") for line in done.stderr.splitlines())
    assert time.monotonic() - started < 30


def test_a_directory_without_a_manifest_and_a_foreign_run_folder_are_named(
    whole: Path, shards_dir: Path, tmp_path: Path
) -> None:
    for changes, part in (
        ({"data": tmp_path}, "no manifest.json in it"),
        ({"run_dir": whole, "lr": 0.5}, "lr=0.5: the run in"),
        ({"run_dir": whole, "size": "micro"}, "size='micro': the run in"),
        ({"seq_len": 100}, "seq_len=100: does not divide"),
        ({"weights": "books=1"}, "weights='books': no such source"),
        ({"model.layers": 3}, "model.layers='3': not a field of the model"),
        ({"model.num_heads": "two"}, "model.num_heads='two': not a whole number"),
    ):
        asked = {**long_run(tmp_path / "run", shards_dir), **changes}
        done = subprocess.run(
            [sys.executable, "pipeline/pretrain.py", *[f"--{k}={v}" for k, v in asked.items()]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        )
        assert done.returncode == 2, done.stderr
        assert part in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_signals_reach_every_rank_through_one(shards_dir: Path, tmp_path: Path) -> None:
    """SIGTERM to one rank alone: all agree, save and leave."""
    run = tmp_path / "run"
    first = launch("pretrain", long_run(run, shards_dir))
    wait_for_step(run, 10)
    family = psutil.Process(first.pid).children(recursive=True)
    ranks = [process for process in family if not process.children()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGTERM)
    _, output = finish(first)
    assert "stopped after step" in output
    assert any((run / "checkpoints").glob("step_*/COMPLETE.json"))
