"""Runs tasks as a Slurm job array, under datatrove's Slurm executor, and waits for it.

The executor only submits. The folder, the inputs and this installation must lie where the nodes see
them under the same paths.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash
from datatrove.executor.slurm import SlurmPipelineExecutor
from loguru import logger

from pipeline.atomic import write_atomically
from pipeline.options import UserError
from tools.corpus_step import Detached, TaskStep

JOB_NAME = "isoflop-tokenize"
_ARRAY_SIZE = 1000  # Slurm's own limit is 1001 unless its MaxArraySize says otherwise
_JOBS_EACH = 8  # jobs for each worker: few starts of Python, and no worker waits long at the end
_POLL_SECONDS = 2.0
_DEFAULTS = {"time": "24:00:00", "mem-per-cpu": "2G", "cpus-per-task": "1"}


class _JobIds:
    """Takes job ids from what sbatch prints, and keeps them."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, printed: str) -> str:
        self.found.append(printed.split()[-1])
        return self.found[-1]


class _ArrayExecutor(SlurmPipelineExecutor):
    """datatrove adds a job that merges statistics; nobody here reads them."""

    def launch_merge_stats(self) -> None:
        """Leave it out."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """Slurm's default partition where none is named."""
        made = super().get_sbatch_args(max_array)
        return {name: value for name, value in made.items() if name != "partition" or value}


def run_on_slurm(
    step: TaskStep,
    workers: int,
    sbatch: Mapping[str, str],
    detach: bool,
    watch: Callable[[], None],
) -> None:
    """Submit a step's tasks as one array, at most `workers` at once, and wait for its end.

    Args:
        sbatch: options of sbatch, such as partition.

    Raises:
        UserError: sbatch is absent or refuses.
        Detached: the jobs are submitted, and `detach` was asked for.
    """
    check_slurm()
    step.prepare()
    logger.disable("datatrove")
    # Slurm's own words for what datatrove would set come last, and so win.
    arguments = {**_DEFAULTS, **sbatch}
    folder = step.output.resolve() / "tasks" / "slurm"
    shutil.rmtree(folder, ignore_errors=True)
    ids = _JobIds()
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    executor = _ArrayExecutor(
        [step],
        tasks=len(step.tasks),
        time=arguments["time"],
        partition=arguments.get("partition", ""),
        workers=workers,
        job_name=_job_name(step.output),
        qos=arguments.get("qos", ""),
        env_command=(
            f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH "
            f"PYTHONPATH={shlex.quote(path)}"
        ),
        sbatch_args=arguments,
        max_array_size=_ARRAY_SIZE,
        job_id_retriever=ids,
        logging_dir=str(folder),
        slurm_logs_folder=str(folder / "slurm_logs"),
        skip_completed=False,
        tasks_per_job=math.ceil(len(step.tasks) / min(_ARRAY_SIZE, _JOBS_EACH * workers)),
        with_srun=False,
    )
    try:
        executor.run()
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"engine='slurm': sbatch refuses (exit code {error.returncode}); see what it printed, "
            "and --slurm"
        ) from None
    write_atomically(_jobs_path(step.output), json.dumps(ids.found))
    print(f"tokenize: submitted Slurm job {', '.join(ids.found)}", file=sys.stderr)
    if detach:
        raise Detached(f"Slurm job {', '.join(ids.found)} runs; the same command goes on after it")
    _wait(ids.found, watch)
    step.wait_until_told()


def settle_on_slurm(output: Path, detach: bool) -> None:
    """Wait for the jobs of an earlier command on this folder that are still in the queue.

    Raises:
        Detached: there are some, and `detach` was asked for.
    """
    check_slurm()
    jobs = sorted({*_noted_jobs(output), *_named_jobs(output)})
    if not jobs:
        return
    if active := _active(jobs):
        print(f"tokenize: Slurm job {', '.join(jobs)} is still at work", file=sys.stderr)
        if detach:
            raise Detached(f"{active} tasks of it are left; the same command goes on after it")
        _wait(jobs, lambda: None)
    _jobs_path(output).unlink(missing_ok=True)


def _noted_jobs(output: Path) -> list[str]:
    try:
        return [str(job) for job in json.loads(_jobs_path(output).read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def _named_jobs(output: Path) -> list[str]:
    """Jobs on this folder; a command that was killed as it submitted could not note them."""
    found = _squeue(f"--name={_job_name(output)}", "--format=%F")
    return found.stdout.split() if found.returncode == 0 else []


def _job_name(output: Path) -> str:
    return f"{JOB_NAME}-{xxhash.xxh3_64_hexdigest(os.fsencode(output.resolve()))}"


def check_slurm() -> None:
    """Raises UserError where no job can be submitted."""
    if shutil.which("sbatch") is None or shutil.which("squeue") is None:
        raise UserError(
            "engine='slurm': no sbatch or squeue on the PATH; give the command on a machine that "
            "submits jobs, or another --engine"
        )
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UserError(
            "engine='slurm': this is a task of a job array itself; give the command outside of it"
        )


def _jobs_path(output: Path) -> Path:
    return output / "tasks" / "slurm.jobs"


def _wait(jobs: Sequence[str], watch: Callable[[], None]) -> None:
    while _active(jobs):
        watch()
        time.sleep(_POLL_SECONDS)
    watch()


def _active(jobs: Sequence[str]) -> int:
    """Tasks of jobs that are queued or running; 1 when the controller does not answer just now."""
    found = _squeue("--array", f"--jobs={','.join(jobs)}", "--format=%i")
    if found.returncode == 0:
        return len(found.stdout.split())
    # Jobs that ended some minutes ago are not known any more.
    return 0 if "Invalid job id" in found.stderr else 1


def _squeue(*asked: str) -> subprocess.CompletedProcess[str]:
    command = ["squeue", "--noheader", *asked]
    return subprocess.run(command, capture_output=True, text=True, check=False)
