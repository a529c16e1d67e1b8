"""Checkpoints: saved whole or not at all, verified before they are read, loaded on any layout.

A checkpoint holds the fp32 masters and every optimizer state by parameter name, each flattened and
cut as this run's ranks happened to hold it; a load cuts it anew for any number of ranks and any
ZeRO stage. Its files are described in pipeline/checkpointing/folder.py, how they are written in
writer.py, which of them stay in retention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from pipeline import zero_layout
from pipeline.checkpointing import folder
from pipeline.checkpointing.folder import MASTER, OPTIMIZER, Reader, read_state
from pipeline.checkpointing.writer import Piece, Writer
from pipeline.distributed import World, all_agree, same_everywhere
from pipeline.options import Fault, UserError
from pipeline.zero_layout import Fragment

T = TypeVar("T")
__all__ = ["load", "newest_good", "optimizer_scalars", "pieces", "read_state", "save"]


def save(engine: Any, checkpoints: Path, world: World, state: Mapping[str, Any]) -> Path:
    """Write `checkpoints/step_N` for state["step"] = N at once; runs save through callbacks/saving.

    `state` is what a resume needs beside tensors; it must be the same on every rank.
    """
    writer = Writer(checkpoints, world)
    document = {**state, "optimizer": optimizer_scalars(engine)}
    writer.start(pieces(engine, world), document, background=False)
    outcome = writer.wait()
    if outcome is None or outcome.error:
        raise UserError(
            f"checkpoints={str(checkpoints)!r}: could not be written "
            f"({outcome.error if outcome else 'not begun'}); make room there"
        )
    return folder.folder_of(checkpoints, int(state["step"]))


def newest_good(
    checkpoints: Path, world: World, *, restart: bool = False, tidy: bool = True
) -> Path | None:
    """The newest checkpoint whose every file has the hash it was written with; None without any.

    Args:
        restart: None also where there are checkpoints and none is whole.
        tidy: damaged ones are set aside, which only the owner of the run may do.

    Raises UserError where there are checkpoints and none is whole (training never starts over in
    silence), and where one cannot be judged: of another format, or on a disk that does not answer.
    """
    if tidy:
        _restore_hidden(checkpoints, world)
    steps = _on_main(lambda: folder.list_steps(checkpoints), checkpoints, world)
    refused: list[Path] = []
    good = None
    for step in steps:
        path = folder.folder_of(checkpoints, step)
        fault = _agreed_fault(path, world)
        if fault is None:
            good = path
            break
        refused.append(path)
        if world.is_main:
            print(f"checkpoint {path} is refused: {fault}", flush=True)
    if refused and good is None and not restart:
        raise UserError(
            f"checkpoints={str(checkpoints)!r}: none of {len(steps)} is whole; restore one, or "
            "give --restart=true to start over"
        )
    if world.is_main and tidy:
        for path in refused:
            folder.set_aside(path)
    return good


def _restore_hidden(checkpoints: Path, world: World) -> None:
    """Give whole checkpoints that a kill left under hidden names their own names back."""
    for path in _on_main(lambda: folder.hidden_whole(checkpoints), checkpoints, world):
        target = folder.restored_name(path)
        is_taken = _on_main(target.exists, target, world)
        if not is_taken and _agreed_fault(path, world) is None:
            _on_main(partial(path.rename, target), path, world)


def _agreed_fault(path: Path, world: World) -> str | None:
    """What is wrong with the checkpoint; each rank hashes its share and all agree.

    Raises UserError, on every rank, where one could not tell.
    """
    share = slice(world.rank, None, world.size)
    own = _attempt(lambda: folder.hash_fault(path, share=share), path)
    answers: list[tuple[str | None, UserError | None]] = [own] * world.size
    dist.all_gather_object(answers, own)
    for _, error in answers:
        if error is not None:
            raise error
    found = next((fault for fault, _ in answers if fault is not None), None)
    if found is None:
        found = _on_main(lambda: folder.cover_fault(path), path, world)
    return found


def _attempt(look: Callable[[], T], path: Path) -> tuple[T | None, UserError | None]:
    """What `look` finds at `path`; or why it cannot tell, which says nothing of the checkpoint."""
    try:
        return look(), None
    except OSError as error:
        return None, Fault(
            f"checkpoint={str(path)!r}: cannot be read now ({error.strerror or error}); nothing "
            "was changed: see to the disk and give the same command"
        )
    except UserError as error:
        return None, error


def _on_main(look: Callable[[], T], path: Path, world: World) -> T:
    """What rank 0 finds at `path`, on every rank. Raises on every rank what `_attempt` met."""
    found, error = same_everywhere(_attempt(look, path) if world.is_main else None)
    if error is not None:
        raise error
    return found


def load(engine: Any, path: Path, world: World, *, weights_only: bool = False) -> dict[str, Any]:
    """Fill the engine from a checkpoint of any world size and stage; returns its state.json.

    Args:
        path: a checkpoint that `newest_good` returned.
        weights_only: leave the optimizer as it is (finetuning).
    """
    error: UserError | None = None
    state: dict[str, Any] = {}
    try:
        with Reader(path) as reader:
            state = reader.state
            _fill(engine, reader, weights_only=weights_only)
    except (UserError, folder.Damaged, OSError, SafetensorError) as caught:
        # What was whole a moment ago is damaged or out of reach: the next start judges it anew.
        unread = Fault(f"checkpoint={str(path)!r}: cannot be read ({caught})")
        error = caught if isinstance(caught, UserError) else unread
    if not all_agree(error is None):
        raise error or Fault(f"checkpoint={str(path)!r}: refused by another rank")
    zero_layout.publish_masters(engine)
    return state


def _fill(engine: Any, reader: Reader, *, weights_only: bool) -> None:
    fragments = zero_layout.fragments(engine)
    _refuse_other_model(fragments, reader)
    for fragment in fragments:
        master = fragment.of(fragment.flat.detach())
        reader.fill(MASTER + fragment.name, fragment.start, master)
    if weights_only:
        return
    _make_optimizer_state(engine, fragments, reader)
    for fragment in fragments:
        for key, value in _flat_states(engine, fragment.flat).items():
            name = f"{OPTIMIZER}{key}/{fragment.name}"
            _refuse_absent(name, reader)
            reader.fill(name, *fragment.kept(key, value))
    for key, value in zero_layout.replicated_state(engine).items():
        _refuse_absent(OPTIMIZER + key, reader)
        reader.fill(OPTIMIZER + key, 0, value.view(-1))


def _refuse_absent(name: str, reader: Reader) -> None:
    if name not in reader.shapes:
        raise UserError(
            f"checkpoint={str(reader.path)!r}: holds no {name}; give the optimizer it was written "
            "with"
        )


def _refuse_other_model(fragments: list[Fragment], reader: Reader) -> None:
    ours = {fragment.name: tuple(fragment.shape) for fragment in fragments}
    theirs = {name: reader.shapes[MASTER + name] for name in reader.keys(MASTER)}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"checkpoint={str(reader.path)!r}: does not fit this model ({name} is "
                f"{theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here); give "
                "the configuration it was written with"
            )


def pieces(engine: Any, world: World) -> list[Piece]:
    """Views of this rank's parts of the masters and the optimizer states, equally many on all."""
    found = []
    for fragment in zero_layout.fragments(engine):
        parts = {MASTER: fragment.of(fragment.flat.detach())} | {
            f"{OPTIMIZER}{key}/": fragment.owned(key, value)
            for key, value in _flat_states(engine, fragment.flat).items()
        }
        for prefix, held in parts.items():
            key, shape = prefix + fragment.name, tuple(fragment.shape)
            if fragment.replicated:
                found.append(_share(key, shape, held, world))
            else:
                found.append(Piece(key, shape, fragment.start, held))
    for key, value in zero_layout.replicated_state(engine).items():
        found.append(_share(OPTIMIZER + key, tuple(value.shape), value.view(-1), world))
    return found


