"""On how many ranks a run goes on when hosts or GPUs are gone."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config_checks import batch_problems
from pipeline.options import UserError
from tests.tools.supervise.test_launch import TOLD
from tools.supervise.launch import Launch
from tools.supervise.world import NoRanks, fit, largest_world, read_hostfile, spread

CONFIG = Launch.read(["deepspeed", "pipeline/pretrain.py", *TOLD]).config


def launch(*flags: str, **told: object) -> Launch:
    words = {word.partition("=")[0]: word for word in TOLD}
    words |= {f"--{key}": f"--{key}={value}" for key, value in told.items()}
    return Launch.read(["deepspeed", *flags, "pipeline/pretrain.py", *words.values()])


@settings(deadline=None)  # of a machine that is at work
@given(st.integers(1, 200), st.integers(1, 12), st.integers(1, 64))
def test_the_most_ranks_that_the_run_itself_would_accept(
    batch: int, micro: int, available: int
) -> None:
    config = dataclasses.replace(CONFIG, global_batch=batch, micro_batch=micro)
    fitting = [n for n in range(1, available + 1) if not list(batch_problems(config, n))]
    assert largest_world(batch, micro, available) == max(fitting, default=0)


@settings(deadline=None)  # of a machine that is at work
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.data())
def test_ranks_fill_hosts_in_their_order(counts: list[int], data: st.DataObject) -> None:
    slots = {f"n{index}": count for index, count in enumerate(counts)}
    ranks = data.draw(st.integers(1, sum(counts)))
    used = spread(slots, ranks)
    assert sum(used.values()) == ranks
    assert list(used) == list(slots)[: len(used)]
    assert all(used[host] == slots[host] for host in list(used)[:-1])
    assert all(0 < used[host] <= slots[host] for host in used)


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three hosts of four slots; those answer that have a file in up/."""
    monkeypatch.setattr("tools.supervise.world._PROBE_PAUSE", 0.0)
    (tmp_path / "up").mkdir()
    for host in ("n0", "n1", "n2"):
        (tmp_path / "up" / host).touch()
    (tmp_path / "hostfile").write_text("# ours\nn0 slots=4\n\nn1 slots=4\nn2 slots=4\n")
    return tmp_path


def over_hosts(hosts: Path, *flags: str, **told: object) -> Launch:
    return launch("--hostfile", f"{hosts}/hostfile", *flags, run_dir=hosts / "run", **told)


def probe(hosts: Path) -> str:
    return f"test -e {hosts}/up/{{host}}"


def test_hosts_that_do_not_answer_are_left_out(hosts: Path) -> None:
    whole = over_hosts(hosts, "--master_addr", "10.0.0.1")
    assert fit(whole, probe(hosts)) == (whole, "")
    (hosts / "up" / "n1").unlink()
    fitted, said = fit(whole, probe(hosts))
    # 12 ranks hold 2 sequences each; so do 6, and 8 slots are left.
    assert said == (
        "n1 did not answer: 6 ranks on 2 hosts instead of 12 on 3, the most that cut "
        "global_batch=24 into micro-batches of 2"
    )
    assert fitted.flag("hostfile") == f"{hosts}/run/.hostfile_left"
    assert read_hostfile(hosts / "run" / ".hostfile_left") == {"n0": 4, "n2": 2}
    assert fitted.words[-1] == "--micro_batch=2"
    assert fitted.flag("master_addr") == "10.0.0.1"
    # It is back: the next start has all of them again.
    (hosts / "up" / "n1").touch()
    assert fit(whole, probe(hosts)) == (whole, "")


