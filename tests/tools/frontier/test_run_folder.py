"""Reading a run folder: what is forgiven, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.options import UserError
from tools.frontier.run_folder import plain_text, read_run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_everything_is_read(make_run):
    run = read_run(make_run("a", params=1234, steps=100, every=50, seed=3), "a")
    assert (run.name, run.arch, run.stage, run.seed, run.params) == (
        "a",
        "decllm",
        "pretrain",
        3,
        1234,
    )
    assert run.finished
    assert [e.step for e in run.evaluations] == [0, 50, 100]
    assert [t.step for t in run.training] == list(range(1, 101))
    assert run.evaluations[-1].processed_tokens == 100 * 4096
    assert dict(run.versions)["torch"] == "2.13.0"


def test_the_last_attempt_of_a_step_wins(make_run):
    folder = make_run("a", steps=100, every=50)
    again = lines(folder / "eval.jsonl")[1]
    append(folder / "eval.jsonl", {**again, "attempt": 2, "loss": 1.25})
    append(folder / "eval.jsonl", {**again, "attempt": 1, "loss": 9.75})
    append(
        folder / "metrics.jsonl", {**lines(folder / "metrics.jsonl")[9], "attempt": 2, "loss": 7.5}
    )
    run = read_run(folder, "a")
    assert [e.loss for e in run.evaluations if e.step == 50] == [1.25]
    assert run.training[9].loss == 7.5
    assert run.superseded == 2


def test_an_evaluation_of_a_step_that_was_trained_again_is_left_out(make_run):
    folder = make_run("a", steps=100, every=50)
    step50 = next(row for row in lines(folder / "metrics.jsonl") if row["step"] == 50)
    append(folder / "metrics.jsonl", {**step50, "attempt": 2})
    run = read_run(folder, "a")
    assert [e.step for e in run.evaluations] == [0, 100]
    assert run.superseded == 1


def test_what_a_rollback_took_back_counts_no_more_where_the_data_ended(make_run):
    folder = make_run("a", steps=100, every=50)
    (folder / "FINISHED").write_text('{"step": 60, "reason": "max_epochs=1: the data end"}\n')
    row = {**lines(folder / "eval.jsonl")[-1], "step": 60, "attempt": 2}
    append(folder / "eval.jsonl", row)
    run = read_run(folder, "a")
    assert [e.step for e in run.evaluations] == [0, 50, 60]
    assert run.training[-1].step == 60
    assert run.superseded == 1


@pytest.mark.parametrize("text", ["{", "[]", '{"step": null}'])
def test_a_damaged_mark_of_the_end_is_named(make_run, text):
    folder = make_run("a", steps=100, every=50)
    (folder / "FINISHED").write_text(text)
    with pytest.raises(UserError, match="FINISHED: cannot be read"):
        read_run(folder, "a")


@pytest.mark.parametrize("name", ["eval.jsonl", "metrics.jsonl"])
def test_a_last_line_cut_short_is_counted(make_run, name):
    folder = make_run("a", steps=100, every=50)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-30])
    run = read_run(folder, "a")
    assert run.cut_lines == 1
    assert (len(run.evaluations), len(run.training)) in ((2, 100), (3, 99))


@pytest.mark.parametrize("garbage", [b"{\n", b"7\n", b"\xff{}\n", b"\n"])
def test_garbage_elsewhere_names_file_and_line(make_run, garbage):
    folder = make_run("a", steps=100, every=50)
    first, rest = (folder / "eval.jsonl").read_bytes().split(b"\n", 1)
    (folder / "eval.jsonl").write_bytes(first + b"\n" + garbage + rest)
    with pytest.raises(UserError, match=r"eval\.jsonl:2: not a JSON object"):
        read_run(folder, "a")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "7"),
        ("step", 1.5),
        ("processed_tokens", -1),
        ("flops_model_causal", None),
        ("flops_6n", float("inf")),
        ("loss", "low"),
        ("loss", -2.0),
        ("loss", True),
        ("eval_set", ""),
        ("bits_per_byte", -0.1),
    ],
)
def test_a_bad_field_is_named(make_run, field, value):
    folder = make_run("a", steps=100, every=50)
    append(folder / "eval.jsonl", {**lines(folder / "eval.jsonl")[-1], field: value})
    with pytest.raises(UserError, match=rf"eval\.jsonl:4: {field}="):
        read_run(folder, "a")


def test_a_missing_field_is_named(make_run):
    folder = make_run("a", steps=100, every=50)
    row = lines(folder / "eval.jsonl")[-1]
    del row["loss_tokens"]
    append(folder / "eval.jsonl", row)
    with pytest.raises(UserError, match=r"eval\.jsonl:4: loss_tokens=None: missing"):
        read_run(folder, "a")


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_a_loss_that_is_not_finite_means_divergence(make_run, loss):
    folder = make_run("a", steps=100, every=50)
    append(folder / "eval.jsonl", {**lines(folder / "eval.jsonl")[-1], "step": 101, "loss": loss})
    append(
        folder / "metrics.jsonl", {**lines(folder / "metrics.jsonl")[-1], "step": 101, "loss": loss}
    )
    run = read_run(folder, "a")
    assert run.diverged == "step 101 on validation"
    assert len(run.training) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format=2"),
        ({"stage": "sleep"}, "stage='sleep'"),
        ({"run": None}, "run=None"),
        ({"parameters": {"total": 0, "non_embedding": 1}}, "total=0"),
    ],
)
def test_a_bad_config_is_named(make_run, change, message):
    folder = make_run("a", steps=50)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        read_run(folder, "a")


@pytest.mark.parametrize(
    "parent", ["runs/base", "/x/runs/base/", "runs/base/checkpoints/step_400", "base"]
)
def test_a_parent_is_shown_as_its_run_folder(make_run, parent):
    folder = make_run("a", steps=50)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "parent": parent}))
    assert read_run(folder, "a").parent == "base"


def test_text_cannot_command_a_terminal_nor_break_utf8():
    text = plain_text("a\x1b[2J\u202eb\ud800\n")
    assert text == "a\ufffd[2J\ufffdb\ufffd\ufffd"
    text.encode("utf-8")
