"""One run over two hosts: DeepSpeed's launcher by pdsh and without ssh, one that differs, a cut."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.entry import flags, losses
from tests.distributed.parity import Case, plain
from tests.soak.two_hosts import Pair, two_hosts

pytestmark = [pytest.mark.soak, pytest.mark.distributed, pytest.mark.privileged]
STEPS, TOLERANCE = 100, 1e-5
SECONDS = 150  # for a launch to end


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with two_hosts(tmp_path / "hosts") as hosts:
        yield hosts


@pytest.fixture(scope="module")
def expected(shards_dir: Path) -> list[float]:
    """Losses of one process of plain PyTorch."""
    return [step["loss"] for step in plain(Case(), shards_dir, STEPS)]


def finish(process: subprocess.Popen[str], seconds: float = SECONDS) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def check_losses(run: Path, expected: list[float]) -> None:
    found = losses(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    worst = max(abs(found[step] - loss) / loss for step, loss in enumerate(expected, start=1))
    print(f"largest relative difference of a loss over {STEPS} steps: {worst:.1e}")
    assert worst < TOLERANCE
    nodes = json.loads((run / "preflight.json").read_text())["nodes"]
    assert {name: (node["ranks"], node["interface"]) for name, node in nodes.items()} == {
        "n0": ([0], "left0"),
        "n1": ([1], "right1"),
    }
    assert (run / "FINISHED").exists()


def test_by_pdsh_the_losses_are_those_of_plain_pytorch(
    pair: Pair, expected: list[float], shards_dir: Path, tmp_path: Path
) -> None:
    pair.serve_ssh()
    run = tmp_path / "a run"
    code, output = finish(pair.launch_by_pdsh(flags(run, shards_dir, steps=STEPS)))
    assert code == 0, output
    assert "n0 (rank 0), n1 (rank 1) agree; all-reduce " in output
    check_losses(run, expected)


def test_without_ssh_the_losses_are_those_of_plain_pytorch(
    pair: Pair, expected: list[float], shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for process in pair.launch_without_ssh(flags(run, shards_dir, steps=STEPS)):
        code, output = finish(process)
        assert code == 0, output
    check_losses(run, expected)


def other_data(shards: Path, folder: Path) -> dict[Path, Path]:
    """A whole shard folder in the place of `shards` that holds something else."""
    from tools.cli import dispatch

    dispatch(
        f"tokenize --input {shards.parent.parent}/corpus0/wikipedia --output {folder}/shards "
        f"--tokenizer {shards}/tokenizer.model --block_tokens 1024".split()
    )
    return {shards: folder / "shards"}
