"""DeepSpeed's universal checkpoint, written without DeepSpeed.

`DIR/step_N/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt` beside what DeepSpeed 0.19.8 reads of
the engine's and the optimizer's own state; `DIR/latest_universal` names the step. The format is
torch.save's, a pickle: it is written here, never read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.checkpointing.folder import MASTER, OPTIMIZER
from pipeline.options import UserError

if TYPE_CHECKING:
    from tools.export.command import Source

# AdamW has both; unfactored Adafactor the second, and the first where it has momentum.
FIRST, SECOND = MOMENTS = ("exp_avg", "exp_avg_sq")
DEEPSPEED = "0.19.8"
# DeepSpeed overwrites its optimizer's groups, in order, with those of the file. Empty ones leave
# them as the user set them; a run has a few groups, and those that are too many are not read.
_GROUPS = 64


def write(source: Source, folder: Path) -> str:
    """The checkpoint. Raises UserError where the optimizer has not what the format carries."""
    reader = source.reader
    names = reader.keys(MASTER)
    keys = {name.partition("/")[0] for name in reader.keys(OPTIMIZER)}
    if not {SECOND} <= keys <= set(MOMENTS):
        optimizer = source.document["run"]["optimizer"]
        raise UserError(
            f"optimizer={optimizer!r}: DeepSpeed's universal format carries {' and '.join(MOMENTS)}"
            f" and this run has {', '.join(sorted(keys)) or 'neither'}; give --format safetensors"
        )
    updates = _updates(reader.state["optimizer"])
    tag = f"step_{reader.state['step']}"
    target = folder / tag
    for name in names:
        place = target / "zero" / name
        place.mkdir(parents=True)
        weights = reader.read(MASTER + name)
        _save(place / "fp32.pt", {"param": weights, "cat_dim": 0})
        for moment in MOMENTS:
            # Stage 3 asks for both: zeros, that take no room, for one that the optimizer has not.
            tensor = torch.zeros(1).expand(weights.shape)
            if moment in keys:
                tensor = reader.read(f"{OPTIMIZER}{moment}/{name}")
            _save(place / f"{moment}.pt", {"param": tensor, "cat_dim": 0})
        _save(place / "step.pt", updates)
    groups: list[dict[str, Any]] = [{"params": []} for _ in range(_GROUPS)]
    optimizer_state = {
        "optimizer_state_dict": {"state": {0: {"step": updates}}, "param_groups": groups},
        "param_groups": groups,
        "clip_grad": source.document["run"]["grad_clip"],
        "ds_version": DEEPSPEED,
    }
    _save(target / "zero" / "optimizer_state.pt", optimizer_state)
    engine_state = {
        "module": {},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": reader.state["step"],
        "skipped_steps": 0,
        "ds_version": DEEPSPEED,
        "lr_scheduler": None,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }
    # The first is looked for at stages 1 and 2, the second at stage 3.
    for file in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        _save(target / file, engine_state)
    (folder / "latest_universal").write_text(tag, encoding="utf-8")
    return f"{len(names)} parameters and their moments"


def _save(path: Path, value: object) -> None:
    torch.save(value, path)


def _updates(scalars: list[dict[str, Any]]) -> torch.Tensor:
    """How many updates the optimizer made, as AdamW keeps it."""
    found = {entry["value"] for entry in scalars if entry["key"] == "step"}
    if len(found) != 1:
        raise UserError(f"optimizer: made {sorted(found)} updates; one number is expected")
    return torch.tensor(float(found.pop()))
