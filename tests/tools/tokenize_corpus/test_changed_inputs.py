"""Inputs that are written while or after they are read: refused by name, or read again."""

import gzip
import os
import random
import shutil

import pytest

from pipeline.data.manifest import read_manifest
from pipeline.options import UserError
from tests.tools.tokenising import content
from tests.tools.tokenize_corpus.small import line, run

LARGE = {"task_bytes": 100_000, "shard_bytes": 100_000}


@pytest.fixture
def inputs(tmp_path):
    """A plain file of several tasks and a packed one, over twice what a probe reads of an end."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(b"".join(line(f"{i} text " * 20) for i in range(1500)))
    texts = (random.Random(i).randbytes(400).hex() for i in range(600))
    packed = gzip.compress(b"".join(map(line, texts)), 1, mtime=0)
    assert len(packed) > 200_000
    (tmp_path / "in/b.jsonl.gz").write_bytes(packed)
    return tmp_path / "in"


def other_byte(path, position):
    """The next t becomes T, or the other way round."""
    position = path.read_bytes().lower().index(b"t", position)
    with open(path, "r+b") as file:
        file.seek(position)
        letter = file.read(1)
        file.seek(position)
        file.write(letter.swapcase())


def swapped(path, position=150_000):
    """Its middle is another; it tells the size and time that it had."""
    before = path.stat()
    other_byte(path, position)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "told", "dedup"),
    [
        (lambda path: other_byte(path, 150_000), "between byte 100,000 and 200,000;", "none"),
        (swapped, "between byte 100,000 and 200,000;", "exact"),
        (lambda path: swapped(path, path.stat().st_size - 40), "between byte 300,000 and", "none"),
        (lambda path: path.write_bytes(path.read_bytes() + line("more")), "had 3.*now: 3", "none"),
        (os.unlink, "No such file", "none"),
    ],
    ids=["middle", "swapped", "swapped end", "appended", "gone"],
)
def test_an_input_that_changes_meanwhile_is_refused_by_name(
    model, inputs, tmp_path, monkeypatch, change, told, dedup
):
    from tools import corpus_stage

    run_stage = corpus_stage.run_stage

    def run_then_change(*given):
        run_stage(*given)
        change(inputs / "a.jsonl")

    monkeypatch.setattr(corpus_stage, "run_stage", run_then_change)
    with pytest.raises(UserError, match=rf"input='.*/in/a\.jsonl': changed .*{told}") as caught:
        run(inputs, model, tmp_path / "out", dedup=dedup, **LARGE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_an_input_that_was_written_between_two_commands_is_refused(
    model, inputs, tmp_path, monkeypatch, dedup, capsys
):
    from tools import corpus_dedup, corpus_finaliser

    given = {"dedup": dedup, **LARGE}
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopped = corpus_dedup if dedup == "exact" else corpus_finaliser
        name = "find_duplicates" if dedup == "exact" else "write_manifest"
        patch.setattr(stopped, name, lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(inputs, model, out, **given)
    swapped(inputs / "a.jsonl")
    with pytest.raises(UserError, match=r"in/a\.jsonl': changed since it was read.*100,000 and 20"):
        run(inputs, model, out, **given)
    # Brought back, its bytes tell that it is the same.
    swapped(inputs / "a.jsonl")
    capsys.readouterr()
    run(inputs, model, out, **given)
    assert "a.jsonl may have changed since it was read: read again" in capsys.readouterr().err
    assert content(out) == content(run(inputs, model, tmp_path / "again", **given))


@pytest.mark.parametrize(
    ("name", "restored"), [("a.jsonl", False), ("a.jsonl", True), ("b.jsonl.gz", True)]
)
def test_a_change_in_the_middle_is_refused_by_a_finished_output(
    model, inputs, tmp_path, name, restored, capsys
):
    out = run(inputs, model, tmp_path / "out", **LARGE)
    made = content(out)
    path = inputs / name
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[150_000] ^= 1
    path.write_bytes(data)
    if restored:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=rf"in/{name}': changed since it was read for .*/out"):
        run(inputs, model, out, **LARGE)
    assert content(out) == made
    # Again, as a refusal must not make it pass.
    with pytest.raises(UserError, match="changed since it was read"):
        run(inputs, model, out, **LARGE)
    data[150_000] ^= 1
    path.write_bytes(data)
    capsys.readouterr()
    run(inputs, model, out, **LARGE)
    run(inputs, model, out, **LARGE)
    # Once: what was found the same is not asked again.
    assert capsys.readouterr().err.count("read again") == 1
    assert content(out) == made


def test_a_copied_corpus_is_read_once_and_found_the_same(model, inputs, tmp_path, capsys):
    out = run(inputs, model, tmp_path / "out", **LARGE)
    made = content(out)
    shutil.copytree(inputs, tmp_path / "copy", copy_function=shutil.copyfile)
    for _ in range(2):
        run(tmp_path / "copy", model, out, **LARGE)
    told = capsys.readouterr().err
    assert told.count("a.jsonl (and 1 more) may have changed since it was read: read again") == 1
    assert content(out) == made
    swapped(tmp_path / "copy/a.jsonl")
    with pytest.raises(UserError, match=r"copy/a\.jsonl': changed since it was read"):
        run(tmp_path / "copy", model, out, **LARGE)


def test_a_finished_output_that_lost_its_records_says_what_it_cannot_tell(
    model, inputs, tmp_path, capsys
):
    out = run(inputs, model, tmp_path / "out", **LARGE)
    (out / "tasks/000001.json").unlink()
    (out / "tasks/000002.json").write_text("{}")
    run(inputs, model, out, **LARGE)
    told = capsys.readouterr().err
    assert "2 of its tasks' records are missing or damaged" in told
    assert read_manifest(out).inputs[0].path == "a.jsonl"


def test_a_finished_output_that_cannot_be_written_is_proved_all_the_same(
    model, inputs, tmp_path, monkeypatch, capsys
):
    out = run(inputs, model, tmp_path / "out", **LARGE)
    os.utime(inputs / "a.jsonl")

    def refuse(*given, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", refuse)
    run(inputs, model, out, **LARGE)
    assert "read again" in capsys.readouterr().err


@pytest.mark.parametrize("unit", [100, 1_000, 10_000_000, 1_000_000_000])
def test_an_output_that_keeps_less_of_a_time_costs_no_other_look(
    model, inputs, tmp_path, monkeypatch, unit, capsys
):
    stamped = os.utime

    def kept(path, *, ns):
        stamped(path, ns=tuple(time // unit * unit for time in ns))

    monkeypatch.setattr(os, "utime", kept)
    run(inputs, model, run(inputs, model, tmp_path / "out", **LARGE), **LARGE)
    assert "read again" not in capsys.readouterr().err
