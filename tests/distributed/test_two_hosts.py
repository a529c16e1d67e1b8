"""One run over two hosts: DeepSpeed's launcher by pdsh and without ssh, one that differs, a cut."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.checkpointing.names import list_steps
from tests.distributed.entry import flags, losses, records
from tests.distributed.parity import Case
from tests.distributed.plain_training import plain
from tests.distributed.test_launch import ROOT, wait_for_step
from tests.distributed.two_hosts import Pair, two_hosts

pytestmark = [pytest.mark.distributed, pytest.mark.privileged]
soak = pytest.mark.soak
STEPS, FEW, TOLERANCE = 100, 8, 1e-5
SECONDS = 150  # for a launch to end


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with two_hosts(tmp_path / "hosts") as hosts:
        yield hosts


def finish(process: subprocess.Popen[str], seconds: float = SECONDS) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def check_losses(run: Path, shards: Path, steps: int) -> None:
    """Against one process of plain PyTorch."""
    found, expected = losses(run), [step["loss"] for step in plain(Case(), shards, steps)]
    assert sorted(found) == list(range(1, steps + 1))
    worst = max(abs(found[step] - loss) / loss for step, loss in enumerate(expected, start=1))
    print(f"largest relative difference of a loss over {steps} steps: {worst:.1e}")
    assert worst < TOLERANCE
    nodes = json.loads((run / "preflight.json").read_text())["nodes"]
    assert {name: (node["ranks"], node["interface"]) for name, node in nodes.items()} == {
        "n0": ([0], "left0"),
        "n1": ([1], "right1"),
    }
    assert (run / "FINISHED").exists()


@soak
def test_by_pdsh_the_losses_are_those_of_plain_pytorch(
    pair: Pair, shards_dir: Path, tmp_path: Path
) -> None:
    pair.serve_ssh()
    run = tmp_path / "a run"
    code, output = finish(pair.launch_by_pdsh(flags(run, shards_dir, steps=STEPS)))
    assert code == 0, output
    assert "n0 (rank 0), n1 (rank 1) agree; all-reduce " in output
    check_losses(run, shards_dir, STEPS)


@pytest.mark.parametrize("steps", [FEW, pytest.param(STEPS, marks=soak)])
def test_without_ssh_the_losses_are_those_of_plain_pytorch(
    pair: Pair, shards_dir: Path, tmp_path: Path, steps: int
) -> None:
    run = tmp_path / "run"
    for process in pair.launch_without_ssh(flags(run, shards_dir, steps=steps)):
        code, output = finish(process)
        assert code == 0, output
    check_losses(run, shards_dir, steps)


def other_data(shards: Path, corpus: Path, folder: Path) -> Path:
    """A whole shard folder by the same tokenizer that holds something else."""
    from tools.cli import dispatch

    dispatch(
        f"tokenize --input {corpus} --output {folder} --tokenizer {shards}/tokenizer.model "
        "--block_tokens 1024 --validation_fraction 0.2".split()
    )
    return folder


def changed_copy(file: Path, folder: Path) -> Path:
    """The same code and a remark."""
    copy = folder / file.name
    copy.write_text(file.read_text() + "# Nothing else.\n")
    return copy


def refused(outputs: list[tuple[int, str]], run: Path) -> str:
    """The one line of a launch that all hosts refused."""
    assert [code for code, _ in outputs] == [2] * len(outputs), outputs
    lines = [line for _, text in outputs for line in text.splitlines() if "error: " in line]
    assert len(lines) == 1, outputs
    assert not (run / "metrics.jsonl").exists()
    return lines[0]


def test_a_node_with_other_data_is_named_before_any_training(
    pair: Pair, corpus_dir: Path, shards_dir: Path, tmp_path: Path
) -> None:
    pair.hosts[1].views[shards_dir] = other_data(shards_dir, corpus_dir, tmp_path / "other")
    run, started = tmp_path / "run", time.monotonic()
    launched = pair.launch_without_ssh(flags(run, shards_dir))
    told = refused([finish(process) for process in launched], run)
    print(f"{time.monotonic() - started:.1f} s: {told}")
    assert told.startswith("error: data: n1 (rank 1) has ")
    assert "bring the same folder to every node" in told


@soak
def test_a_node_with_other_code_is_named_before_any_training(
    pair: Pair, shards_dir: Path, tmp_path: Path
) -> None:
    place = ROOT / "pipeline" / "sources.py"
    pair.hosts[1].views[place] = changed_copy(place, tmp_path)
    pair.serve_ssh()
    run = tmp_path / "run"
    told = refused([finish(pair.launch_by_pdsh(flags(run, shards_dir)))], run)
    print(told)
    assert told.startswith("n0: error: code: n1 (rank 1) has ")
    assert "(other pipeline/sources.py), n0 (rank 0) has " in told


@soak
def test_a_run_folder_that_is_not_shared_is_refused(
    pair: Pair, shards_dir: Path, tmp_path: Path
) -> None:
    for name in ("runs", "local"):
        (tmp_path / name).mkdir()
    pair.hosts[1].views[tmp_path / "runs"] = tmp_path / "local"
    run = tmp_path / "runs" / "run"
    launched = pair.launch_without_ssh(flags(run, shards_dir))
    told = refused([finish(process) for process in launched], run)
    print(told)
    assert told.startswith(f"error: n1 (rank 1): run_dir='{run}': does not show what n0 wrote")


def check_cut(pair: Pair, launched: list[subprocess.Popen[str]], run: Path, limit: int) -> None:
    """Cut the cable of a run under way: all end within `limit` and a while, and one is named."""
    wait_for_step(run, 10, timeout=SECONDS)
    pair.cut_the_cable()
    cut = time.monotonic()
    outputs = [finish(process) for process in launched]
    while any("python" in pair.program(pid) for host in pair.hosts for pid in host.processes()):
        assert time.monotonic() - cut < SECONDS, "ranks are left behind"
        time.sleep(0.2)
    seconds = time.monotonic() - cut
    lines = [line for _, text in outputs for line in text.splitlines() if "error: " in line]
    print(f"limit {limit} s: all ended {seconds:.1f} s after the cut", *lines, sep="\n")
    # Ten seconds on a machine that has nothing else to do.
    assert seconds < limit + 40
    assert all(code > 0 for code, _ in outputs), outputs
    assert "error: n1 (rank 1) no longer answers n0 (rank 0): " in lines[0], outputs
    assert "Traceback" not in outputs[0][1]
    assert not (run / "FINISHED").exists()


@soak
def test_a_cut_cable_fails_a_collective_and_the_host_behind_it_is_named(
    pair: Pair, shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # Not less: the start, too, has collectives, and hosts that share two cores are slow to come.
    asked = flags(run, shards_dir, steps=100_000, collective_timeout=15, stall_timeout=0)
    check_cut(pair, pair.launch_without_ssh(asked), run, 15)


@soak
def test_under_pdsh_the_watchdog_ends_a_run_whose_cable_is_cut(
    pair: Pair, shards_dir: Path, tmp_path: Path
) -> None:
    pair.serve_ssh()
    run = tmp_path / "run"
    asked = flags(run, shards_dir, steps=100_000, stall_timeout=8)
    check_cut(pair, [pair.launch_by_pdsh(asked)], run, 8)


@soak
def test_one_hosts_launcher_killed_is_a_fault_to_the_others_and_no_stop(
    pair: Pair, shards_dir: Path, tmp_path: Path
) -> None:
    """All save and leave, and each host's supervisor may start its own again."""
    run = tmp_path / "run"
    first, second = pair.launch_without_ssh(flags(run, shards_dir, steps=100_000))
    wait_for_step(run, 10, timeout=SECONDS)
    (launcher,) = (
        process
        for process in psutil.Process(second.pid).children(recursive=True)
        if "deepspeed.launcher.launch" in process.cmdline()
    )
    launcher.kill()
    code, output = finish(first)
    assert code == 1, output
    assert "as a launcher is gone; the same command goes on" in output
    finish(second)
    assert list_steps(run / "checkpoints") == [len(records(run, "metrics.jsonl"))]
