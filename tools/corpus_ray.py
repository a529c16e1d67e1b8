"""Runs tasks on a Ray cluster, under datatrove's Ray executor.

The executor returns normally when tasks failed: our records tell. The folder, the inputs and this
installation must lie where the nodes see them under the same paths.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from pipeline.options import UserError
from tools.corpus_step import TaskStep

_WATCH_SECONDS = 0.5


def run_on_ray(step: TaskStep, workers: int, address: str, watch: Callable[[], None]) -> None:
    """Run a step's tasks on the cluster at `address`, at most `workers` at once.

    Args:
        address: of a running cluster, `auto` for the one of this machine, `local` to start one.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            "engine='ray': Ray is not installed; pip install 'isoflop[cluster]'"
        ) from None
    from datatrove.executor.ray import RayPipelineExecutor

    step.prepare()
    logger.disable("datatrove")
    folder = step.output.resolve() / "tasks" / "ray"
    shutil.rmtree(folder, ignore_errors=True)
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"ray_address={address!r}: no Ray cluster there ({' '.join(str(error).split())[:160]})"
            "; start one (ray start --head), or give local"
        ) from None
    executor = RayPipelineExecutor(
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
    finally:
        stop.set()
        watcher.join()
        ray.shutdown()
