"""No number of workers, place, kill or damage on the way shows in the bytes."""

import os
import random
import signal
import time

import pytest

from pipeline.options import UserError
from tests.tools.tokenising import content, start
from tests.tools.tokenize_corpus.small import arguments, run


def test_two_workers_write_the_same_bytes(corpus, model, shards, tmp_path):
    assert content(run(corpus[0], model, tmp_path / "two", workers=2)) == content(shards)


def test_another_place_gives_the_same_bytes(corpus, model, shards, tmp_path):
    import shutil

    shutil.copytree(corpus[0], tmp_path / "moved")
    assert content(run(tmp_path / "moved", model, tmp_path / "out")) == content(shards)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(corpus, model, shards, tmp_path):
    output = tmp_path / "killed"
    # The tasks are slowed down, so that kills fall among them and not into the imports.
    slow = (
        "import time, tools.corpus_tasks as t; made = t.encoder_of\n"
        "t.encoder_of = lambda tokenizer: (time.sleep(0.05), made(tokenizer))[1]\n"
        "from tools.cli import main; main()"
    )
    generator = random.Random(3)
    partly = 0
    for _ in range(3):
        process = start(arguments(corpus[0], model, output), slow)
        before = len(list(output.glob("tasks/0*.json")))
        deadline = time.monotonic() + 30
        more = generator.randint(1, 3)
        while len(list(output.glob("tasks/0*.json"))) < before + more:
            assert time.monotonic() < deadline
            if process.poll() is not None:
                break
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        partly += not (output / "manifest.json").exists()
    assert partly == 3
    (output / "train/github/.shard-000000-000.tar.1.partial").write_text("of a killed run")
    run(corpus[0], model, output)
    assert content(output) == content(shards)


def test_a_killed_finaliser_is_repeated(corpus, model, shards, tmp_path, monkeypatch):
    from tools import corpus_finaliser

    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_finaliser, "write_manifest", die)
        with pytest.raises(KeyboardInterrupt):
            run(corpus[0], model, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
    assert content(run(corpus[0], model, tmp_path / "out")) == content(shards)


@pytest.mark.parametrize("damage", ["record", "tails", "missing shard", "shard"])
def test_what_was_damaged_before_the_end_is_made_again(
    corpus, model, shards, tmp_path, monkeypatch, damage, capsys
):
    from tools import corpus_finaliser

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(corpus_finaliser, "write_manifest", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(corpus[0], model, output)
    path = {
        "record": output / "tasks/000003.json",
        "tails": output / "tasks/000003.tails.npz",
    }.get(damage, next((output / "train").glob("*/shard-000003-000.tar")))
    if damage == "missing shard":
        path.unlink()
    else:
        flip(path)
    assert content(run(corpus[0], model, output)) == content(shards)
    told = f"{path.relative_to(output)} is damaged: task 3 runs again"
    assert (told in capsys.readouterr().err) == (damage == "shard")


@pytest.mark.parametrize("kind", ["tails.npz", "rejects.jsonl"])
def test_what_is_damaged_under_the_command_is_not_used(
    corpus, model, shards, tmp_path, monkeypatch, kind
):
    from tools import corpus_finaliser

    join_rejects = corpus_finaliser._join_rejects

    def damaged_meanwhile(output, records):
        flip(min(tmp_path.glob(f"out/tasks/*.{kind}")))
        join_rejects(output, records)

    with monkeypatch.context() as patch:
        patch.setattr(corpus_finaliser, "_join_rejects", damaged_meanwhile)
        with pytest.raises(UserError, match=rf"tasks/\d+\.{kind} is damaged; give the same"):
            run(corpus[0], model, tmp_path / "out")
    assert content(run(corpus[0], model, tmp_path / "out")) == content(shards)


def flip(path):
    """One bit in the middle of a file, which keeps its size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_finished_output_is_left_alone(corpus, model, shards, capsys):
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*") if path.is_file()}
    run(corpus[0], model, shards, workers=2)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "is complete" in out
    assert before == {p: p.stat().st_mtime_ns for p in shards.rglob("*") if p.is_file()}
