"""The command as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from pipeline.options import UserError, load
from tools.frontier.command import Options, run

ARTEFACTS = ("points.csv", "finetune.csv", "fit.json", "frontier.png", "report.html")


def frontier(**flags):
    run(load(Options, flags))


def test_a_sweep_gives_every_artefact_and_the_table(sweep, tmp_path, capsys):
    frontier(runs=str(sweep), output=str(tmp_path / "out"))
    out = capsys.readouterr().out
    for name in ARTEFACTS:
        assert f"wrote {tmp_path / 'out' / name}" in out
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert "decllm-pico" in out
    assert "margin" in out
    fit = json.loads((tmp_path / "out" / "fit.json").read_text())
    for arch in ("decllm", "redllm", "entp"):
        for approach in ("approach1", "approach2", "approach3"):
            assert "3 model sizes" in fit["architectures"][arch][approach]["refused"]
        assert fit["envelope"]["architectures"][arch]
    assert not list((tmp_path / "out").glob("*.partial"))
    assert "-flan" not in (tmp_path / "out" / "points.csv").read_text()


def test_the_same_input_gives_the_same_bytes(sweep, tmp_path):
    for name in "ab":
        frontier(runs=str(sweep), output=str(tmp_path / name))
    for name in ARTEFACTS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_points_lead_to_the_same_fit_as_the_runs(sweep, tmp_path):
    frontier(runs=str(sweep), output=str(tmp_path / "a"))
    frontier(points=str(tmp_path / "a" / "points.csv"), output=str(tmp_path / "b"))
    for name in ("points.csv", "fit.json", "frontier.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_json_alone_is_on_stdout(sweep, tmp_path, capsys):
    frontier(runs=str(sweep), output=str(tmp_path), json=True)
    said = capsys.readouterr()
    assert json.loads(said.out) == json.loads((tmp_path / "fit.json").read_text())
    assert "wrote" in said.err


def chinchilla_table(tmp_path, archs=("dense",)):
    lines = ["arch,params,tokens,flops,loss"]
    for arch in archs:
        for n in np.geomspace(1e7, 1e10, 6):
            for d in np.geomspace(3e8, 1e11, 5):
                loss = 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28
                lines.append(f"{arch},{n!r},{d!r},{6 * n * d!r},{loss!r}".replace("np.float64", ""))
    path = tmp_path / "foreign.csv"
    path.write_text("\n".join(lines).replace("(", "").replace(")", "") + "\n")
    return path


def test_a_foreign_table_is_fitted_and_its_conventions_are_unknown(tmp_path):
    path = chinchilla_table(tmp_path)
    frontier(points=str(path), output=str(tmp_path / "out"), bootstrap=20)
    fit = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert fit["conventions"]["N"].startswith("unknown")
    constants = fit["architectures"]["dense"]["approach3"]["constants"]
    assert constants["alpha"] == pytest.approx(0.34, rel=1e-4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'class="fit c0"' in page
    assert 'class="beyond c0"' in page
    frontier(
        points=str(path), output=str(tmp_path / "out"), bootstrap=20, params_convention="total"
    )
    fit = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert fit["conventions"]["N"].startswith("total parameters")


def test_non_embedding_parameters_for_the_fits(sweep, tmp_path):
    frontier(runs=str(sweep), output=str(tmp_path), params_convention="non_embedding")
    fit = json.loads((tmp_path / "fit.json").read_text())
    assert fit["conventions"]["N"] == "parameters without embeddings"
    assert fit["architectures"]["decllm"]["observed"]["params"] == [67_500.0, 525_000.0]
    assert "decllm,90000," in (tmp_path / "points.csv").read_text()


def test_unfinished_and_diverged_runs_are_left_out_with_a_warning(make_run, tmp_path, capsys):
    make_run("done", steps=100)
    make_run("going", steps=100, finished=False)
    bad = make_run("bad", steps=100)
    lines = (bad / "eval.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), "loss": None})
    (bad / "eval.jsonl").write_text("\n".join(lines) + "\n")
    frontier(runs=str(tmp_path / "runs"), output=str(tmp_path / "a"))
    said = capsys.readouterr()
    assert "run going: left out, it has not finished" in said.err
    assert "run bad: left out, its loss is not finite at step 100" in said.err
    assert "going" not in (tmp_path / "a" / "points.csv").read_text()
    assert "run going: left out" in (tmp_path / "a" / "report.html").read_text()
    frontier(runs=str(tmp_path / "runs"), output=str(tmp_path / "b"), include_unfinished=True)
    assert "run going: has not finished" in capsys.readouterr().err
    assert "going" in (tmp_path / "b" / "points.csv").read_text()


def test_only_unfinished_runs_are_refused_with_the_remedy(make_run, tmp_path):
    make_run("going", steps=100, finished=False)
    with pytest.raises(UserError, match="--include_unfinished true"):
        frontier(runs=str(tmp_path / "runs"), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_losses_over_other_target_tokens_are_warned_of(make_run, tmp_path, capsys):
    make_run("a", steps=50)
    other = make_run("b", steps=50)
    text = (other / "eval.jsonl").read_text()
    (other / "eval.jsonl").write_text(text.replace('"eval_tokens": 16384', '"eval_tokens": 99'))
    frontier(runs=str(tmp_path / "runs"), output=str(tmp_path / "out"))
    assert "not over the same target tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "exactly one of --runs DIR and --points CSV"),
        ({"runs": "x", "points": "y"}, "exactly one of"),
        ({"runs": "absent"}, "runs='absent': no such folder"),
        ({"points": "absent.csv"}, "points='absent.csv': no such file"),
        ({"runs": ".", "params_convention": "half"}, "params_convention='half'"),
        ({"runs": ".", "colour": "red"}, "colour='red'"),
    ],
)
def test_mistakes_are_named_before_any_work(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        frontier(output="out", **flags)
    assert not list(tmp_path.iterdir())


def test_output_that_is_a_file_is_refused(sweep, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="is a file; give a folder"):
        frontier(runs=str(sweep), output=str(tmp_path / "out"))


def test_names_that_matplotlib_would_read_as_mathematics(make_run, tmp_path):
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    make_run("a", arch="_a$b$^{", steps=50)
    frontier(runs=str(tmp_path / "runs"), output=str(tmp_path / "out"))
    assert (tmp_path / "out" / "frontier.png").exists()


def test_help_needs_nothing_heavy():
    code = (
        "import sys, tools.frontier.command\n"
        "print([m for m in ('torch', 'numpy', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
