"""Runs tasks on a Ray cluster, under datatrove's Ray executor.

Our records tell what is done. The folder, the inputs and this installation must lie where the nodes
see them under the same paths.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from datatrove.executor.ray import RayPipelineExecutor
from loguru import logger

from pipeline.options import UserError
from tools.corpus_records import running_folder
from tools.corpus_step import TaskStep

_WATCH_SECONDS = 0.5
_WAIT_SECONDS = 10.0
_RETRIES = 3  # of a task whose process died
_CONNECT_SECONDS = 10.0
_STILL_SECONDS = 2.5  # who runs tells so about once a second
_ORPHAN_SECONDS = 60.0


class _TaskExecutor(RayPipelineExecutor):
    """datatrove's executor on Ray's own tasks, which are tried again where their process dies.

    It starts an actor and a pool of processes for each of its tasks, and waits for ever where one
    of these is killed.

    Attributes:
        lost: what Ray said of the first task that came to no end.
    """

    lost: str | None = None

    def run(self) -> None:
        """Run every rank once, `workers` at a time."""
        import ray

        memory = int(self.mem_per_cpu_gb * self.cpus_per_task * (1 << 30))
        if not has_room(ray.nodes(), {"CPU": self.cpus_per_task, "memory": memory}):
            # Ray itself would wait without a word; and a cluster may grow.
            print(
                f"tokenize: no node of the Ray cluster has {self.cpus_per_task} CPU and "
                f"{memory / 1e9:.2f} GB of memory, as each task wants: waits for one",
                file=sys.stderr,
            )
        options = {"num_cpus": self.cpus_per_task, "memory": memory, "max_retries": _RETRIES}
        run_rank = ray.remote(**options)(_run_rank)
        itself = ray.put(self)
        waiting, running = deque(range(self.tasks)), []
        while waiting or running:
            while waiting and len(running) < self.workers:
                running.append(run_rank.remote(itself, waiting.popleft()))
            ended, running = ray.wait(running, num_returns=1, timeout=_WAIT_SECONDS)
            for task in ended:
                try:
                    ray.get(task)
                except ray.exceptions.RayError as error:
                    told = str(error).strip().splitlines() or [type(error).__name__]
                    self.lost = self.lost or told[-1][:300]


def has_room(nodes: Iterable[Mapping[str, Any]], asked: Mapping[str, float]) -> bool:
    """Whether one of `ray.nodes()` is large enough for a task, were it idle."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return any(all(has.get(name, 0) >= asked[name] for name in asked) for has in alive)


def _run_rank(executor: RayPipelineExecutor, rank: int) -> None:
    executor._run_for_rank(rank, 1)  # of local rank 0 alone it prints the log


def run_on_ray(step: TaskStep, workers: int, address: str, watch: Callable[[], None]) -> None:
    """Run a step's tasks on the cluster at `address`, at most `workers` at once.

    Args:
        address: of a running cluster, `auto` for the one of this machine, `local` to start one.

    Raises:
        UserError: Ray is not installed, there is no cluster, or it lost tasks.
    """
    ray = _ray()
    step.prepare()
    logger.disable("datatrove")
    folder = step.output.resolve() / "tasks" / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    try:
        _refuse_silence(address)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"ray_address={address!r}: no Ray cluster there ({' '.join(str(error).split())[:160]})"
            "; start one (ray start --head), or give local"
        ) from None
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler tells of a crash.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    executor = _TaskExecutor(
        [step],
        tasks=len(step.tasks),
        workers=workers,
        logging_dir=str(folder),
        skip_completed=False,
        mem_per_cpu_gb=1,
    )
    stop = threading.Event()

    def show() -> None:
        while not stop.wait(_WATCH_SECONDS):
            watch()

    watcher = threading.Thread(target=show, daemon=True)
    watcher.start()
    try:
        executor.run()
    except ray.exceptions.RayError as error:
        raise _lost(str(error)) from None
    finally:
        stop.set()
        watcher.join()
        ray.shutdown()
    if executor.lost is None:
        step.wait_until_told()
    elif not step.is_told():
        raise _lost(executor.lost)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError(
            "engine='ray': Ray is not installed; pip install 'isoflop[cluster]'"
        ) from None
    return ray


def _refuse_silence(address: str) -> None:
    """Raise OSError where nobody listens: Ray itself goes on trying for many minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    if address == "local":
        return
    # What `auto` stands for may be a cluster that is no more.
    place = canonicalize_bootstrap_address(address.removeprefix("ray://"))
    if place is not None:
        host, _, port = place.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _lost(told: str) -> UserError:
    return UserError(
        f"engine='ray': the cluster lost tasks ({' '.join(told.split())[:300]}); the same command "
        "goes on, with fewer --workers if memory was short"
    )


def settle_on_ray(output: Path) -> None:
    """Wait for what a killed command left at work, which Ray ends, on whatever node it is."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    before = _told(output)
    while before and time.monotonic() < deadline:
        time.sleep(_STILL_SECONDS)
        now = _told(output)
        if now == before:
            return
        before = now


def _told(output: Path) -> dict[str, int]:
    """When each running task last said that it runs."""
    told = {}
    for path in running_folder(output).glob("*.running"):
        try:
            told[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return told
