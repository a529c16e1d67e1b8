"""Checkpoints: saved whole or not at all, verified before they are read, loaded at any world size.

`checkpoints/step_N/` holds the fp32 masters and every optimizer state by parameter name, flattened,
as sharded one-dimensional tensors in torch's distributed-checkpoint format; `state.json` with what
is not a tensor; and `COMPLETE.json`, the sha256 of each file. A checkpoint is written under a
temporary name, hashed by the ranks that wrote it, and renamed last.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pipeline import zero_layout
from pipeline.atomic import write_atomically
from pipeline.distributed import World, all_agree, barrier, same_everywhere
from pipeline.options import UserError

FORMAT = 1
COMPLETE = "COMPLETE.json"


def save(engine: Any, folder: Path, world: World, state: Mapping[str, Any], keep: int) -> Path:
    """Write `folder/step_N` for state["step"] = N and remove all but the newest `keep`.

    `state` is what a resume needs beside tensors; it must be the same on every rank.
    """
    target = folder / f"step_{state['step']}"
    temporary = folder / f".step_{state['step']}.partial"
    if world.is_main:
        # What a killed save left behind, of this step or another.
        for leftover in folder.glob(".step_*"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
    barrier()
    tensors, scalars = _sharded_state(engine, world)
    try:
        dcp.save(tensors, checkpoint_id=str(temporary))
        error = ""
    except (dcp.CheckpointException, OSError, RuntimeError) as caught:
        error = str(caught).splitlines()[-1]
    if not all_agree(not error):
        raise UserError(
            f"checkpoint={str(target)!r}: could not be written ({error or 'on another rank'}); "
            "make room there, and the same command goes on from the checkpoint before"
        )
    if world.is_main:
        document = {"format": FORMAT, **state, "optimizer": scalars}
        write_atomically(temporary / "state.json", json.dumps(document, indent=2) + "\n")
    barrier()
    hashes: list[Any] = [None] * world.size
    written = sorted(file.name for file in temporary.iterdir()) if world.is_main else None
    dist.all_gather_object(hashes, _hash_files(_share(temporary, world, same_everywhere(written))))
    if world.is_main:
        merged = {name: digest for part in hashes for name, digest in part.items()}
        document = {"format": FORMAT, "step": state["step"], "sha256": merged}
        write_atomically(temporary / COMPLETE, json.dumps(document, indent=2) + "\n")
        if target.exists():
            target.rename(folder / f".step_{state['step']}.replaced")
        temporary.rename(target)
        shutil.rmtree(folder / f".step_{state['step']}.replaced", ignore_errors=True)
        for old in list_steps(folder)[keep:]:
            shutil.rmtree(folder / f"step_{old}")
    barrier()
    return target


def list_steps(folder: Path) -> list[int]:
    """Steps that have a folder with a COMPLETE.json, newest first."""
    found = []
    for path in folder.glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match and (path / COMPLETE).exists():
            found.append(int(match.group(1)))
    return sorted(found, reverse=True)


def newest_good(folder: Path, world: World) -> Path | None:
    """The newest checkpoint whose every file has the hash it was written with; None without any.

    Raises UserError where there are checkpoints and none is whole: training never starts over in
    silence.
    """
    steps = same_everywhere(list_steps(folder) if world.is_main else None)
    refused: list[Path] = []
    for step in steps:
        path = folder / f"step_{step}"
        fault = _fault(path, world)
        if fault is None:
            if world.is_main:
                _set_aside(refused)
            return path
        refused.append(path)
        if world.is_main:
            print(f"checkpoint {path} is refused: {fault}", flush=True)
    if steps:
        raise UserError(
            f"checkpoints={str(folder)!r}: none of {len(steps)} is whole; restore one, or give "
            "another run_dir to start over"
        )
    return None


def _set_aside(refused: list[Path]) -> None:
    """Rename damaged checkpoints, so that they do not count among those to keep."""
    for path in refused:
        aside = path.with_name(f"damaged_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def _fault(path: Path, world: World) -> str | None:
    """What is wrong with the checkpoint; each rank hashes its share and all agree."""
    fault = None
    try:
        expected = json.loads((path / COMPLETE).read_text(encoding="utf-8"))["sha256"]
        for file in _share(path, world, sorted(expected)):
            if not file.exists():
                fault = f"{file.name} is missing"
            elif _sha256(file) != expected[file.name]:
                fault = f"{file.name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"{COMPLETE} is unreadable ({error})"
    faults: list[Any] = [None] * world.size
    dist.all_gather_object(faults, fault)
    return next((each for each in faults if each is not None), None)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint that `newest_good` returned."""
    return dict(json.loads((path / "state.json").read_text(encoding="utf-8")))


def load(engine: Any, path: Path, world: World, *, weights_only: bool = False) -> dict[str, Any]:
    """Fill the engine from a checkpoint of any world size; returns its state.json.

    Args:
        weights_only: leave the optimizer as it is (finetuning).
    """
    state = read_state(path)
    if not weights_only:
        _make_optimizer_state(engine, state["optimizer"])
    tensors, _ = _sharded_state(engine, world, weights_only=weights_only)
    try:
        dcp.load(tensors, checkpoint_id=str(path))
        error = ""
    except (dcp.CheckpointException, RuntimeError, ValueError) as caught:
        error = str(caught).splitlines()[0]
    if not all_agree(not error):
        raise UserError(
            f"checkpoint={str(path)!r}: does not fit this model ({error or 'on another rank'}); "
            "give the configuration it was written with"
        )
    zero_layout.publish_masters(engine)
    return state


def _sharded_state(
    engine: Any, world: World, *, weights_only: bool = False
) -> tuple[dict[str, DTensor], dict[str, Any]]:
    """Views of this rank's masters and optimizer states as sharded tensors, and the scalars."""
    mesh = init_device_mesh(world.device.type, (world.size,))
    tensors: dict[str, DTensor] = {}
    scalars: dict[str, Any] = {"tensors": [], "scalars": {}}
    for fragment in zero_layout.fragments(engine):
        master = fragment.of(fragment.flat.detach())
        tensors[f"master/{fragment.name}"] = _sharded(master, fragment.numel, mesh)
        if weights_only:
            continue
        for key, value in zero_layout.optimizer_state(engine, fragment.flat).items():
            if torch.is_tensor(value) and value.numel() == fragment.flat.numel() > 1:
                local = fragment.of(value)
                tensors[f"optimizer/{key}/{fragment.name}"] = _sharded(local, fragment.numel, mesh)
                if key not in scalars["tensors"]:
                    scalars["tensors"].append(key)
            else:
                scalars["scalars"][key] = float(value)
    return tensors, scalars


def _sharded(local: torch.Tensor, numel: int, mesh: DeviceMesh) -> DTensor:
    shape = torch.Size([numel])
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=(1,))


def _make_optimizer_state(engine: Any, saved: Mapping[str, Any]) -> None:
    """Create the optimizer's state as its first step would, to be filled by the load."""
    states = engine.optimizer.optimizer.state
    for flat in zero_layout.flat_tensors(engine):
        state: dict[str, Any] = {
            key: torch.tensor(value, dtype=torch.float32, device=flat.device)
            for key, value in saved["scalars"].items()
        }
        for key in saved["tensors"]:
            state[key] = torch.zeros_like(flat.detach())
        states[flat] = state


def _share(path: Path, world: World, names: list[str]) -> list[Path]:
    return [path / name for name in names[world.rank :: world.size]]


def _hash_files(files: list[Path]) -> dict[str, str]:
    return {file.name: _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
