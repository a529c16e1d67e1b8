"""What cannot be done is refused in a line, and costs nothing that is done."""

import pytest
import zstandard

from pipeline.options import UserError
from tests.tools.tokenising import content
from tests.tools.tokenize_corpus.small import line, run
from tools import corpus_finaliser as finaliser
from tools import tokenize_corpus, tokenizer


@pytest.mark.parametrize(
    "changes",
    [
        {"block_tokens": 512},
        {"task_bytes": 7000},
        {"validation_fraction": 0.2},
        {"text_field": "b"},
    ],
)
def test_other_settings_are_refused(corpus, model, shards, changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"{name}=.*was begun with"):
        run(corpus[0], model, shards, **changes)


def test_other_inputs_or_another_tokenizer_are_refused(corpus, model, shards, tmp_path):
    with pytest.raises(UserError, match=r"other inputs .*remove this one"):
        run(corpus[0], model, shards, input=(str(corpus[0] / "github"),))
    other = tmp_path / "other.model"
    tokenizer.run(tokenizer.Options(input=(str(corpus[0]),), output=str(other), vocab_size=385))
    with pytest.raises(UserError, match=r"tokenizer: .*begun with another tokenizer"):
        run(corpus[0], other, shards)


def test_a_folder_of_something_else_is_refused(corpus, model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        run(corpus[0], model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("plan", ["", "{", "[]", '{"format": 2}', '{"format": 1, "settings": 3}'])
def test_a_damaged_plan_is_told_in_one_line(corpus, model, tmp_path, plan):
    (tmp_path / "out/tasks").mkdir(parents=True)
    (tmp_path / "out/tasks/plan.json").write_text(plan)
    with pytest.raises(UserError, match=r"output=.*(plan\.json is damaged|another version)"):
        run(corpus[0], model, tmp_path / "out")


@pytest.mark.parametrize(
    "changes", [{"workers": 1}, {"workers": 2}, {"dedup": "exact"}], ids=["one", "two", "dedup"]
)
def test_a_broken_input_fails_in_one_line_and_heals(model, tmp_path, capsys, changes):
    good = zstandard.compress(b"".join(line(f"{i} " * 20) for i in range(3000)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(b"".join(line(f"text {i}") for i in range(100)))
    (tmp_path / "in/b.jsonl.zst").write_bytes(good[: len(good) // 2])
    inputs, out = tmp_path / "in", tmp_path / "out"
    with pytest.raises(UserError, match=r"task 1 of b\.jsonl\.zst failed: .*cannot be read"):
        run(inputs, model, out, task_bytes=10**6, **changes)
    assert not (out / "manifest.json").exists()
    done = out / "tasks" / ("000000.hashed" if "dedup" in changes else "000000.json")
    before = done.stat().st_mtime_ns
    (tmp_path / "in/b.jsonl.zst").write_bytes(good)
    capsys.readouterr()
    finished = finaliser.finalise

    def finalise_and_look(*given):
        assert done.stat().st_mtime_ns == before
        return finished(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finaliser, "finalise", finalise_and_look)
        run(inputs, model, out, task_bytes=10**6, **changes)
    assert "b.jsonl.zst changed before anything was made of it" in capsys.readouterr().err
    assert content(out) == content(
        run(inputs, model, tmp_path / "new", task_bytes=10**6, **changes)
    )
    # Now it is in the output.
    (tmp_path / "in/b.jsonl.zst").write_bytes(good + zstandard.compress(line("more")))
    with pytest.raises(UserError, match="other inputs"):
        run(inputs, model, out, task_bytes=10**6, **changes)


@pytest.mark.parametrize("change", ["done", "hashed", "renamed", "more tasks"])
def test_an_input_may_change_only_before_anything_is_made_of_it(model, tmp_path, change):
    (tmp_path / "in").mkdir()
    for name in "ac":
        (tmp_path / "in" / f"{name}.jsonl").write_bytes(line(f"text {name}") * 100)
    (tmp_path / "in/b.jsonl.gz").write_bytes(b"no gzip")
    dedup = "exact" if change == "hashed" else "none"
    with pytest.raises(UserError, match="task 1 of b"):
        run(tmp_path / "in", model, tmp_path / "out", dedup=dedup)
    if change == "renamed":
        (tmp_path / "in/b.jsonl.gz").rename(tmp_path / "in/d.jsonl.gz")
    else:
        if change == "more tasks":
            (tmp_path / "out/tasks/000002.json").unlink()
        with open(tmp_path / "in/c.jsonl", "ab") as file:
            file.write(line("more") * (1000 if change == "more tasks" else 1))
    with pytest.raises(UserError, match="other inputs"):
        run(tmp_path / "in", model, tmp_path / "out", dedup=dedup)


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_a_download_that_came_to_nothing_is_named(model, tmp_path, suffix):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(line("some text"))
    (tmp_path / f"in/b.jsonl.{suffix}").touch()
    with pytest.raises(UserError, match=rf"b\.jsonl\.{suffix}.*it is empty.*fetch the file again"):
        run(tmp_path / "in", model, tmp_path / "out")


def test_files_of_two_names_are_counted_in_a_line(model, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "blob").write_bytes(line("some text"))
    for name in ("arxiv_1.jsonl", "book.jsonl", "wiki.jsonl"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "blob")
    run(tmp_path / "in", model, tmp_path / "out")
    told = [row for row in capsys.readouterr().err.splitlines() if "names" in row]
    assert len(told) == 1
    assert "2 more names of files that are read once, first " in told[0]
    assert "book.jsonl (the same file as " in told[0]


def test_a_task_whose_sample_differs_fails(corpus, model, tmp_path, monkeypatch):
    from pipeline.data.encoder import Encoder

    encode = Encoder._encode_fast
    wrong = [False]

    def twisted(self, data):
        found = encode(self, data)
        return found[::-1] if wrong[0] else found

    run(corpus[0], model, tmp_path / "right")
    monkeypatch.setattr(Encoder, "_encode_fast", twisted)
    wrong[0] = True
    with pytest.raises(UserError, match=r"gigatoken and sentencepiece differ at byte \d+ of book"):
        run(corpus[0], model, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


def test_too_many_unusable_rows_fail_with_a_table_and_keep_what_is_done(
    corpus, model, shards, tmp_path, capsys
):
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"max_reject_rate=0\.001: 3 of \d+ .*/out/rejects\.jsonl"):
        run(corpus[0], model, output, max_reject_rate=0.001)
    assert (output / "rejects.jsonl").read_bytes() == (shards / "rejects.jsonl").read_bytes()
    told = capsys.readouterr().err
    assert all(f"1  {reason}" in told for reason in ("bad JSON", "empty", "no text"))
    assert "github/filtered_1.jsonl" in told
    assert not (output / "manifest.json").exists()
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*.tar")}
    assert content(run(corpus[0], model, output)) == content(shards)
    assert before.items() <= {p: p.stat().st_mtime_ns for p in output.rglob("*.tar")}.items()


def test_options_that_cannot_be_are_refused():
    from pipeline.options import load as load_options

    given = {"input": "x", "output": "y", "tokenizer": "z"}
    for name, value in [
        ("validation_fraction", "1.0"),
        ("block_tokens", "100"),
        ("default_source", "../up"),
        ("engine", "spark"),
        ("workers", "0"),
        ("max_characters", "0"),
    ]:
        with pytest.raises(UserError, match=f"{name}="):
            load_options(tokenize_corpus.Options, {**given, name: value})
