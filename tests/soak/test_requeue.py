"""A run that a real Slurm preempts twice ends as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    run, log, config = (tmp_path / name for name in ("run", "job.log", "run.yaml"))
    told = {key: value for key, value in asked(run, shards_dir).items() if key != "run_dir"}
    config.write_text(json.dumps(told, default=str))
    with slurm_cluster(tmp_path / "cluster", nodes) as environment:
        path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        # The names of the nodes are Slurm's alone; their address is this machine's.
        environment |= {"PATH": path, "MASTER_ADDR": own_address(), **settings}

        def slurm(*words: object) -> str:
            done = subprocess.run(
                [str(word) for word in words],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
                timeout=60,
            )
            return done.stdout.strip()

        def state() -> str:
            return f"{slurm('squeue', '--long')}\n{log.read_text() if log.exists() else ''}"

        def wait_until(holds: Callable[[], bool], seconds: float) -> None:
            deadline = time.monotonic() + seconds
            while not holds():
                assert time.monotonic() < deadline, state()
                time.sleep(0.2)

        place = (f"--nodes={nodes}", f"--cpus-per-task={2 // nodes}")
        file = f"docker/slurm/{script}.sbatch"
        job = slurm("sbatch", "--parsable", *place, f"--output={log}", file, run, config)
        for preemption in (1, 2):
            wait_until(lambda: steps_made(run) >= preemption * STEPS // 3, 120)  # noqa: B023
            slurm("sbatch", "--partition=urgent", *place, "--output=none", "--wrap=:")
            wait_until(lambda: log.read_text().count("requeued") == preemption, 60)  # noqa: B023
            assert not (run / "FINISHED").exists()
        wait_until(lambda: job not in slurm("squeue", "--noheader", "--format=%i"), 120)
        assert (run / "FINISHED").exists(), state()
    assert losses(run) == losses(whole)
    # Each start went on exactly where the ranks had stopped.
    made = [(record["step"], record["attempt"]) for record in records(run, "metrics.jsonl")]
    assert [step for step, _ in made] == list(range(1, STEPS + 1))
    assert {attempt for _, attempt in made} == {1, 2, 3}


def steps_made(run: Path) -> int:
    """Lines of its metrics."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def own_address() -> str:
    """An address of this machine that is not the loopback."""
    return address_towards("192.0.2.1")