def _share(key: str, shape: tuple[int, ...], whole: torch.Tensor, world: World) -> Piece:
    """The part that this rank writes of what every rank holds."""
    each = -(-whole.numel() // world.size)
    start = min(world.rank * each, whole.numel())
    return Piece(key, shape, start, whole[start : start + each])


def _flat_states(engine: Any, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """The optimizer states of one flat tensor that are tensors cut in slices."""
    return {
        key: value
        for key, value in zero_layout.optimizer_state(engine, flat).items()
        if torch.is_tensor(value) and value.dim() > 0
    }


def optimizer_scalars(engine: Any) -> list[dict[str, Any]]:
    """Optimizer states that are single numbers, each with the parameters that it belongs to."""
    found: dict[tuple[str, float, bool], list[str]] = {}
    for fragment in zero_layout.fragments(engine):
        for key, value in zero_layout.optimizer_state(engine, fragment.flat).items():
            is_tensor = torch.is_tensor(value)
            if not is_tensor or value.dim() == 0:
                number = value.item() if is_tensor else value
                found.setdefault((key, number, is_tensor), []).append(fragment.name)
    return [
        {"key": key, "value": value, "tensor": is_tensor, "parameters": names}
        for (key, value, is_tensor), names in found.items()
    ]


def _make_optimizer_state(engine: Any, fragments: list[Fragment], reader: Reader) -> None:
    """Create the optimizer's state as its first step would, to be filled by the load."""
    states = zero_layout.client_optimizer(engine).state
    kinds: dict[str, list[str]] = {}
    for full in set(reader.keys(OPTIMIZER)) - set(zero_layout.replicated_state(engine)):
        key, _, name = full.partition("/")
        kinds.setdefault(name, []).append(key)
    scalars: dict[str, dict[str, Any]] = {}
    for entry in reader.state["optimizer"]:
        for name in entry["parameters"]:
            scalars.setdefault(name, {})[entry["key"]] = entry
    of_flat: dict[int, list[Fragment]] = {}
    for fragment in fragments:
        of_flat.setdefault(id(fragment.flat), []).append(fragment)
    for fragment in fragments:
        flat, state = fragment.flat, states[fragment.flat]
        for key, entry in scalars.get(fragment.name, {}).items():
            value = entry["value"]
            if entry["tensor"]:
                value = torch.tensor(value, dtype=torch.float32, device=flat.device)
            state[key] = value
        for key in kinds.get(fragment.name, []):
            # All fragments of one flat tensor share its states.
            if key not in state or not torch.is_tensor(state[key]):
                dtype = reader.dtype(f"{OPTIMIZER}{key}/{fragment.name}")
                state[key] = zero_layout.empty_state(key, of_flat[id(flat)], dtype)
