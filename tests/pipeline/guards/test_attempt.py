"""What is looked at beside one attempt at a run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.guards.attempt import Guards
from pipeline.run_folder import RunFolder
from tests.pipeline.guards.test_verdict import config


@pytest.mark.parametrize("can_be_removed", [True, False])
def test_the_stop_file_is_heard_once_there_is_something_to_save(
    can_be_removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    if not can_be_removed:
        monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.delenv("RANK", raising=False)
    folder, asked = RunFolder(tmp_path), []
    guards = Guards(config(), folder)
    guards.heart.interval = 0.01
    folder.stop_file.touch()
    guards.heart.start()
    time.sleep(0.1)
    assert folder.stop_file.exists()
    guards.on_asked(lambda: asked.append(True))
    deadline = time.monotonic() + 30
    while not asked and time.monotonic() < deadline:
        time.sleep(0.01)
    guards.heart.close()
    assert asked
    assert folder.stop_file.exists() is not can_be_removed
