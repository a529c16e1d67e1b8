"""On how many ranks a run can go on when hosts or GPUs are gone."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.atomic import write_atomically
from pipeline.config_checks import micro_batch_size
from pipeline.options import UserError
from tools.supervise.launch import Launch

DEFAULT_HOSTFILE = "/job/hostfile"  # DeepSpeed's
_PROBE_SECONDS, _PROBE_PAUSE = 20, 5.0


class NoRanks(Exception):
    """Nothing is left that the run could go on with now."""


def largest_world(global_batch: int, micro_batch: int, available: int) -> int:
    """The most ranks, at most `available`, that cut the global batch into whole micro-batches.

    0 where not even one does.
    """
    return next(
        (ranks for ranks in range(available, 0, -1) if global_batch % (ranks * micro_batch) == 0), 0
    )


def spread(slots: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The slots that `ranks` ranks take: hosts are filled in their order, empty ones left out."""
    taken: dict[str, int] = {}
    for host, count in slots.items():
        taken[host] = min(count, ranks)
        ranks -= taken[host]
    return {host: count for host, count in taken.items() if count}


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"hostfile={str(path)!r}: {error.strerror}; give a hostfile") from error
    slots: dict[str, int] = {}
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.match(r"(\S+)\s+slots=(\d+)", line.strip())
        if found is None or found[1] in slots:
            raise UserError(
                f"hostfile={str(path)!r}: {line.strip()!r} is not understood; give a line such as "
                "'node-1 slots=8' for each host"
            )
        slots[found[1]] = int(found[2])
    return slots


def fit(launch: Launch, probe: str) -> tuple[Launch, str]:
    """The launch on what is there now, and a line that says what is not; "" where nothing is gone.

    Args:
        probe: a command that succeeds where {host} answers; "" for ssh as DeepSpeed uses it.

    Raises:
        NoRanks: not one rank is left.
        UserError: the hostfile cannot be read.
    """
    if not launch.uses_deepspeed or launch.flag("no_ssh") is not None:
        return launch, ""
    if launch.flag("include") is not None or launch.flag("exclude") is not None:
        return launch, ""
    hostfile = Path(launch.flag("hostfile") or DEFAULT_HOSTFILE)
    if launch.flag("hostfile") is None and not hostfile.exists():
        return _fit_one_host(launch)
    return _fit_hosts(launch, asked_slots(launch, hostfile), probe or _ssh(launch))


def asked_slots(launch: Launch, hostfile: Path) -> dict[str, int]:
    """Slots by host as DeepSpeed's launcher would take them. Raises UserError."""
    slots = read_hostfile(hostfile)
    nodes, gpus = _number(launch, "num_nodes"), _number(launch, "num_gpus")
    chosen = list(slots)[: nodes if nodes > 0 else None]
    return {host: gpus if gpus > 0 else slots[host] for host in chosen}


def _number(launch: Launch, flag: str) -> int:
    """What a flag of the launcher says; 0 where it is absent or means all."""
    text = launch.flag(flag)
    try:
        return max(0, int(text)) if text is not None else 0
    except ValueError:
        raise UserError(f"{flag}={text!r}: not a whole number; give one such as 8") from None


