import io
import re
import tarfile

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.shards import (
    CHUNK_BYTES,
    CorruptShardError,
    Member,
    SampleLayout,
    ShardReader,
    ShardWriter,
    token_layout,
)

KEY = "000007-001"


def write(path, layout, blocks):
    writer = ShardWriter(path, layout)
    for block in blocks:
        writer.add({"tokens.npy": block})
    return writer.close()


@pytest.fixture
def shard(tmp_path):
    layout = token_layout(5000, "uint16")
    blocks = np.random.default_rng(0).integers(0, 60_000, (3, 5000)).astype(np.uint16)
    path = tmp_path / "train" / f"shard-{KEY}.tar"
    return path, layout, blocks, write(path, layout, blocks)


def test_any_tar_reader_finds_the_arrays_and_their_checksums(shard):
    path, layout, blocks, written = shard
    with tarfile.open(path) as tar:
        members = {m.name: np.load(io.BytesIO(tar.extractfile(m).read())) for m in tar}
        assert all(m.mtime == 0 for m in tar.getmembers())
    assert list(members) == [
        f"{KEY}-{i:06d}.{name}" for i in range(3) for name in ("tokens.npy", "xxh3.npy")
    ]
    for index, block in enumerate(blocks):
        assert np.array_equal(members[f"{KEY}-{index:06d}.tokens.npy"], block)
        data = block.tobytes()
        expected = [
            xxhash.xxh3_64_intdigest(data[i : i + CHUNK_BYTES])
            for i in range(0, len(data), CHUNK_BYTES)
        ]
        assert members[f"{KEY}-{index:06d}.xxh3.npy"].tolist() == expected
    assert path.stat().st_size == written.bytes == layout.shard_bytes(3)


def test_webdataset_reads_it(shard):
    import webdataset

    path, _, blocks, _ = shard
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{KEY}-{i:06d}" for i in range(3)]
    assert all(np.array_equal(s["tokens.npy"], b) for s, b in zip(samples, blocks, strict=True))


@given(st.integers(0, 2), st.integers(0, 4999), st.integers(0, 5000))
@settings(deadline=None)
def test_a_slice_is_a_slice(tmp_path_factory, sample, start, count):
    folder = tmp_path_factory.getbasetemp()
    layout = token_layout(5000, "uint32")
    blocks = np.arange(15_000, dtype=np.uint32).reshape(3, 5000)
    if not (folder / "slices.tar").exists():
        write(folder / "slices.tar", layout, blocks)
    count = min(count, 5000 - start)
    read = ShardReader(folder / "slices.tar", layout, 3).read(sample, "tokens.npy", start, count)
    assert np.array_equal(read, blocks[sample, start : start + count])


@given(st.integers(0, 9999), st.integers(1, 255))
@settings(deadline=None, max_examples=30)
def test_a_flipped_byte_is_named_and_only_where_it_is_read(tmp_path_factory, byte, flip):
    path = tmp_path_factory.mktemp("flip") / f"shard-{KEY}.tar"
    layout = token_layout(5000, "uint16")
    write(path, layout, np.arange(10_000, dtype=np.uint16).reshape(2, 5000))
    position = layout.sample_bytes + layout.data_offset["tokens.npy"] + byte
    content = bytearray(path.read_bytes())
    content[position] ^= flip
    path.write_bytes(content)
    reader = ShardReader(path, layout, 2)
    reader.read(0, "tokens.npy")
    chunk = byte // CHUNK_BYTES
    for start in range(0, 5000, 500):
        chunks = range(start * 2 // CHUNK_BYTES, -(-(start + 500) * 2 // CHUNK_BYTES))
        if chunk not in chunks:
            reader.read(1, "tokens.npy", start, 500)
            continue
        with pytest.raises(CorruptShardError) as caught:
            reader.read(1, "tokens.npy", start, 500)
        assert str(path) in str(caught.value)
        assert f"{KEY}-000001" in str(caught.value)
        named = int(re.search(r"byte (\d+) of the file", str(caught.value)).group(1))
        assert named <= position < named + CHUNK_BYTES


def test_a_flipped_checksum_is_noticed(shard):
    path, layout, _, _ = shard
    content = bytearray(path.read_bytes())
    content[layout.data_offset["xxh3.npy"]] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError):
        ShardReader(path, layout, 3).read(0, "tokens.npy", 0, 10)


def test_truncated_absent_or_another_shard_is_refused(shard, tmp_path):
    path, layout, blocks, _ = shard
    with pytest.raises(CorruptShardError, match="cannot be opened"):
        ShardReader(path.with_name("none.tar"), layout, 3)
    other = tmp_path / "other.tar"
    write(other, token_layout(5000, "int16"), blocks.astype(np.int16))
    with pytest.raises(CorruptShardError, match="header"):
        ShardReader(other, layout, 3)
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(CorruptShardError, match="bytes, the manifest says"):
        ShardReader(path, layout, 3)


def test_another_shard_of_the_same_size_is_refused_by_name(shard, tmp_path):
    path, layout, blocks, _ = shard
    other = tmp_path / "train" / "shard-000008-000.tar"
    write(other, layout, blocks[::-1])
    told = (
        r"shard-000007-001\.tar: its first sample is '000008-000-000000' instead of '000007-001-0"
    )
    ShardReader(path, layout, 3)
    other.replace(path)
    with pytest.raises(CorruptShardError, match=told):
        ShardReader(path, layout, 3)
    # In a cache files have other names than in the manifest.
    ShardReader(path, layout, 3, "train/github/shard-000008-000.tar")
    with pytest.raises(CorruptShardError, match="instead of '000009-000-"):
        ShardReader(path, layout, 3, "train/github/shard-000009-000.tar")


def test_rows_of_a_second_member_are_verified_too(tmp_path):
    layout = SampleLayout([Member("a.npy", "int32", (7,)), Member("b.npy", "int32", (2000, 2))])
    a, b = np.arange(7, dtype=np.int32), np.arange(4000, dtype=np.int32).reshape(2000, 2)
    writer = ShardWriter(tmp_path / "x.tar", layout)
    writer.add({"a.npy": a, "b.npy": b})
    writer.close()
    reader = ShardReader(tmp_path / "x.tar", layout, 1)
    assert np.array_equal(reader.read(0, "b.npy", 1500, 3), b[1500:1503])
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[layout.data_offset["b.npy"] + 1500 * 8] ^= 4
    (tmp_path / "x.tar").write_bytes(content)
    reader = ShardReader(tmp_path / "x.tar", layout, 1)
    assert np.array_equal(reader.read(0, "a.npy"), a)
    with pytest.raises(CorruptShardError, match=r"b\.npy"):
        reader.read(0, "b.npy", 1500, 3)


def test_nothing_appears_under_the_name_before_close(tmp_path):
    writer = ShardWriter(tmp_path / "x.tar", token_layout(8, "uint16"))
    writer.add({"tokens.npy": np.zeros(8, np.uint16)})
    assert not (tmp_path / "x.tar").exists()
    writer.abort()
    assert not any(tmp_path.iterdir())
