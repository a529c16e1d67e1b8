"""Every command of the README is run here on small data, or is listed with why it is not."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipeline.config import RunConfig
from pipeline.options import load

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
NOT_RUN = {
    "make demo": "tests/soak/test_demo.py runs what it runs",
    "make test": "it is what runs this",
    "deepspeed --hostfile hostfile pipeline/pretrain.py": (
        "needs eight nodes; its file is loaded below, its launch is in tests/distributed"
    ),
    "deepspeed --hostfile hostfile pipeline/finetune.py": "likewise",
    "sbatch --": "tests/soak/test_requeue.py submits both scripts to a real Slurm",
}


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """Every command line of the README."""
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def test_every_command_is_run_or_says_why_not() -> None:
    assert len(commands()) >= 10
    for command in commands():
        known = command.startswith("isoflop ") or any(map(command.startswith, NOT_RUN))
        assert known, f"{command}: run it in a test, or say here why not"


@pytest.mark.distributed
def test_the_isoflop_commands_work_in_order_on_small_data(
    corpus_dir: Path, shards_dir: Path, tmp_path: Path
) -> None:
    """The README's own flags; only places and sizes are made small."""
    from tests.distributed.entry import flags, run_entry
    from tools.cli import dispatch

    flan = tmp_path / "rows"
    flan.mkdir()
    row = (
        '{"inputs": "Name it: def f(x):", "targets": "f", "task_source": "CoT", '
        '"task_name": "name", "template_type": "zs"}\n'
    )
    (flan / "rows.jsonl").write_text(row * 50)
    run_entry("pretrain", 1, flags(tmp_path / "runs" / "decllm-nano", shards_dir))
    places = {
        "/data/redpajama/**/*.jsonl*": f"{corpus_dir}/**/*.jsonl*",
        "/data/flan/*.jsonl.gz": f"{flan}/*.jsonl",
        "/data/flan_tokens": f"{tmp_path}/flan_tokens",
        "/data/tokens": f"{tmp_path}/tokens",
        "/runs": f"{tmp_path}/runs",
        "/runs/decllm-1b": f"{tmp_path}/runs/decllm-nano",
        "/exports/decllm-1b": f"{tmp_path}/export",
        "/runs/redllm-1b": f"{tmp_path}/runs/decllm-nano",
        "/reports/first": f"{tmp_path}/report",
        "redpajama.model": f"{tmp_path}/redpajama.model",
        "32768": "512",
        "96": "2",
        "run.yaml": f"{tmp_path}/run.yaml",
    }
    # What is supervised and stopped has finished.
    asked = flags(tmp_path / "runs" / "decllm-nano", shards_dir)
    lines = [f"{key}: {value}\n" for key, value in asked.items()]
    (tmp_path / "run.yaml").write_text("".join(lines))
    ran = 0
    for command in commands():
        words = shlex.split(command)
        if words[0] == "isoflop":
            dispatch([places.get(word, word) for word in words[1:]])
            ran += 1
    assert ran >= 6
    assert (tmp_path / "tokens" / "manifest.json").exists()
    assert (tmp_path / "flan_tokens" / "manifest.json").exists()
    assert (tmp_path / "report" / "report.html").exists()
    assert (tmp_path / "export" / "model.safetensors").exists()


def test_the_run_files_are_accepted_and_the_launches_give_no_unknown_flag() -> None:
    files = [load(RunConfig, yaml.safe_load(document)) for document in blocks("yaml")]
    assert [(file.arch, file.flan is None) for file in files] == [
        ("redllm", True),
        ("decllm", False),
    ]
    launches = [shlex.split(command) for command in commands() if command.startswith("deepspeed")]
    assert [words[3:] for words in launches] == [
        ["pipeline/pretrain.py", "--config", "run.yaml"],
        ["pipeline/finetune.py", "--config", "finetune.yaml"],
    ]


def test_the_plan_it_shows_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.cli import dispatch

    (command,) = (line for line in commands() if line.startswith("isoflop plan"))
    dispatch(shlex.split(command)[1:])
    assert capsys.readouterr().out in blocks("text")


def test_nothing_is_left_to_be_filled_in() -> None:
    assert "@@" not in README


def test_every_file_it_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (Path(__file__).parent.parent / target).exists(), target
