"""A supervised command's words: the launcher's flags, the entry point, what the run is told."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.options import UserError
from tools.supervise.launch import Launch

TOLD = ["--run_dir=runs/a", "--data=d", "--arch=decllm", "--size=nano", "--steps=5"]
TOLD += ["--global_batch=24", "--ds_config=ds_configs/cpu.json"]


def read(*launcher: str) -> Launch:
    return Launch.read([*launcher, "pipeline/pretrain.py", *TOLD])


def test_the_run_is_what_the_words_behind_the_entry_say(tmp_path: Path) -> None:
    launch = read("deepspeed", "--num_gpus", "4")
    assert (launch.run_dir, launch.config.global_batch) == (Path("runs/a").resolve(), 24)
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{word[2:].replace('=', ': ')}\n" for word in TOLD))
    words = ["env", "X=1", "/bin/deepspeed", "/somewhere/pretrain.py"]
    launch = Launch.read([*words, "--config", str(file), "--run_dir=runs/b"])
    assert launch.run_dir == Path("runs/b").resolve()
    assert launch.uses_deepspeed
    assert not read("python", "-u").uses_deepspeed


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "starts no run"),
        (["deepspeed", "train.py"], "starts no run"),
        (["deepspeed", "--hostf=h", "pipeline/pretrain.py"], "--hostf is short for --hostfile; w"),
        (["deepspeed", "--no_ss", "pipeline/pretrain.py"], "--no_ss is short for --no_ssh; write"),
        (["deepspeed", "pipeline/pretrain.py", "--stps=4"], "did you mean steps?"),
        (["deepspeed", "pipeline/pretrain.py", "--config", "none.yaml"], "give a YAML file"),
    ],
)
def test_a_mistake_is_told_before_anything_is_started(words: list[str], part: str) -> None:
    with pytest.raises(UserError, match=part.replace("?", r"\?")):
        Launch.read(words)


def launcher_parser() -> argparse.ArgumentParser:
    """The launcher's flags as it reads them itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-H", "--hostfile")
    parser.add_argument("--num_gpus", "--num_accelerators")
    parser.add_argument("--master_port")
    parser.add_argument("--force_multi", action="store_true")
    parser.add_argument("-q", "--quiet", action="store_true")
    parser.add_argument("user_script")
    parser.add_argument("user_args", nargs=argparse.REMAINDER)
    return parser


FLAGS = st.lists(
    st.sampled_from(
        [
            ["-H", "hosts"],
            ["--hostfile=other"],
            ["--hostfile", "third"],
            ["--num_gpus", "3"],
            ["--num_accelerators=2"],
            ["--master_port", "29600"],
            ["-q"],
            ["--force_multi"],
        ]
    ),
    max_size=5,
)


@settings(deadline=None)  # of a machine that is at work
@given(FLAGS, st.sampled_from(["hostfile", "num_gpus", "master_port"]))
def test_flags_are_read_changed_and_removed_as_argparse_sees_them(
    flags: list[list[str]], name: str
) -> None:
    launch = read("deepspeed", *[word for flag in flags for word in flag])

    def seen(launch: Launch) -> argparse.Namespace:
        assert launch.words[launch.entry] == "pipeline/pretrain.py"
        return launcher_parser().parse_args(launch.words[1:])

    before = vars(seen(launch))
    assert before["user_args"] == TOLD
    assert launch.flag(name) == before[name]
    assert vars(seen(launch.with_flag(name, "7"))) == {**before, name: "7"}
    assert vars(seen(launch.without_flag(name))) == {**before, name: None}
    assert seen(launch.with_flag("force_multi")).force_multi
    assert seen(launch.told("micro_batch", 3)).user_args == [*TOLD, "--micro_batch=3"]
