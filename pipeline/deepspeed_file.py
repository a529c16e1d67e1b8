"""Files of ds_configs/: what they may hold, read strictly before any work.

They decide ZeRO, offload and communication; everything else is RunConfig's, and an overlap is
refused. DeepSpeed itself accepts a key where it means nothing (a stage-3 bucket at stage 1), which
here is a mistake to be told.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.options import UserError

# What a DeepSpeed file may hold; the rest is RunConfig's.
DEEPSPEED_KEYS = frozenset({"zero_optimization", "communication_data_type", "comms_logger", "aio"})
STAGES = (0, 1, 2, 3)
# What of zero_optimization is supported, and at which stages it means something.
ZERO_KEYS: dict[str, tuple[int, ...]] = {
    "stage": STAGES,
    "overlap_comm": STAGES,
    "contiguous_gradients": (1, 2, 3),
    "reduce_scatter": (1, 2, 3),
    "reduce_bucket_size": (1, 2, 3),
    "allgather_partitions": (1, 2),
    "allgather_bucket_size": (1, 2),
    "sub_group_size": (3,),
    "stage3_prefetch_bucket_size": (3,),
    "stage3_param_persistence_threshold": (3,),
    "stage3_model_persistence_threshold": (3,),
    "stage3_max_live_parameters": (3,),
    "stage3_max_reuse_distance": (3,),
    "offload_optimizer": (1, 2, 3),
    "offload_param": (3,),
}
# Of reading and writing NVMe disks, to which DeepSpeed does not hold a file.
AIO_TYPES: dict[str, type] = {
    "block_size": int,
    "queue_depth": int,
    "intra_op_parallelism": int,
    "single_submit": bool,
    "overlap_events": bool,
    "use_gds": bool,
}
OFFLOAD_DEVICES = ("cpu", "nvme")


def read_deepspeed_file(path: str) -> dict[str, Any]:
    """The DeepSpeed settings of one file of ds_configs/.

    Raises UserError, with every mistake at once, for a key that RunConfig owns, one that is not
    supported or means nothing at the file's stage, and an offload that cannot be.
    """
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"ds_config={path!r}: {error.strerror}; give a file of ds_configs/"
        ) from error
    except ValueError as error:
        raise UserError(f"ds_config={path!r}: not JSON ({error}); mend the file") from error
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict):
        raise UserError(f"ds_config={path!r}: has no zero_optimization section; add one")
    problems = []
    foreign = sorted(set(settings) - DEEPSPEED_KEYS)
    if foreign:
        problems.append(
            f"holds {', '.join(foreign)}, which the run's own configuration decides; remove it "
            "there"
        )
    problems += zero_problems(zero)
    problems += aio_problems(settings.get("aio", {}))
    if problems:
        raise UserError(f"ds_config={path!r}: {'; '.join(problems)}")
    return dict(settings)


def zero_problems(zero: Mapping[str, Any]) -> Iterable[str]:
    """What is wrong with a zero_optimization section."""
    stage = zero.get("stage")
    if stage not in STAGES or isinstance(stage, bool):
        yield f"zero_optimization.stage={stage!r}; give 0, 1, 2 or 3"
        return
    for key in sorted(zero):
        if key not in ZERO_KEYS:
            yield (
                f"zero_optimization.{key} is not supported; give only "
                f"{', '.join(sorted(ZERO_KEYS))}"
            )
        elif stage not in ZERO_KEYS[key]:
            stages = ", ".join(map(str, ZERO_KEYS[key]))
            yield f"zero_optimization.{key} means nothing at stage {stage}, only at {stages}"
    if zero.get("overlap_comm"):
        yield (
            "overlap_comm=true does not go with a loss that comes in chunks, each added to "
            "gradients that may still be on their way; set it to false"
        )
    for section in ("offload_optimizer", "offload_param"):
        if section in zero:
            yield from _offload_problems(section, zero[section])


def _offload_problems(section: str, offload: Any) -> Iterable[str]:
    device = offload.get("device") if isinstance(offload, Mapping) else None
    if device not in OFFLOAD_DEVICES:
        yield f"{section}.device={device!r}; give cpu or nvme, or leave the section out"
    elif device == "nvme" and not offload.get("nvme_path"):
        yield f"{section}.nvme_path is missing; give a folder on a local disk"


def aio_problems(aio: Any) -> Iterable[str]:
    """What is wrong with an aio section."""
    known = ", ".join(sorted(AIO_TYPES))
    if not isinstance(aio, Mapping):
        yield f"aio={aio!r}; give a section of {known}"
        return
    for key, value in sorted(aio.items()):
        if key not in AIO_TYPES:
            yield f"aio.{key} is not supported; give only {known}"
        elif type(value) is not AIO_TYPES[key]:
            yield f"aio.{key}={value!r}; give a value of type {AIO_TYPES[key].__name__}"


def zero_stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a file that was read."""
    return int(settings["zero_optimization"]["stage"])


def offloads(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state leaves the device."""
    return "offload_optimizer" in settings["zero_optimization"]


def run_problems(
    settings: Mapping[str, Any], *, precision: str, compiled: bool = False
) -> Iterable[str]:
    """What a file cannot do with what a run asks for."""
    for section in ("offload_optimizer", "offload_param"):
        if settings["zero_optimization"].get(section, {}).get("device") == "nvme":
            yield (
                f"{section}.device='nvme': DeepSpeed then keeps no fp32 masters in memory, and "
                "optimizers and checkpoints here are bound to them; give cpu, or more ranks"
            )
    if compiled and zero_stage(settings) == 3:
        yield (
            "compile=true: torch.compile cannot follow stage 3, which gathers parameters around "
            "each module; give a ds_config of stage 0 to 2, or leave compile out"
        )
    compiler = os.environ.get("CXX", "g++")
    if compiled and shutil.which(compiler) is None:
        yield f"compile=true: finds no C++ compiler {compiler!r}; install one or set CXX"
    if zero_stage(settings) == 0 and precision != "fp32":
        yield (
            f"precision={precision!r}: stage 0 keeps no fp32 masters of its own; give "
            "precision=fp32, or a ds_config of stage 1 to 3"
        )
