"""Which save ends a run and which does not; what BEST.json names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline import checkpoint
from pipeline.atomic import write_atomically
from pipeline.callbacks.saving import BEST, Saving
from pipeline.checkpointing.writer import Outcome
from pipeline.options import UserError
from pipeline.run_folder import RunFolder


class Scripted:
    """A writer whose saves end as told."""

    def __init__(self, *errors: str) -> None:
        self.errors = list(errors)
        self.started: list[tuple[int, bool]] = []
        self.under_way: Outcome | None = None

    def start(self, pieces: object, state: dict[str, Any], *, background: bool) -> None:
        self.started.append((state["step"], background))
        self.under_way = Outcome(state["step"], self.errors.pop(0))

    def wait(self) -> Outcome | None:
        outcome, self.under_way = self.under_way, None
        return outcome


@pytest.mark.parametrize("saved_at", [2, 3])
@pytest.mark.parametrize("second", ["", "full"])
def test_a_stop_tries_where_the_run_stands_whatever_failed_before(
    saved_at: int, second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """on_failed_save=stop; the save under way is of this step or of one before."""
    monkeypatch.setattr(checkpoint, "pieces", lambda *_: [])
    monkeypatch.setattr(checkpoint, "optimizer_scalars", lambda *_: [])
    saving, writer = Saving({}, "a"), Scripted("full", second)
    saving._writer = writer  # type: ignore[assignment]
    trainer: Any = SimpleNamespace(
        step=saved_at,
        attempt=1,
        engine=None,
        folder=RunFolder(tmp_path),
        world=SimpleNamespace(is_main=True),
        config=SimpleNamespace(async_checkpoints=True, on_failed_save="stop"),
        say=print,
    )
    trainer.record = lambda: {"step": trainer.step}
    saving._save(trainer)
    trainer.step = 3
    if second:
        with pytest.raises(UserError, match="that of step 3 could not be written"):
            saving.on_stop(trainer)
    else:
        saving.on_stop(trainer)
    assert writer.started == [(saved_at, True), (3, False)]


def test_the_best_checkpoint_is_one_of_this_trajectory(tmp_path: Path) -> None:
    saving = Saving({}, "held-out")
    write_atomically(tmp_path / BEST, '{"step": 6, "eval_set": "held-out", "loss": 0.5}\n')
    write_atomically(tmp_path / "step_2" / "COMPLETE.json", "{}")
    saving._name_best(tmp_path)
    assert not (tmp_path / BEST).exists()
    saving._scores = {2: 1.5, 6: 0.5}
    saving._name_best(tmp_path)
    assert json.loads((tmp_path / BEST).read_text())["step"] == 2
