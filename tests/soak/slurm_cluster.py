"""A real Slurm cluster on this machine: Debian's munged, slurmctld, and a slurmd for each node.

What is submitted to its partition `urgent` preempts what runs in `main`, which is requeued.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.network import free_port

_START_SECONDS = 60


def _configuration(folder: Path, spool: Path, host: str, nodes: list[str]) -> str:
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
        f"CPUs={2 // len(nodes)} RealMemory=4000 State=UNKNOWN"
        for node in nodes
    ]
    described = "\n".join(lines)
    return f"""
ClusterName=isoflop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={spool}/munge,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
{described}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def _install() -> None:
    if shutil.which("slurmctld") and shutil.which("slurmd") and shutil.which("munged"):
        return
    if os.getuid() == 0 and shutil.which("apt-get"):
        install = "apt-get install -y -qq --no-install-recommends slurm-wlm munge"
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in ("apt-get update -qq", install):
            subprocess.run(command.split(), env=environment, capture_output=True, check=False)
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip("no Slurm: Debian's slurm-wlm and munge could not be installed")


@contextlib.contextmanager
def slurm_cluster(folder: Path, num_nodes: int = 1) -> Iterator[dict[str, str]]:
    """Start the daemons in `folder`; yields what the environment of its users needs.

    The nodes, at most two, share out two CPUs.
    """
    if os.getuid() != 0:
        pytest.skip("Slurm's daemons need root")
    _install()
    host = socket.gethostname().partition(".")[0]
    for name in ("munge", "state"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
    # Sockets lie here: their paths may have 108 characters.
    short = tempfile.TemporaryDirectory(prefix="slurm-")
    spool = Path(short.name)
    (folder / "slurm.conf").write_text(_configuration(folder, spool, host, nodes))
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
    munge += [f"--{name}={folder}/munge/{name}" for name in ("pid-file", "log-file")]
    munge += [f"--socket={spool}/munge"]
    munge += [f"--seed-file={folder}/munge/seed"]
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        slurmds = [["slurmd", "-D", "-N", node] for node in nodes]
        for command in (munge, ["slurmctld", "-D", "-i"], *slurmds):
            log = open(folder / f"{command[0]}{len(daemons)}.out", "wb")  # noqa: SIM115 (its own)
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
            time.sleep(1)
        _await_node(folder, environment)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(20)
            daemon.kill()
            daemon.wait()
        short.cleanup()


def _await_node(folder: Path, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        asked = ["sinfo", "--noheader", "--format=%t"]
        found = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
        if found.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "".join(path.read_text()[-1500:] for path in folder.glob("slurm*.log"))
    raise AssertionError(f"Slurm did not start: {found.stdout}{found.stderr}{logs}")
