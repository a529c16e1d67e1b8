"""When memory runs out: what was held, and which setting makes it less."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

import psutil

from pipeline.config import RunConfig
from pipeline.config_checks import micro_batch_size
from pipeline.deepspeed_file import offloads, read_deepspeed_file, zero_stage
from pipeline.options import Fault, UserError

_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
)


class OutOfMemory(Fault):
    """In a first step: another start would end the same, and a setting must change."""

    exit_code = UserError.exit_code


@dataclass(frozen=True)
class Held:
    """Sizes where memory ran out, in bytes.

    Attributes:
        asked: what could not be had; 0 where nobody says.
        process: what this process holds.
        machine: what there is.
    """

    asked: int
    process: int
    machine: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is CUDA's, the CPU allocator's or Python's word for no memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _WORDS)


def asked_bytes(text: str) -> int:
    """How much could not be allocated, by the words of torch's allocators; 0 where they are silent.

    CUDA's says "Tried to allocate 2.00 GiB", the CPU's "you tried to allocate 123 bytes".
    """
    found = re.search(r"tried to allocate ([\d.]+)\s*(bytes|[kmgt]ib)", text.lower())
    if found is None:
        return 0
    unit = {"bytes": 0, "kib": 10, "mib": 20, "gib": 30, "tib": 40}[found[2]]
    return int(float(found[1]) * 2**unit)


def held_here(error: BaseException) -> Held:
    """The sizes in this process, as the machine says them."""
    asked, process = asked_bytes(str(error)), psutil.Process().memory_info().rss
    if type(error).__name__ == "OutOfMemoryError":
        import torch

        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return Held(asked, total - free, total)
    return Held(asked, process, psutil.virtual_memory().total)


def advice(config: RunConfig, world_size: int, held: Held, place: str) -> str:
    """One line: what was held, and what to change, the cheapest first."""
    size = micro_batch_size(config, world_size)
    settings = read_deepspeed_file(config.ds_config)
    stage = zero_stage(settings)
    remedies = []
    if place.startswith("phase save") and config.async_checkpoints:
        remedies.append("--async_checkpoints=false (saves then take no copy of the state)")
    if size > 1:
        remedies.append(f"--micro_batch={size // 2} (now {size} sequences at once)")
    if not config.model.get("activation_checkpointing"):
        remedies.append("--model.activation_checkpointing=true")
    if stage < 3:
        remedies.append(f"a ds_config of a higher ZeRO stage than {stage}")
    if not offloads(settings):
        remedies.append("ds_configs/zero3_offload.json, where a GPU's memory ran out")
    remedies.append(f"more ranks than {world_size}")
    remedies.append(f"less than seq_len={config.seq_len}, in another run_dir")
    asked = f"{held.asked / 1e9:.2f} GB were asked for; " if held.asked else ""
    return (
        f"out of memory in {place}: {asked}the process held {held.process / 1e9:.2f} GB of "
        f"{held.machine / 1e9:.2f} GB; try, in this order: {'; '.join(remedies)}"
    )
