"""What the watchdog knows of work that rightly takes long."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.guards import rollback
from pipeline.guards.heartbeat import Heart
from pipeline.guards.stalls import LONG_PHASES
from pipeline.run_state import RunState
from tests.pipeline.guards.test_verdict import config, record


def test_a_rollback_has_the_time_that_a_start_has(monkeypatch: pytest.MonkeyPatch) -> None:
    heart, asked = Heart(), config(loss_spikes="rollback")
    trainer: Any = SimpleNamespace(
        config=asked,
        heart=heart,
        folder=SimpleNamespace(checkpoints=Path("c"), rollbacks=lambda: 0),
        world=SimpleNamespace(is_main=False),
        engine=None,
        attempt=1,
        start=None,
        state=RunState.of(asked),
        # The last callback's phase is what stays.
        notify=lambda *_: heart.begin("evaluate"),
        say=lambda _: None,
    )
    phases = []

    def found(*_: Any) -> Path:
        phases.append(heart.phase)
        return Path("c/step_3")

    monkeypatch.setattr(rollback.checkpoint, "newest_good", found)

    def load(*_: Any) -> dict[str, int]:
        phases.append(heart.phase)
        return {"step": 3}

    monkeypatch.setattr(rollback.checkpoint, "read_state", lambda _: {"step": 3})
    monkeypatch.setattr(rollback.checkpoint, "load", load)
    monkeypatch.setattr(rollback, "same_everywhere", lambda _: 0)
    rollback.roll_back(trainer, [record(5)], "why")
    assert phases == ["load", "load"]
    assert set(phases) <= LONG_PHASES
    assert (trainer.state.step, trainer.state.positions.discarded) == (3, {4})
