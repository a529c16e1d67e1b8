"""A disk that does not answer at a start says nothing of a checkpoint, and may answer later."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.distributed import World
from pipeline.options import Fault, UserError

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), 1),
        (UserError("step_3: of another format"), 2),
    ],
)
def test_another_start_may_read_what_this_one_cannot(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(folder: Path) -> list[Path]:
        raise error

    # As it comes from another rank.
    monkeypatch.setattr(
        checkpoint, "same_everywhere", lambda value: pickle.loads(pickle.dumps(value))
    )
    monkeypatch.setattr(checkpoint.folder, "hidden_whole", fail)
    with pytest.raises(UserError) as caught:
        checkpoint.newest_good(tmp_path, ALONE)
    assert caught.value.exit_code == code
    assert isinstance(caught.value, Fault) == (code == 1)
