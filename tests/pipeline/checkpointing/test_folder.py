"""A checkpoint's folder: whole, or refused by name; read whole whatever wrote it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpointing import folder
from pipeline.checkpointing.folder import Damaged, Reader
from pipeline.checkpointing.tensor_file import TensorSpec, write_tensors
from pipeline.options import UserError

WHOLE = {"master/a": torch.arange(10.0).view(2, 5), "optimizer/v/a": torch.randn(2, 5)}


def make(path: Path, cuts: list[list[tuple[int, int]]], **changes: object) -> Path:
    """A checkpoint whose rank r holds [start, end) of each tensor for each of cuts[r]."""
    path.mkdir(parents=True)
    files = {}
    for rank, parts in enumerate(cuts):
        pieces = {
            f"{key}@{start}": tensor.flatten()[start:end]
            for key, tensor in WHOLE.items()
            for start, end in parts
        }
        specs = [TensorSpec(name, part.dtype, tuple(part.shape)) for name, part in pieces.items()]
        name = folder.part_name(rank)
        files[name] = write_tensors(path / name, specs, pieces.values()).sha256
    index = folder.tensor_index((k, t.dtype, tuple(t.shape)) for k, t in WHOLE.items())
    document = {"format": folder.FORMAT, "step": 4, "tensors": index, **changes}
    (path / folder.STATE).write_text(json.dumps(document))
    files[folder.STATE] = folder.sha256_of(path / folder.STATE)
    (path / folder.COMPLETE).write_text(folder.completed_document(4, files))
    return path


@pytest.mark.parametrize(
    "cuts",
    [[[(0, 10)]], [[(0, 3)], [(3, 10)]], [[(7, 10)], [], [(0, 7)]], [[(0, 1), (5, 10)], [(1, 5)]]],
)
def test_every_cut_gives_the_same_tensors(
    cuts: list[list[tuple[int, int]]], tmp_path: Path
) -> None:
    path = make(tmp_path / "step_4", cuts)
    assert folder.fault(path) is None
    with Reader(path) as reader:
        assert reader.keys(folder.MASTER) == ["a"]
        for key, tensor in WHOLE.items():
            assert torch.equal(reader.read(key), tensor)
            for start in range(10):
                for end in range(start, 11):
                    part = torch.empty(end - start)
                    reader.fill(key, start, part)
                    assert torch.equal(part, tensor.flatten()[start:end])
    assert folder.digest(path) == folder.digest(make(tmp_path / "b" / "step_4", [[(0, 10)]]))


@pytest.mark.parametrize(
    "cuts",
    [[[(0, 4), (5, 10)], [(9, 10)]], [[(0, 9)]], [[(0, 4)], [(5, 10)]], [[(0, 6)], [(5, 10)]]],
)
def test_a_gap_or_an_overlap_is_refused(cuts: list[list[tuple[int, int]]], tmp_path: Path) -> None:
    path = make(tmp_path / "step_4", cuts)
    with pytest.raises(Damaged, match="does not hold master/a whole"), Reader(path):
        pass
    assert "does not hold master/a whole" in str(folder.fault(path))


def flip(name: str) -> Callable[[Path], object]:
    def harm(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 16
        (path / name).write_bytes(content)

    return harm


def edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], object]:
    def harm(path: Path) -> None:
        document = json.loads((path / folder.COMPLETE).read_text())
        change(document)
        (path / folder.COMPLETE).write_text(json.dumps(document))

    return harm


def write_state(text: str) -> Callable[[Path], object]:
    """Harm state.json, and list it as if it had been written so."""

    def harm(path: Path) -> None:
        (path / folder.STATE).write_text(text)
        edit(lambda d: d["sha256"].update({folder.STATE: folder.sha256_of(path / folder.STATE)}))(  # type: ignore[attr-defined]
            path
        )

    return harm


PART = folder.part_name(1)
HARMS: list[tuple[Callable[[Path], object], str]] = [
    (flip(PART), f"{PART} is not as it was written"),
    (flip(folder.STATE), "state.json is not as it was written"),
    (lambda path: (path / PART).unlink(), f"{PART} is missing"),
    (lambda path: (path / PART).write_bytes(b""), f"{PART} is not as it was written"),
    (lambda path: (path / folder.COMPLETE).write_text("{"), "COMPLETE.json is unreadable"),
    (lambda path: (path / folder.COMPLETE).write_text("[]"), "COMPLETE.json is unreadable"),
    (edit(lambda d: d.update(step=6)), "COMPLETE.json is that of step 6"),
    (edit(lambda d: d.pop("sha256")), "COMPLETE.json is unreadable"),
    (edit(lambda d: d.update(sha256={})), "does not list a checkpoint's files"),
    (edit(lambda d: d["sha256"].pop(PART)), "does not hold master/a whole"),
    (edit(lambda d: d["sha256"].update({"../x": ""})), "does not list a checkpoint's files"),
    # One bit of it; state.json knows better.
    (edit(lambda d: d.update(format=folder.FORMAT ^ 1)), "COMPLETE.json says format 3"),
    (write_state('{"step": 4, "tens'), "Unterminated string"),
    (write_state("[]"), "tensors"),
    (write_state('{"tensors": []}'), "has no attribute 'items'"),
]


@pytest.mark.parametrize(("harm", "part"), HARMS)
def test_every_harm_is_named(harm: Callable[[Path], object], part: str, tmp_path: Path) -> None:
    path = make(tmp_path / "step_4", [[(0, 3)], [(3, 10)]])
    harm(path)
    found = folder.fault(path)
    assert found is not None
    assert part in found


def test_what_cannot_be_judged_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "step_4", [[(0, 3)], [(3, 10)]])

    def fail(file: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(folder, "sha256_of", fail)
        with pytest.raises(OSError, match="Input/output error"):
            folder.fault(path)
    other = make(tmp_path / "other" / "step_4", [[(0, 10)]], format=1)
    edit(lambda d: d.update(format=1))(other)
    with pytest.raises(UserError, match="it has format 1 and this version of isoflop reads 2"):
        folder.fault(other)


def test_what_a_kill_left_under_a_hidden_name_is_found_where_no_other_is(tmp_path: Path) -> None:
    make(tmp_path / "step_4", [[(0, 10)]])
    for name in (".step_4.replaced", ".step_4.partial", ".step_6.partial", ".step_4.removed"):
        shutil.copytree(tmp_path / "step_4", tmp_path / name)
    (tmp_path / ".step_6.partial" / folder.COMPLETE).unlink()
    assert folder.hidden_whole(tmp_path) == []
    shutil.rmtree(tmp_path / "step_4")
    found = folder.hidden_whole(tmp_path)
    assert [path.name for path in found] == [".step_4.partial", ".step_4.replaced"]
    assert {folder.restored_name(path) for path in found} == {tmp_path / "step_4"}
    flip(folder.part_name(0))(found[0])
    assert folder.fault(found[0]) is not None
    assert folder.fault(found[1]) is None


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    for content in ("first", "second", "third"):
        (tmp_path / "step_4").mkdir()
        (tmp_path / "step_4" / "file").write_text(content)
        folder.set_aside(tmp_path / "step_4")
    aside = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    assert aside == {
        "damaged_step_4": "first",
        "damaged_step_4.2": "second",
        "damaged_step_4.3": "third",
    }


def test_every_single_bit_counts(tmp_path: Path) -> None:
    path = make(tmp_path / "step_4", [[(0, 3)], [(3, 10)]])
    file = path / PART
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert folder.fault(path) is not None
    file.write_bytes(content)
    assert folder.fault(path) is None


def test_what_is_not_complete_is_no_checkpoint(tmp_path: Path) -> None:
    make(tmp_path / "step_4", [[(0, 10)]])
    for name in (".step_6.partial", ".step_2.removed", "step_8", "step_x"):
        shutil.copytree(tmp_path / "step_4", tmp_path / name)
    (tmp_path / "step_8" / folder.COMPLETE).unlink()
    assert folder.list_steps(tmp_path) == [4]
    folder.clear_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_4", "step_8", "step_x"]