def test_the_first_host_and_all_but_one_may_be_gone(hosts: Path) -> None:
    whole = over_hosts(hosts, "--master_addr=10.0.0.1", "--num_gpus", "2", micro_batch=4)
    for host in ("n0", "n1"):
        (hosts / "up" / host).unlink()
    fitted, said = fit(whole, probe(hosts))
    assert said.startswith("n0, n1 did not answer: 2 ranks on 1 host instead of 6 on 3, ")
    assert read_hostfile(hosts / "run" / ".hostfile_left") == {"n2": 2}
    # Its address was the first host's; and one host alone would be taken for this one.
    assert fitted.flag("master_addr") is None
    assert fitted.flag("force_multi") == ""
    assert fitted.flag("num_gpus") is None
    assert "--micro_batch=4" in fitted.words
    assert fitted.words.count("--micro_batch=4") == 1
    (hosts / "up" / "n2").unlink()
    with pytest.raises(NoRanks, match="n0, n1, n2 did not answer: nothing is left to go on with"):
        fit(whole, probe(hosts))


def test_what_cannot_be_left_out_is_left_as_it_is(hosts: Path) -> None:
    for host in ("n0", "n1", "n2"):
        (hosts / "up" / host).unlink()
    for flags in (("--no_ssh", "--node_rank", "1"), ("--include", "n0"), ("-e", "n1")):
        asked = over_hosts(hosts, *flags)
        assert fit(asked, probe(hosts)) == (asked, "")


def test_a_host_answers_though_its_ssh_leaves_a_connection_open_or_fails_once(
    hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.supervise.world._PROBE_SECONDS", 5)
    # As ssh does where its ControlPersist is set: what stays behind holds its output.
    stays = f"sh -c 'sleep 20 & echo $! >>{hosts}/left'"
    whole = over_hosts(hosts)
    try:
        assert fit(whole, f"{stays} {{host}}") == (whole, "")
    finally:
        for pid in (hosts / "left").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    once = f"sh -c 'test -e {hosts}/asked_{{host}} || ! touch {hosts}/asked_{{host}}'"
    assert fit(whole, once) == (whole, "")


def test_mistakes_in_hosts_are_told(hosts: Path) -> None:
    with pytest.raises(UserError, match="there is no nothing-of-this-name here"):
        fit(over_hosts(hosts), "nothing-of-this-name {host}")
    with pytest.raises(UserError, match="num_gpus='two'"):
        fit(over_hosts(hosts, "--num_gpus", "two"), probe(hosts))
    (hosts / "hostfile").write_text("n0 4\n")
    with pytest.raises(UserError, match="'n0 4' is not understood"):
        fit(over_hosts(hosts), probe(hosts))
    (hosts / "hostfile").unlink()
    with pytest.raises(UserError, match="No such file or directory; give a hostfile"):
        fit(over_hosts(hosts), probe(hosts))


def test_gpus_that_are_gone_are_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for variable in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)

    def there_are(count: int) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "echo 'GPU 0: H100 (UUID: GPU-x)'\n" * count)
        program.chmod(0o755)

    there_are(8)
    whole = launch("--num_gpus", "8", global_batch=64)
    assert fit(whole, "") == (whole, "")
    there_are(7)
    fitted, said = fit(whole, "")
    assert fitted.flag("num_gpus") == "4"
    assert fitted.words[-1] == "--micro_batch=8"
    assert said.startswith("7 GPUs are visible: 4 ranks instead of 8, the most that cut ")
    # Without a number all are taken, where their number will do.
    fitted, said = fit(launch(global_batch=60), "")
    assert (fitted.flag("num_gpus"), said[:30]) == ("6", "7 GPUs are visible: 6 ranks in")
    assert fit(launch(global_batch=63), "")[1] == ""
    there_are(0)
    with pytest.raises(NoRanks, match="0 GPUs are visible: nothing is left"):
        fit(whole, "")
    there_are(2)
    with pytest.raises(NoRanks, match="no number of ranks up to the 2 that are left cuts"):
        fit(launch("--num_gpus", "8", global_batch=24, micro_batch=7), "")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert fit(whole, "") == (whole, "")
    # Somebody chose among them: a number would make the launcher take others.
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    there_are(8)
    chosen = launch(global_batch=60)
    assert fit(chosen, "") == (chosen, "")
