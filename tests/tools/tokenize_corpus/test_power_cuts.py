"""Whenever the power goes: what a record or manifest tells of is on disk before it is."""

import json
from pathlib import Path

import pytest

from pipeline.data.manifest import read_manifest
from tests.power_cut import PowerCut
from tests.tools.tokenising import content
from tests.tools.tokenize_corpus.small import line, run


@pytest.fixture
def inputs(tmp_path):
    (tmp_path / "in").mkdir()
    rows = [line(f"{i % 300} text " * 20) for i in range(400)]
    (tmp_path / "in/a.jsonl").write_bytes(b"".join(rows) + b"{bad\n")
    return tmp_path / "in"


def told_of(output: Path, path: Path, text: bytes) -> list[Path]:
    """The files that a file vouches for."""
    told = json.loads(text) if path.suffix in {".json", ".hashed"} else {}
    if path.name == "manifest.json":
        names = [shard["path"] for shard in told["shards"]]
        return [output / name for name in ("tokenizer.model", "rejects.jsonl", *names)]
    if "record" in told:
        record = told["record"]
        shards = [output / shard["path"] for shard in record["shards"]]
        return [*shards, *(output / "tasks" / name for name in record["files"])]
    if path.suffix == ".hashed":
        return [path.with_suffix(".hashes")]
    return [path.with_suffix(".index")] if path.suffix == ".drops" else []


def test_nothing_is_told_of_that_a_power_cut_would_lose(model, inputs, tmp_path, monkeypatch):
    output = tmp_path / "deep" / "out"
    seen = []

    def check(source, target):
        if target.suffix in {".running", ".ended"}:  # lost with those that ran
            return
        assert disk.has_bytes(source), target
        vouched = told_of(output, target, source.read_bytes())
        seen.append((target.name, len(vouched)))
        for path in vouched:
            assert disk.leaves(path), (target, path)

    with monkeypatch.context() as patch:
        disk = PowerCut(tmp_path, patch, check)
        given = {"task_bytes": 20_000, "shard_bytes": 20_000, "dedup": "exact"}
        run(inputs, model, output, **given)
        assert disk.leaves(output / "manifest.json")
    counts = dict(seen)
    assert counts["manifest.json"] == len(read_manifest(output).shards) + 2 > 8
    assert counts["000001.json"] > 2
    assert counts["exact.drops"] == counts["000000.hashed"] == 1
    assert seen[-1][0] == "manifest.json"
    assert content(run(inputs, model, tmp_path / "again", **given)) == content(output)
