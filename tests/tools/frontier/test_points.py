"""points.csv: round trips, and strict reading."""

from __future__ import annotations

import csv
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.options import UserError
from tools.frontier.envelope import envelope
from tools.frontier.points import (
    COLUMNS,
    Point,
    final_points,
    points_of,
    read_points,
    read_runs,
    select_eval_set,
    with_params_convention,
    write_points,
)
from tools.frontier.summary import final_rows, text_table

FOREIGN = "arch,params,tokens,flops,loss\n"


def write(tmp_path, text):
    path = tmp_path / "p.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_the_contract():
    assert ",".join(COLUMNS) == (
        "arch,params,tokens,flops,loss,params_non_embedding,processed_tokens,loss_tokens,flops_6n,"
        "flops_model_causal,flops_model_full,flops_hardware,eval_set,bits_per_byte,seed,run,step"
    )


def test_a_row_for_each_evaluation_of_each_run(make_run, tmp_path):
    make_run(
        "deep/er/a", arch="redllm", params=1000, steps=100, every=50, eval_sets=("validation", "x")
    )
    make_run("b", steps=100, every=50)
    (tmp_path / "runs" / "b" / "checkpoints" / "config.json").parent.mkdir()
    points = points_of(read_runs(tmp_path / "runs"))
    assert len(points) == 2 * 3 + 3
    write_points(points, tmp_path / "points.csv")
    with (tmp_path / "points.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    last = next(
        r for r in rows if r["run"] == "deep/er/a" and r["step"] == "100" and r["eval_set"] == "x"
    )
    assert float(last["params"]) == 1000
    assert float(last["params_non_embedding"]) == 750
    assert last["tokens"] == last["processed_tokens"] == str(100 * 4096)
    assert last["loss_tokens"] == str(100 * 4096 // 2)
    assert float(last["flops"]) == float(last["flops_model_causal"]) == 6.0 * 1000 * 100 * 4096
    back = read_points(tmp_path / "points.csv")
    assert [tuple(getattr(p, c) for c in COLUMNS) for p in back] == [
        tuple(getattr(p, c) for c in COLUMNS) for p in points
    ]


def test_runs_of_one_name_are_told_apart(make_run, tmp_path):
    for folder in ("a", "b"):
        make_run(folder, name="same", steps=50)
    assert [r.name for r in read_runs(tmp_path / "runs")] == ["same (a)", "same (b)"]


def test_a_run_folder_itself_may_be_given(make_run):
    assert [run.folder for run in read_runs(make_run("a", steps=50))] == ["a"]


def test_no_run_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"no folder in it has both config\.json and eval\.jsonl"):
        read_runs(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        read_runs(tmp_path / "absent")


def test_a_foreign_table_has_a_run_for_each_row(tmp_path):
    points = read_points(write(tmp_path, FOREIGN + "d,1e6,2e7,1.2e14,3.5\nd,1e6,4e7,2.4e14,3.3\n"))
    assert len(final_points(points)) == 2
    assert points[0].params_non_embedding is None
    assert points[0].flops == 1.2e14


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("arch,params,tokens,flops\n", ":1:", "'loss' is missing"),
        ("arch,params,tokens,flops,loss,colour\n", ":1:", "'colour' is not a column"),
        ("arch,params,tokens,flops,loss,loss\n", ":1:", "'loss' is there twice"),
        (FOREIGN + "d,1,1,1\n", ":2:", "has 4 fields where the first line names 5"),
        (FOREIGN + "d,1,1,1,2\nd,x,1,1,1\n", ":3:", "params='x': not a number"),
        (FOREIGN + "d,1,nan,1,1\n", ":2:", "tokens='nan': not a number"),
        (FOREIGN + "d,1,1,inf,1\n", ":2:", "flops='inf': not a number"),
        (FOREIGN + "d,1_0,1,1,1\n", ":2:", "params='1_0': not a number"),
        (FOREIGN + "d,1,1,1,-3\n", ":2:", "loss='-3': must be above zero"),
        (FOREIGN + "d,0,1,1,3\n", ":2:", "params='0': must be above zero"),
        (FOREIGN + "d,1,,1,3\n", ":2:", "tokens='': not a number"),
        (FOREIGN + ",1,1,1,3\n", ":2:", "arch is empty"),
        (FOREIGN + "d,1,1,1,3\nd,1,1,1,3.0\n", ":3:", "the same as on line 2"),
        (FOREIGN, "", "has no row"),
        ("", ":1:", "missing"),
        (FOREIGN + 'd,1,1,1,"3\n', "", "cannot be read"),
    ],
)
def test_strict_reading_names_line_and_field(tmp_path, text, place, message):
    with pytest.raises(UserError) as caught:
        read_points(write(tmp_path, text))
    assert f"p.csv{place}" in str(caught.value)
    assert message in str(caught.value)


