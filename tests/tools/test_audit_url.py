"""An audit of a URL finds what one of the folder finds, and a bad network is no finding."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.data.manifest import read_manifest
from pipeline.options import UserError
from tests.pipeline.data.s3_server import Proxy, serving
from tools.audit import Options, audit

# A real server and a proxy before it.
pytestmark = pytest.mark.distributed
BUCKET = "audited"  # its own: the servers of one process share what they hold


@pytest.fixture(scope="module")
def served(
    shards_dir: Path, flan_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Proxy]]:
    """A folder of both kinds of folder, and the proxy before a server that holds the same."""
    top = tmp_path_factory.mktemp("bucket")
    shutil.copytree(shards_dir, top / "tokens")
    shutil.copytree(flan_dir, top / "flan")
    with serving(top, BUCKET) as proxy:
        yield top, proxy


@pytest.fixture
def quiet(served: tuple[Path, Proxy]) -> tuple[Path, Proxy]:
    served[1].trouble = lambda path, count: ""
    served[1].reads.clear()
    return served


def findings(place: str | Path, workers: int = 1) -> list[str]:
    return list(audit(Options(str(place), workers=workers)))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize("kind", ["tokens", "flan"])
def test_a_good_url_has_no_finding_whatever_the_network_does(quiet, kind, capsys) -> None:
    top, proxy = quiet
    assert findings(top / kind) == []
    told = capsys.readouterr().out
    # The first read of everything fails, the second is cut off, a shard's third is damaged.
    proxy.trouble = lambda path, count: {
        1: "error",
        2: "drop",
        3: "flip" if path.endswith(".tar") else "",
    }.get(count, "")
    assert findings(f"s3://{BUCKET}/{kind}") == []
    assert capsys.readouterr().out == told.replace(str(top), f"s3://{BUCKET}")
    assert {count for path, count in proxy.reads.items() if path.endswith(".tar")} == {4}


Change = Callable[[bytes], bytes | None]
CHANGES: dict[str, tuple[str, Change]] = {
    "flipped bit": ("shard", flipped),
    "truncated": ("shard", lambda content: content[: len(content) // 3]),
    "longer": ("shard", lambda content: content + bytes(512)),
    "missing": ("shard", lambda content: None),
    "stray": ("train/github/shard-000009-000.tar", lambda content: b"stray"),
    "rejects": ("rejects.jsonl", lambda content: b"{}\n"),
    "manifest": ("manifest.json", flipped),
    "tokenizer": ("tokenizer.model", flipped),
    "no tokenizer": ("tokenizer.model", lambda content: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_wrong_there_is_told_as_here(quiet, change: str) -> None:
    top, proxy = quiet
    name, changed = CHANGES[change]
    if name == "shard":
        name = read_manifest(top / "tokens").shards[1].path
    path, key, client = top / "tokens" / name, f"tokens/{name}", proxy.client()
    before = path.read_bytes() if path.exists() else None
    after = changed(before or b"")
    try:
        if after is None:
            path.unlink()
            client.delete_object(Bucket=BUCKET, Key=key)
        else:
            path.write_bytes(after)
            client.put_object(Bucket=BUCKET, Key=key, Body=after)
        here, there = findings(top / "tokens"), findings(f"s3://{BUCKET}/tokens")
        if name in ("manifest.json", "tokenizer.model"):
            # The reason names the file that was read, which for a URL is a copy.
            here, there = ([line.split(":")[0] for line in told] for told in (here, there))
        assert here == there
        assert here
        assert all(line.startswith(name) for line in here)
    finally:
        if before is None:
            path.unlink()
            client.delete_object(Bucket=BUCKET, Key=key)
        else:
            path.write_bytes(before)
            client.put_object(Bucket=BUCKET, Key=key, Body=before)


@pytest.mark.soak
def test_workers_stream_too_and_leave_no_shard_here(quiet, tmp_path, monkeypatch) -> None:
    top, proxy = quiet
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert findings(f"s3://{BUCKET}/tokens", workers=2) == []
    shards = read_manifest(top / "tokens").shards
    assert sum(path.endswith(".tar") for path in proxy.reads) == len(shards)
    assert not list(tmp_path.rglob("*.tar"))


def test_a_shard_that_never_comes_is_a_finding_and_no_folder_a_mistake(quiet) -> None:
    top, proxy = quiet
    shard = read_manifest(top / "tokens").shards[1].path
    proxy.trouble = lambda path, count: "error" if path.endswith(shard) else ""
    (line,) = findings(f"s3://{BUCKET}/tokens")
    assert line.startswith(f"{shard}: cannot be read (s3://{BUCKET}/tokens/{shard}: cannot be")
    with pytest.raises(UserError, match=r"none/manifest\.json: not there"):
        findings(f"s3://{BUCKET}/none")
