"""A supervised run over two hosts goes on when one of them is gone for good."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.entry import flags, losses, run_entry
from tests.distributed.test_launch import wait_for_step
from tests.distributed.two_hosts import PORT, Pair, two_hosts

pytestmark = [pytest.mark.soak, pytest.mark.distributed, pytest.mark.privileged]
STEPS = 60


def supervise(pair: Pair, *told: str) -> subprocess.Popen[str]:
    """`isoflop supervise -- deepspeed --hostfile H pipeline/pretrain.py …` on the first host."""
    python = Path(sys.executable)
    words = [python, "-m", "tools.cli", "supervise", "--backoff=0", "--", python]
    words += [python.parent / "deepspeed", "--quiet", "--hostfile", pair.folder / "hostfile"]
    words += ["--no_ssh_check", "--master_addr", pair.hosts[0].address, f"--master_port={PORT}"]
    environment = {
        "PDSH_SSH_ARGS_APPEND": f"-F {pair.folder}/ssh_config",
        "DS_ENV_FILE": f"{pair.folder}/deepspeed_env",
    }
    return pair.hosts[0].start([*words, "pipeline/pretrain.py", *told], environment)


def test_a_supervised_run_goes_on_without_a_host_that_is_cut_off(
    shards_dir: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    asked = flags(run, shards_dir, steps=STEPS, checkpoint_every=5, stall_timeout=10)
    run_entry("pretrain", 2, {**asked, "run_dir": whole})
    with two_hosts(tmp_path / "hosts") as pair:
        pair.serve_ssh()
        process = supervise(pair, *[f"--{key}={value}" for key, value in asked.items()])
        wait_for_step(run, 12)
        pair.cut_the_cable()
        output, _ = process.communicate(timeout=240)
    print(output)
    assert process.returncode == 0, output
    assert (run / "FINISHED").exists()
    assert (
        "n1 did not answer: 1 rank on 1 host instead of 2 on 2, the most that cut "
        "global_batch=12 into micro-batches of 6"
    ) in output
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
