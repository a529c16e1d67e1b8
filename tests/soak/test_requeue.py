"""A run that a real Slurm preempts, or whose time ends, goes on as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpointing.names import list_steps
from pipeline.network import address_towards
from tests.distributed.entry import flags, losses, records, run_entry
from tests.soak.slurm_cluster import slurm_cluster

pytestmark = [pytest.mark.soak, pytest.mark.distributed, pytest.mark.privileged]
ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 90


@pytest.fixture(scope="module")
def whole(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run undisturbed."""
    run = tmp_path_factory.mktemp("requeue") / "run"
    run_entry("pretrain", 2, asked(run, shards_dir))
    return run


def asked(run: Path, shards: Path) -> dict[str, Any]:
    """What the run is told."""
    return flags(run, shards, steps=STEPS, **{"model.dropout": 0.1})


@dataclass
class Job:
    """A job of one of the scripts on a Slurm of this test's own."""

    environment: dict[str, str]
    log: Path
    number: str = ""

    def slurm(self, *words: object) -> str:
        """What a command of Slurm's answers."""
        done = subprocess.run(
            [str(word) for word in words],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout.strip()

    def submit(self, script: str, run: Path, config: Path, *flags: str) -> None:
        """Hand the script in."""
        file, log = f"docker/slurm/{script}.sbatch", f"--output={self.log}"
        self.number = self.slurm("sbatch", "--parsable", *flags, log, file, run, config)

    @property
    def told(self) -> str:
        """What the script and the run have printed."""
        return self.log.read_text() if self.log.exists() else ""

    @property
    def is_listed(self) -> bool:
        """Whether Slurm still knows of it."""
        return self.number in self.slurm("squeue", "--noheader", "--format=%i")

    def wait_until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not holds():
            state = self.slurm("squeue", "--long")
            assert time.monotonic() < deadline, f"{state}\n{self.told}"
            time.sleep(0.2)


@contextmanager
def cluster(folder: Path, nodes: int, **settings: str) -> Iterator[Job]:
    """A Slurm of `nodes` nodes, and a job to be."""
    with slurm_cluster(folder / "cluster", nodes) as environment:
        path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        # The names of the nodes are Slurm's alone; their address is this machine's.
        environment |= {"PATH": path, "MASTER_ADDR": own_address(), **settings}
        yield Job(environment, folder / "job.log")


def written(file: Path, told: dict[str, Any]) -> Path:
    """The run's YAML file; its folder is the script's to say."""
    rest = {key: value for key, value in told.items() if key != "run_dir"}
    file.write_text(json.dumps(rest, default=str))
    return file


@pytest.mark.parametrize(
    ("script", "nodes", "settings"),
    [
        ("single_node", 1, {"DEEPSPEED_FLAGS": "--quiet --num_gpus 2"}),
        ("many_nodes", 2, {"SLOTS": "1"}),
    ],
)
def test_a_run_that_is_preempted_twice_has_the_undisturbed_losses(
    script: str,
    nodes: int,
    settings: dict[str, str],
    whole: Path,
    shards_dir: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    config = written(tmp_path / "run.yaml", asked(run, shards_dir))
    with cluster(tmp_path, nodes, **settings) as job:
        place = (f"--nodes={nodes}", f"--cpus-per-task={2 // nodes}")
        job.submit(script, run, config, *place)
        for preemption in (1, 2):
            job.wait_until(lambda: steps_made(run) >= preemption * STEPS // 3, 120)  # noqa: B023
            job.slurm("sbatch", "--partition=urgent", *place, "--output=none", "--wrap=:")
            job.wait_until(lambda: job.told.count("requeued") == preemption, 60)  # noqa: B023
            assert not (run / "FINISHED").exists()
        job.wait_until(lambda: not job.is_listed, 120)
        assert (run / "FINISHED").exists(), job.told
    assert losses(run) == losses(whole)
    # Each start went on exactly where the ranks had stopped.
    made = [(record["step"], record["attempt"]) for record in records(run, "metrics.jsonl")]
    assert [step for step, _ in made] == list(range(1, STEPS + 1))
    assert {attempt for _, attempt in made} == {1, 2, 3}


def test_before_its_time_is_over_a_run_is_saved_and_requeued_and_a_cancelled_one_is_not(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = written(tmp_path / "run.yaml", flags(run, shards_dir, steps=1_000_000))
    with cluster(tmp_path, 1, DEEPSPEED_FLAGS="--quiet --num_gpus 2") as job:
        # Slurm looks at time limits twice a minute.
        job.submit(
            "single_node", run, config, "--cpus-per-task=2", "--time=2", "--signal=B:USR1@60"
        )
        job.wait_until(lambda: "requeued" in job.told, 180)
        saved = max(list_steps(run / "checkpoints"))
        made = steps_made(run)
        assert saved == made, job.told
        job.wait_until(lambda: steps_made(run) > made, 120)
        job.slurm("scancel", job.number)
        job.wait_until(lambda: not job.is_listed, 120)
        assert job.told.count("requeued") == 1, job.told
        assert "cancelled: the ranks save" in job.told
    assert [record["step"] for record in records(run, "metrics.jsonl")] == [
        *range(1, steps_made(run) + 1)
    ]
    assert max(list_steps(run / "checkpoints")) == steps_made(run)


def steps_made(run: Path) -> int:
    """Lines of its metrics."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def own_address() -> str:
    """An address of this machine that is not the loopback."""
    return address_towards("192.0.2.1")