def test_a_repeated_step_of_a_run_is_refused(tmp_path):
    text = "arch,params,tokens,flops,loss,run,step\nd,1,1,1,3,r,5\nd,1,2,2,2,r,5\n"
    with pytest.raises(UserError, match="arch, run, step: the same as on line 2"):
        read_points(write(tmp_path, text))


def test_an_unknown_eval_set_names_those_there_are(make_run, tmp_path):
    make_run("a", steps=50, eval_sets=("validation", "paloma"))
    with pytest.raises(UserError, match="give one of: paloma, validation"):
        select_eval_set(points_of(read_runs(tmp_path / "runs")), "c4")


def test_params_by_either_convention(make_run, tmp_path):
    make_run("a", params=1000, steps=50)
    points = points_of(read_runs(tmp_path / "runs"))
    assert with_params_convention(points, "total")[0].params == 1000
    assert with_params_convention(points, "non_embedding")[0].params == 750


positive = st.floats(1e-3, 1e30, allow_nan=False)
names = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cf", "Z")), min_size=1
)


@given(
    st.lists(st.tuples(names, positive, positive, positive), min_size=1, unique_by=lambda r: r[0])
)
def test_tables_survive_a_round_trip(tmp_path_factory, rows):
    points = [
        Point(
            arch=name,
            params=n,
            tokens=n,
            flops=c,
            loss=loss,
            run=name,
            step=1.0,
            seed=0.0,
            params_non_embedding=n,
            processed_tokens=n,
            loss_tokens=n,
            flops_6n=c,
            flops_model_causal=c,
            flops_model_full=c,
            flops_hardware=c,
            eval_set="v",
        )
        for name, n, c, loss in rows
    ]
    path = tmp_path_factory.mktemp("csv") / "points.csv"
    write_points(points, path)
    assert read_points(path) == points


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=40))
def test_the_envelope_is_exactly_what_no_point_beats(pairs):
    points = [Point("a", 1, 1, c, loss, run=str(i)) for i, (c, loss) in enumerate(pairs)]
    found = {(p.flops, p.loss) for p in envelope(points)}
    best = {
        (c, loss)
        for c, loss in pairs
        if not any((x <= c and y < loss) or (x < c and y <= loss) for x, y in pairs)
    }
    assert found == best


def test_final_rows_and_their_table(sweep):
    rows = final_rows(read_runs(sweep))
    assert [row.stage for row in rows] == ["pretrain"] * 9 + ["finetune"] * 2
    first = rows[0]
    assert (first.arch, first.run, first.params) == ("decllm", "decllm-pico", 90_000)
    assert first.tokens == 400 * 4096
    assert first.unigram_entropy is not None
    assert math.isclose(first.margin, first.unigram_entropy - first.loss)
    lines = text_table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "decllm-pico" in lines[2]
    assert f"{first.loss:.4f}" in lines[2]
    assert max(map(len, lines)) < 160
