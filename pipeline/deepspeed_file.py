"""Files of ds_configs/: what they may hold, read strictly before any work.

They decide ZeRO, offload and communication; everything else is RunConfig's, and an overlap is
refused. DeepSpeed itself accepts a key where it means nothing (a stage-3 bucket at stage 1), which
here is a mistake to be told, and finds a wrong value only once every rank has started.
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
# Those that are not a number of elements; sections have their own rules.
ZERO_FLAGS = frozenset(
    {"overlap_comm", "contiguous_gradients", "reduce_scatter", "allgather_partitions"}
)
ZERO_SECTIONS = ("offload_optimizer", "offload_param")
SMALLEST = {"zero_optimization.reduce_bucket_size": 1}  # 0 of the others is a number too
# What an offload may say. Not `ratio` and `super_offload`: DeepSpeed then steps with an Adam of its
# own, whatever the run's optimizer is.
OFFLOAD_TYPES: dict[str, dict[str, type]] = {
    "offload_optimizer": {
        **{"device": str, "nvme_path": str, "pin_memory": bool, "buffer_count": int},
        **{"fast_init": bool, "pipeline_read": bool, "pipeline_write": bool},
    },
    "offload_param": {
        **{"device": str, "nvme_path": str, "pin_memory": bool, "buffer_count": int},
        **{"buffer_size": int, "max_in_cpu": int},
    },
}
COMMUNICATION_TYPES = ("fp32", "bf16", "fp16")
# Of DeepSpeed's log of collectives.
LOGGER_TYPES: dict[str, type] = {
    **{"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
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
    data_type = settings.get("communication_data_type", "fp32")
    if data_type not in COMMUNICATION_TYPES:
        given = ", ".join(COMMUNICATION_TYPES)
        problems.append(f"communication_data_type={data_type!r}; give one of {given}")
    for section, types in (("comms_logger", LOGGER_TYPES), ("aio", AIO_TYPES)):
        problems += section_problems(section, settings.get(section, {}), types)
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
        elif key not in ("stage", *ZERO_SECTIONS):
            kind = bool if key in ZERO_FLAGS else int
            yield from value_problems(f"zero_optimization.{key}", zero[key], kind)
    if zero.get("overlap_comm"):
        yield (
            "overlap_comm=true does not go with a loss that comes in chunks, each added to "
            "gradients that may still be on their way; set it to false"
        )
    for section in ZERO_SECTIONS:
        if section in zero:
            yield from _offload_problems(section, zero[section])


def _offload_problems(section: str, offload: Any) -> Iterable[str]:
    device = offload.get("device") if isinstance(offload, Mapping) else None
    if device not in OFFLOAD_DEVICES:
        yield f"{section}.device={device!r}; give cpu or nvme, or leave the section out"
        return
    if device == "nvme" and not offload.get("nvme_path"):
        yield f"{section}.nvme_path is missing; give a folder on a local disk"
    yield from section_problems(section, offload, OFFLOAD_TYPES[section])


def section_problems(name: str, section: Any, types: Mapping[str, type]) -> Iterable[str]:
    """What is wrong with a section whose keys and their types are `types`."""
    known = ", ".join(sorted(types))
    if not isinstance(section, Mapping):
        yield f"{name}={section!r}; give a section of {known}"
        return
    for key, value in sorted(section.items()):
        if key not in types:
            yield f"{name}.{key} is not supported; give only {known}"
        else:
            yield from value_problems(f"{name}.{key}", value, types[key])


def value_problems(name: str, value: Any, kind: type) -> Iterable[str]:
    """What is wrong with one value; a whole number may be written as 5e8."""
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        yield f"{name}={value!r}; give {_KINDS[kind]}"
    elif kind is int and isinstance(value, int) and value < SMALLEST.get(name, 0):
        yield f"{name}={value}: too small; give at least {SMALLEST.get(name, 0)}"


_KINDS = {bool: "true or false", int: "a whole number", str: "a text", list: "a list"}


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
    for section in ZERO_SECTIONS:
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
