"""Shards behind a URL are read as if they lay here, whatever the network does."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import loader, remote
from pipeline.data.flan import FlanStore
from pipeline.data.loader import TrainingOrder
from pipeline.data.manifest import check_folder, read_manifest, write_manifest
from pipeline.data.sequences import SequenceStore
from pipeline.data.shards import CHECKSUMS, token_layout
from pipeline.data.validation import stream_sequences
from pipeline.options import UserError
from tests.pipeline.data.s3_server import serving
from tools import inspect_shards
from tools.worker_pool import in_order

# A real server and a proxy before it.
pytestmark = pytest.mark.distributed
URL = "s3://corpus/tokens"


@pytest.fixture(scope="module")
def s3(shards, tmp_path_factory):
    """The proxy before a server that holds the shard folder."""
    top = tmp_path_factory.mktemp("bucket")
    shutil.copytree(shards, top / "tokens")
    with serving(top, "corpus") as proxy:
        yield proxy


@pytest.fixture
def proxy(s3):
    s3.trouble = lambda path, count: ""
    s3.reads.clear()
    return s3


def order_of(folder, window="all"):
    return TrainingOrder(SequenceStore(folder, "train", 128), 3, window)


def test_a_server_that_fails_and_drops_gives_the_same_batches(proxy, shards, tmp_path):
    # The first read of everything fails, the second is cut off, each shard's third is damaged.
    def trouble(path, count):
        third = "flip" if path.endswith(".tar") else ""
        return {1: "error", 2: "drop", 3: third}.get(count, "")

    proxy.trouble = trouble
    folder = remote.local_folder(URL, str(tmp_path), 1.0)
    assert check_folder(folder) == read_manifest(shards)
    here, there = order_of(shards), order_of(folder)
    for start in (0, 12, 24):
        expected, found = here.batch(start, 12), there.batch(start, 12)
        assert np.array_equal(expected.ids, found.ids)
        assert np.array_equal(expected.sample_numbers, found.sample_numbers)
    assert any(path.endswith(".tar") and count > 2 for path, count in proxy.reads.items())


def test_what_is_here_is_not_fetched_again_and_ranks_share_it(proxy, tmp_path):
    folder = remote.local_folder(URL, str(tmp_path), 1.0)
    errors = []

    def rank():
        try:
            order_of(folder).batch(0, 40)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    fetched = {path: count for path, count in proxy.reads.items() if path.endswith(".tar")}
    assert fetched
    assert set(fetched.values()) == {1}
    order_of(remote.local_folder(URL, str(tmp_path), 1.0)).batch(0, 40)
    assert {p: c for p, c in proxy.reads.items() if p.endswith(".tar")} == fetched


def test_the_next_window_is_here_before_it_is_needed(proxy, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_LOOK_BATCHES", 1)
    limit = 2 * sum(max(s.bytes for s in group) for group in groups(read_manifest(shards)))
    folder = remote.local_folder(URL, str(tmp_path), limit / 1e9)
    order, here = order_of(folder, 1), order_of(shards, 1)
    position = crossed = 0
    for _ in range(10):
        wanted = {f"{shard.sha256}.tar" for shard in order.shards_ahead(position)}
        # The stride makes it training's, which reads on.
        order.batch(position, 1, stride=1)
        until = time.monotonic() + 30
        while not wanted <= names_in(folder) and time.monotonic() < until:
            time.sleep(0.01)
        assert wanted <= names_in(folder)
        assert sum(path.stat().st_size for path in (folder / "shards").glob("*.tar")) <= limit
        fetched = sum(proxy.reads.values())
        first, position = position, position + 1
        while not lies_beyond(order, position, wanted):
            assert np.array_equal(order.batch(position, 1).ids, here.batch(position, 1).ids)
            position += 1
        crossed += order.shards_ahead(first) != order.shards_ahead(position - 1)
        # Reading on, into what comes next, asked the server for nothing.
        assert sum(proxy.reads.values()) == fetched
    assert crossed


def lies_beyond(order, position, names):
    """Whether the sample at `position` is in none of the shards that these files hold."""
    source, _, index = order.locate(np.array([position]))
    shards = order.store.manifest.select("train", order.mixture.sources[source[0]])
    ends = np.cumsum(order.store.shard_sequences(order.mixture.sources[source[0]]))
    return f"{shards[np.searchsorted(ends, index[0], side='right')].sha256}.tar" not in names


def names_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "shards").glob("*.tar")}


def groups(manifest):
    return [manifest.select("train", name) for name in manifest.sources("train")]


def test_the_cache_keeps_its_limit_and_two_windows_must_fit(proxy, shards, tmp_path):
    manifest = read_manifest(shards)
    largest = max(shard.bytes for shard in manifest.shards)
    sources = len(manifest.sources("train"))
    limit = 2 * sources * largest
    folder = remote.local_folder(URL, str(tmp_path), limit / 1e9)
    order, here = order_of(folder, 1), order_of(shards, 1)
    for start in range(0, 200, 10):
        assert np.array_equal(order.batch(start, 10).ids, here.batch(start, 10).ids)
        held = sum(path.stat().st_size for path in (folder / "shards").glob("*.tar"))
        assert 0 < held <= limit
    with pytest.raises(UserError, match=r"cache_gb=.*two windows of every source take"):
        order_of(folder, "all")


def test_what_a_killed_rank_left_is_removed(proxy, tmp_path):
    folder = remote.local_folder(URL, str(tmp_path), 1.0)
    (folder / "shards").mkdir()
    left = folder / "shards" / f"{'0' * 64}.partial"
    left.write_bytes(b"half")
    order_of(folder).batch(0, 1)
    assert not left.exists()
    assert not list((folder / "shards").glob("*.partial"))


@pytest.mark.parametrize(
    ("kind", "told"),
    [("error", "cannot be fetched in 6 tries"), ("flip", "do not have the manifest's sha256")],
)
def test_what_does_not_pass_is_one_clear_line(proxy, tmp_path, kind, told):
    folder = remote.local_folder(URL, str(tmp_path), 1.0)
    proxy.trouble = lambda path, count: kind if path.endswith(".tar") else ""
    with pytest.raises(UserError, match=told) as caught:
        order_of(folder).batch(0, 1)
    assert f"{URL}/train/" in str(caught.value)


def test_a_folder_that_is_not_there_is_told_at_once(proxy, tmp_path):
    with pytest.raises(UserError, match=r"s3://corpus/none/manifest\.json: not there"):
        remote.local_folder("s3://corpus/none", str(tmp_path), 1.0)
    assert sum(proxy.reads.values()) <= 2


def test_a_file_url_needs_no_server(shards, tmp_path):
    folder = remote.local_folder(f"file://{shards}/", str(tmp_path), 1.0)
    assert folder.is_relative_to(tmp_path)
    assert np.array_equal(order_of(folder).batch(5, 30).ids, order_of(shards).batch(5, 30).ids)
    assert check_folder(folder) == read_manifest(shards)


def test_flan_rows_come_through_the_cache_too(flan_dir, tmp_path):
    here = FlanStore(flan_dir, "train")
    there = FlanStore(remote.local_folder(f"file://{flan_dir}", str(tmp_path), 1.0), "train")
    assert there.longest_row() == here.longest_row()
    for index in (0, len(here) - 1):
        for mine, other in zip(here.read(index), there.read(index), strict=True):
            assert np.array_equal(mine, other)


def test_a_shard_that_is_missing_or_cut_there_is_told_before_any_work(shards, tmp_path):
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    shard = copy / read_manifest(copy).shards[0].path
    content = shard.read_bytes()
    for change, told in ((content[:-512], "bytes, not"), (None, "is missing")):
        shard.unlink()
        if change is not None:
            shard.write_bytes(change)
        folder = remote.local_folder(f"file://{copy}", str(tmp_path / "cache"), 1.0)
        with pytest.raises(UserError, match=told):
            check_folder(folder)


HOSTILE = ["../../evil", "/etc/evil", "..", "a\0b", "x" * 300, "..\\..\\evil", "%2e%2e/evil"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("field", ["sha256", "path"])
def test_no_name_in_a_manifest_writes_outside_the_cache(shards, tmp_path, field, name):
    copy, outside = Path(shutil.copytree(shards, tmp_path / "copy")), tmp_path / "deep" / "cache"
    manifest = read_manifest(copy)
    hostile = tuple(replace(shard, **{field: name}) for shard in manifest.shards)
    write_manifest(copy, replace(manifest, shards=hostile))
    before = {path for path in tmp_path.rglob("*") if outside not in path.parents}

    def read() -> None:
        order_of(remote.local_folder(f"file://{copy}", str(outside), 1.0)).batch(0, 1)

    with pytest.raises(UserError):
        read()
    after = {path for path in tmp_path.rglob("*") if outside not in path.parents}
    assert after - before <= {tmp_path / "deep", outside}
    found = [path.name for path in outside.rglob("*") if path.is_file()]
    assert not any("evil" in name for name in found)


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a/../../evil", "evil/x"])
@pytest.mark.parametrize("member", ["tokens.npy", CHECKSUMS])
def test_no_name_in_a_tar_writes_outside_the_cache(shards, tmp_path, member, name):
    copy, cache = Path(shutil.copytree(shards, tmp_path / "copy")), tmp_path / "deep" / "cache"
    manifest = read_manifest(copy)
    shard = manifest.select("validation", "github")[0]
    # A member of the first sample under another name, its header's checksum and all hashes right.
    content = bytearray((copy / shard.path).read_bytes())
    layout = token_layout(manifest.block_tokens, manifest.dtype)
    at = layout.data_offset[member] - len(layout.by_name[member].header) - 512
    info = tarfile.TarInfo.frombuf(content[at : at + 512], "ascii", "strict")
    info.name = f"{name}.{member}"
    content[at : at + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    (copy / shard.path).write_bytes(content)
    hostile = replace(shard, sha256=hashlib.sha256(content).hexdigest())
    shards_now = tuple(hostile if one is shard else one for one in manifest.shards)
    write_manifest(copy, replace(manifest, shards=shards_now))
    before = set(tmp_path.rglob("*"))
    folder = remote.local_folder(f"file://{copy}", str(cache), 1.0)
    store = SequenceStore(folder, "validation", 128)
    if member == CHECKSUMS:
        # Offsets are arithmetic: no name but the first, which tells shards apart, is looked at.
        expected = SequenceStore(shards, "validation", 128).read("github", 0)[0]
        assert np.array_equal(store.read("github", 0)[0], expected)
    else:
        with pytest.raises(UserError, match="is another shard's"):
            store.read("github", 0)
    with pytest.raises(UserError, match=r"is not what was written|is another shard's"):
        stream_sequences(store, [("github", 0)])
    new = {path for path in tmp_path.rglob("*") if cache not in path.parents} - before
    assert new == {tmp_path / "deep", cache}
    assert not any("evil" in path.name for path in cache.rglob("*"))


def rank(folder):
    """What one process of several on a node reads."""
    return order_of(folder).batch(0, 40).ids.sum()


@pytest.mark.soak
def test_processes_of_a_node_fetch_each_shard_once(proxy, shards, tmp_path):
    folder = remote.local_folder(URL, str(tmp_path), 1.0)
    expected = order_of(shards).batch(0, 40).ids.sum()
    assert list(in_order(rank, [folder] * 4, workers=4)) == [expected] * 4
    fetched = {path: count for path, count in proxy.reads.items() if path.endswith(".tar")}
    assert set(fetched.values()) == {1}


@pytest.mark.parametrize("url", ["file:///../../x", "nosuch://x/y", "s3://", "file://\0"])
def test_a_hostile_or_unknown_url_is_a_readable_error(tmp_path, url, monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.0)
    with pytest.raises(UserError):
        remote.local_folder(url, str(tmp_path / "cache"), 1.0)
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_a_marker_that_is_damaged_is_no_cache(tmp_path):
    (tmp_path / ".remote.json").write_text(json.dumps(["url"]))
    assert remote.cache_of(tmp_path) is None


def test_inspect_of_a_url_says_what_that_of_the_folder_says(shards, tmp_path, capsys):
    for place in (str(shards), f"file://{shards}"):
        inspect_shards.run(inspect_shards.Options(dir=place, cache_dir=str(tmp_path)))
    told = capsys.readouterr().out
    assert told[: len(told) // 2] == told[len(told) // 2 :]
    assert "github" in told
    assert not list(tmp_path.rglob("*.tar"))
