"""Ranks that pretend to be on several nodes: what differs is named before any training."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.entry import flags, records, run_entry
from tests.distributed.harness import run_ranks
from tools.cli import dispatch

pytestmark = pytest.mark.distributed
Changes = dict[int, dict[str, Any]]


def _start(asked: dict[str, Any], changes: Changes, entry: str = "pretrain") -> tuple[str, str]:
    """A program with one rank on each node; how it ended, and with what line."""
    from pipeline import evaluate, network, preflight, pretrain, rendezvous
    from pipeline.assemble import run_stage
    from pipeline.options import UserError

    rank = int(os.environ["RANK"])
    mine = changes.get(rank, {})
    os.environ["LOCAL_SIZE"] = "1"
    socket.gethostname = lambda: f"n{rank}"  # type: ignore[assignment]
    network.address_towards = lambda host: "10.0.0.1"  # type: ignore[assignment]
    rendezvous._SHARED_SECONDS = 0.5
    if "code" in mine:
        preflight.code_files = lambda: {"models/a.py": "1", "models/b.py": mine["code"]}  # type: ignore[assignment]
    if "clock" in mine:
        real_time = time.time
        time.time = lambda: real_time() + mine["clock"]  # type: ignore[assignment]
    if "own_disk" in mine:
        real_exists = Path.exists
        Path.exists = lambda p: ".seen" not in p.name and real_exists(p)  # type: ignore[method-assign,assignment]
    if "own_data" in mine:
        os.chdir(mine["own_data"])
    if mine.get("late"):
        time.sleep(mine["late"])
    own = {**asked, **mine.get("flags", {})}
    sys.argv = [f"pipeline/{entry}.py", *[f"--{key}={value}" for key, value in own.items()]]
    try:
        if entry == "evaluate":
            evaluate.main()
        else:
            run_stage(pretrain.STAGE)
    except UserError as error:
        return f"{type(error).__name__} {error.exit_code}", str(error)
    return "trained", ""


def start(run: Path, shards: Path, changes: Changes, **more: Any) -> list[tuple[str, str]]:
    """How each of three nodes' ranks ended."""
    return run_ranks(_start, 3, flags(run, shards, **more), changes)


def test_nodes_that_agree_train_and_what_they_are_is_written_down(
    shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert start(run, shards_dir, {}, steps=1) == [("trained", "")] * 3
    written = json.loads((run / "preflight.json").read_text())
    ranks = {host: node["ranks"] for host, node in written["nodes"].items()}
    assert ranks == {"n0": [0], "n1": [1], "n2": [2]}
    assert written["nodes"]["n2"]["free_bytes"]["run_dir"] > 0
    assert 0 < written["all_reduce"]["latency_seconds"] < 5
    assert 0 <= written["clock_spread_seconds"] < 5
    assert len(written["same"]["code"]) == len(written["same"]["data"]) == 64
    assert not list(run.glob(".seen*"))


def soak(changes: Changes, part: str) -> Any:
    """A case of the full count."""
    return pytest.param(changes, part, marks=pytest.mark.soak)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {1: {"flags": {"lr": 0.02}}},
            "run.lr: n1 (rank 1) has 0.02, n0 (rank 0), n2 (rank 2) have 0.01; give every node",
        ),
        (
            {0: {"code": "3"}, 1: {"code": "4"}, 2: {"code": "4"}},
            " (other models/b.py), n1 (rank 1), n2 (rank 2) have ",
        ),
        ({1: {"own_disk": True}}, "/run': does not show what n0 wrote there; give a folder on"),
        soak({2: {"flags": {"data": "/nowhere"}}}, "n2 (rank 2): data='/nowhere': no man"),
        soak({2: {"clock": -9}}, "clock: n2 (rank 2) is -9."),
    ],
)
def test_what_differs_is_told_to_every_rank(
    changes: Changes, part: str, shards_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for kind, told in start(run, shards_dir, changes):
        assert kind == "AgreedError 2"
        assert part in told
    assert not (run / "metrics.jsonl").exists()


def test_a_node_with_other_data_under_the_same_name_is_named(
    corpus_dir: Path, shards_dir: Path, tmp_path: Path
) -> None:
    """Their documents are divided otherwise; the tokenizer is the same."""
    told = f"tokenize --input {corpus_dir} --output {tmp_path}/{shards_dir.name} --tokenizer "
    told += f"{shards_dir.parent}/t.model --block_tokens 1024 --validation_fraction 0.2"
    dispatch(told.split())
    nodes = {rank: {"own_data": shards_dir.parent} for rank in (0, 1)}
    changes = {**nodes, 2: {"own_data": tmp_path}}
    settings = Path("ds_configs/cpu.json").resolve()
    run = tmp_path / "run"
    for kind, line in start(run, Path(shards_dir.name), changes, ds_config=settings):
        assert kind == "AgreedError 2"
        assert line.startswith("data: n2 (rank 2) has ")
        assert line.endswith("; bring the same folder to every node")
        assert ", n0 (rank 0), n1 (rank 1) have " in line
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.soak
def test_nodes_that_score_a_run_agree_first(shards_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_entry("pretrain", 1, flags(run, shards_dir, steps=1))
    asked = {"run": run, "eval_sequences": 4, "threads": 1}
    before = len(records(run, "eval.jsonl"))
    for change, part in [
        ({"flags": {"data": "/nowhere"}}, "n1 (rank 1): data='/nowhere': no manifest"),
        ({"code": "4"}, "code: n1 (rank 1) has "),
        ({"flags": {"eval_sequences": 5}}, "eval_sequences: n1 (rank 1) has 5, n0 (rank 0) has 4"),
    ]:
        for kind, line in run_ranks(_start, 2, asked, {1: change}, "evaluate"):
            assert kind == "AgreedError 2"
            assert part in line
    assert len(records(run, "eval.jsonl")) == before
    assert run_ranks(_start, 2, asked, {}, "evaluate") == [("trained", "")] * 2
    assert len(records(run, "eval.jsonl")) == before + 1


@pytest.mark.soak
def test_a_node_that_does_not_come_is_waited_for_so_long_and_no_longer(
    shards_dir: Path, tmp_path: Path
) -> None:
    ends = start(tmp_path / "run", shards_dir, {2: {"late": 9}}, start_timeout=4)
    assert [kind for kind, _ in ends] == ["AgreedError 1", "AgreedError 1", "Fault 1"]
    joined = "start_timeout=4: rank 2 did not join, n0 (rank 0), n1 (rank 1) did; see"
    assert joined in ends[0][1]
    assert joined in ends[1][1]
    assert "rank 0 did not answer n2 (rank 2) within start_timeout=4 s" in ends[2][1]