def _fit_hosts(launch: Launch, slots: dict[str, int], probe: str) -> tuple[Launch, str]:
    program = shlex.split(probe)[0]
    if shutil.which(program) is None:
        raise UserError(
            f"probe={probe!r}: there is no {program} here; give a command that succeeds where "
            "{host} answers"
        )
    with ThreadPoolExecutor(max(1, min(64, len(slots)))) as pool:
        answers = dict(zip(slots, pool.map(lambda host: _answers(probe, host), slots), strict=True))
    if all(answers.values()):
        return launch, ""
    left = {host: count for host, count in slots.items() if answers[host]}
    gone = ", ".join(host for host in slots if host not in left)
    full, micro = sum(slots.values()), micro_batch_size(launch.config, sum(slots.values()))
    ranks = _ranks_of(launch, micro, sum(left.values()), f"{gone} did not answer")
    used = spread(left, ranks)
    hostfile = launch.run_dir / ".hostfile_left"  # the run folder may hold the user's own
    write_atomically(hostfile, "".join(f"{host} slots={count}\n" for host, count in used.items()))
    fitted = launch.with_flag("hostfile", str(hostfile))
    fitted = fitted.without_flag("num_nodes").without_flag("num_gpus")
    if len(used) == 1:
        # Else the launcher would start the ranks here, wherever that host is.
        fitted = fitted.with_flag("force_multi")
    if next(iter(slots)) not in used:
        fitted = fitted.without_flag("master_addr")
    return _keep_micro_batch(fitted, micro), (
        f"{gone} did not answer: {_count(ranks, 'rank')} on {_count(len(used), 'host')} instead of "
        f"{full} on {len(slots)}, "
        f"{_reason(launch, micro)}"
    )


def _fit_one_host(launch: Launch) -> tuple[Launch, str]:
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        # Somebody, Slurm for one, chose among them; given a number the launcher would forget that.
        return launch, ""
    visible = visible_gpus()
    asked = _number(launch, "num_gpus")
    if visible is None or 0 < asked <= visible:
        return launch, ""
    # Without a number DeepSpeed takes all GPUs, and each rank its share of the batch at once.
    micro = micro_batch_size(launch.config, asked) if asked else launch.config.micro_batch or 1
    state = f"{visible} GPUs are visible"
    ranks = _ranks_of(launch, micro, visible, state)
    if not asked and ranks == visible:
        return launch, ""
    fitted = launch.with_flag("num_gpus", str(ranks))
    return _keep_micro_batch(fitted, micro) if asked else fitted, (
        f"{state}: {_count(ranks, 'rank')} instead of {asked or visible}, {_reason(launch, micro)}"
    )


def _ranks_of(launch: Launch, micro: int, available: int, state: str) -> int:
    ranks = largest_world(launch.config.global_batch, micro, available)
    if ranks == 0:
        raise NoRanks(
            f"{state}: no number of ranks up to the {available} that are left cuts "
            f"global_batch={launch.config.global_batch} into micro-batches of {micro}"
            if available
            else f"{state}: nothing is left to go on with"
        )
    return ranks


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _reason(launch: Launch, micro: int) -> str:
    return (
        f"the most that cut global_batch={launch.config.global_batch} into micro-batches of {micro}"
    )


def _keep_micro_batch(launch: Launch, micro: int) -> Launch:
    """By default fewer ranks would hold more sequences at once, which need not fit."""
    return launch if launch.config.micro_batch else launch.told("micro_batch", micro)


def visible_gpus() -> int | None:
    """How many GPUs the driver lists; None where there is no driver to ask."""
    if shutil.which("nvidia-smi") is None or os.environ.get("DS_ACCELERATOR") == "cpu":
        return None
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60
        )
    except subprocess.TimeoutExpired:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _ssh(launch: Launch) -> str:
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    words += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    if port := launch.flag("ssh_port"):
        words += ["-p", port]
    return shlex.join([*words, "{host}", "true"])


def _answers(probe: str, host: str) -> bool:
    """Whether one of two probes succeeds: without a host a run may go on for weeks."""
    words = [word.replace("{host}", host) for word in shlex.split(probe)]
    if _succeeds(words):
        return True
    time.sleep(_PROBE_PAUSE)
    return _succeeds(words)


def _succeeds(words: list[str]) -> bool:
    # No pipes: an ssh that keeps its connection open for later would hold them.
    nowhere = subprocess.DEVNULL
    try:
        done = subprocess.run(
            words,
            stdin=nowhere,
            stdout=nowhere,
            stderr=nowhere,
            check=False,
            timeout=_PROBE_SECONDS,
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    return done.returncode == 0
