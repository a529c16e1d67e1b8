"""A real Ray cluster on this machine, of one node."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tools.tokenising import ROOT

_START_SECONDS = 90


@dataclass(frozen=True)
class RayCluster:
    """Its address, and what the environment of its users needs."""

    address: str
    environment: dict[str, str]


@contextlib.contextmanager
def ray_cluster(folder: Path) -> Iterator[RayCluster]:
    """Start it, two CPUs large, its log in `folder`."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    flags = ["--num-cpus=2", "--object-store-memory=100000000", "--memory=4000000000"]
    flags += ["--include-dashboard=false", "--port=0", "--block"]
    log = folder / "ray.log"
    with log.open("wb") as file:
        cluster = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", "--head", *flags],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield RayCluster(_address(log), environment)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(cluster.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            cluster.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(cluster.pid, signal.SIGKILL)
        cluster.wait()


def _address(log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if found := re.search(r"--address='([^']+)'", log.read_text()):
            return found[1]
        time.sleep(0.3)
    raise AssertionError(log.read_text())
