"""Whatever one bit, file or tokenizer is not as it was, the audit names it."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.manifest import Manifest, read_manifest, write_manifest
from pipeline.data.shards import ShardWriter, token_layout
from pipeline.options import UserError
from tests.tools.tokenising import make_corpus, make_model, run_here
from tools.audit import Options, audit
from tools.cli import dispatch


def findings(folder: Path, **options: int) -> list[str]:
    return list(audit(Options(str(folder), **{"workers": 1, **options})))


@pytest.fixture(params=["tokens", "flan"])
def folder(request, shards_dir: Path, flan_dir: Path, tmp_path: Path) -> Path:
    """A copy of a good folder, to be damaged."""
    source = {"tokens": shards_dir, "flan": flan_dir}[request.param]
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.fixture
def tokens(shards_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards_dir, tmp_path / "copy"))


def flip(path: Path, position: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_a_good_folder_has_no_finding_and_a_summary(folder: Path, capsys) -> None:
    assert findings(folder) == []
    dispatch(["audit", str(folder)])
    out = capsys.readouterr().out
    manifest = read_manifest(folder)
    assert f"{sum(s.tokens for s in manifest.shards):,} tokens" in out
    assert " 0 texts decoded" not in out


def flips(folder: Path, count: int, seed: int) -> None:
    """Flip single bits of every file that the manifest vouches for; each must be found."""
    generator = random.Random(seed)
    names = ["manifest.json", "tokenizer.model"]
    names += [shard.path for shard in read_manifest(folder).shards]
    for name in names:
        path = folder / name
        for _ in range(count):
            position, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
            flip(path, position, bit)
            found = findings(folder)
            assert found, (name, position, bit)
            assert all(line.startswith(name) for line in found), (name, position, bit, found)
            flip(path, position, bit)
    assert findings(folder) == []


def test_a_single_flipped_bit_is_found_in_any_file(folder: Path) -> None:
    flips(folder, 3, seed=1)


def test_every_kind_of_byte_in_a_shard_is_named(tokens: Path) -> None:
    """Data, checksums, tar headers, array headers, padding, the archive's end."""
    manifest = read_manifest(tokens)
    layout = token_layout(manifest.block_tokens, manifest.dtype)
    shard = max(manifest.shards, key=lambda shard: shard.samples)
    sample = layout.sample_bytes * (shard.samples - 1)
    data = sample + layout.data_offset["tokens.npy"]
    data_end = data + layout.by_name["tokens.npy"].data_bytes
    sums = sample + layout.data_offset["xxh3.npy"]
    key = f"-{shard.samples - 1:06d}, tokens.npy"
    places = {
        sample + 3: f"{key}: its tar header differs at byte {sample + 3}",
        data - 60: f"{key}: its .npy header differs at byte {data - 60}",
        data + 5: f"{key}: 4 KiB block 0, at byte {data}, and its checksum do not agree",
        data_end + 9: f"padding before it, at byte {data_end}, is not zero",
        sums + 2: "block 0",
        sums + 30: "the padding behind it",
        shard.bytes - 1: f"byte {shard.bytes - 1}: the end of the archive",
    }
    for position, told in places.items():
        flip(tokens / shard.path, position, 1)
        found = findings(tokens)
        assert len(found) == 2, found
        assert found[0].startswith(f"{shard.path}: ")
        assert told in found[0]
        assert "sha256" in found[1]
        flip(tokens / shard.path, position, 1)


def test_truncated_missing_and_foreign_files_are_named(folder: Path) -> None:
    manifest = read_manifest(folder)
    shard = manifest.shards[0]
    path, content = folder / shard.path, (folder / shard.path).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert any("truncated" in line and shard.path in line for line in findings(folder))
    path.write_bytes(content + bytes(10240))
    assert any("the manifest says" in line for line in findings(folder))
    path.unlink()
    assert findings(folder) == [f"{shard.path}: cannot be read (No such file or directory)"]
    path.write_bytes(content)
    extra = path.with_name("shard-999999-000.tar")
    extra.write_bytes(content)
    name = extra.relative_to(folder).as_posix()
    assert findings(folder) == [f"{name}: is not in the manifest; remove it"]


def test_two_shards_that_changed_places_are_found(tokens: Path) -> None:
    first, second = read_manifest(tokens).shards[:2]
    one, other = (tokens / first.path).read_bytes(), (tokens / second.path).read_bytes()
    (tokens / first.path).write_bytes(other)
    (tokens / second.path).write_bytes(one)
    found = findings(tokens)
    assert {line.partition(":")[0] for line in found} == {first.path, second.path}


def test_a_list_of_rejected_rows_that_is_not_the_manifests_is_found(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", 60)
    model = make_model(corpus, tmp_path / "spm.model")
    tokens = run_here(corpus, model, tmp_path / "tokens", task_bytes=10**6)
    path = tokens / "rejects.jsonl"
    content = path.read_bytes()
    rows = content.splitlines(keepends=True)
    row = json.loads(rows[0])
    other = json.dumps({**row, "reason": "of no kind"}).encode() + b"\n"
    garbled = rows[0].replace(b'"offset"', b'"off\xffet"')
    for changed, told in [
        (other, f"lists 1 rows of {row['file']!r} as 'of no kind', the manifest counts 0"),
        (garbled, "lists 1 rows of '' as"),
        (b"", f"{len(rows) - 1} lines, the manifest counts {len(rows)} rejected rows"),
    ]:
        path.write_bytes(content.replace(rows[0], changed, 1))
        (finding,) = findings(tokens)
        assert finding.startswith(f"rejects.jsonl: {told}")
    path.write_bytes(content)
    assert findings(tokens) == []


def retrained(folder: Path, corpus_dir: Path) -> Path:
    """Another tokenizer with as many ids."""
    other = folder.parent / "other.model"
    dispatch(
        f"tokenizer train --input {corpus_dir}/github --output {other} --vocab_size 512".split()
    )
    return other


def test_a_swapped_tokenizer_is_found_even_when_the_manifest_goes_along(
    tokens: Path, corpus_dir: Path
) -> None:
    content = retrained(tokens, corpus_dir).read_bytes()
    (tokens / "tokenizer.model").write_bytes(content)
    (line,) = findings(tokens)
    assert line.startswith("tokenizer.model: sha256 is ")
    from pipeline.data.tokenizer import load

    manifest = read_manifest(tokens)
    info = replace(manifest.tokenizer, sha256=load(tokens / "tokenizer.model").sha256)
    write_manifest(tokens, replace(manifest, tokenizer=info))
    found = findings(tokens)
    assert any("the tokenizer is not the one that made them" in line for line in found)


def rewritten(folder: Path, manifest: Manifest, number: int, ids: np.ndarray) -> Manifest:
    """The manifest after its shard `number` was replaced by blocks `ids`, hashes included."""
    shard = manifest.shards[number]
    layout = token_layout(manifest.block_tokens, manifest.dtype)
    writer = ShardWriter(folder / shard.path, layout)
    for block in ids:
        writer.add({"tokens.npy": block})
    written = writer.close()
    changed = replace(shard, sha256=written.sha256, bytes=written.bytes)
    shards = (*manifest.shards[:number], changed, *manifest.shards[number + 1 :])
    return replace(manifest, shards=shards)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("outside", "is outside the vocabulary of 512"),
        ("document", "documents, the manifest says"),
        ("padding", "holds other ids than [PAD]"),
        ("text", "bytes of text, the manifest says"),
    ],
)
def test_content_is_proved_even_where_every_hash_agrees(
    tokens: Path, change: str, told: str
) -> None:
    from pipeline.data.sequences import SequenceStore

    manifest = read_manifest(tokens)
    number = next(
        i for i, s in enumerate(manifest.shards) if s.tokens < s.samples * manifest.block_tokens
    )
    shard = manifest.shards[number]
    store = SequenceStore(tokens, shard.split, manifest.block_tokens)
    before = sum(
        s.samples for s in manifest.select(shard.split, shard.source) if s.path < shard.path
    )
    blocks = [store.read(shard.source, before + i)[0].copy() for i in range(shard.samples)]
    eod = manifest.tokenizer.special_ids["eod"]
    ordinary = int(np.flatnonzero(blocks[0] != eod)[5])
    if change == "outside":
        blocks[0][ordinary] = 512
    elif change == "document":
        blocks[0][ordinary] = eod
    elif change == "padding":
        blocks[-1][-1] = 7
    else:
        # [PAD] stands for no text.
        blocks[0][ordinary] = manifest.tokenizer.special_ids["pad"]
    write_manifest(tokens, rewritten(tokens, manifest, number, np.stack(blocks)))
    assert any(told in line for line in findings(tokens, decode=0))


def test_a_manifest_that_was_only_reformatted_is_told(tokens: Path) -> None:
    path = tokens / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    (line,) = findings(tokens)
    assert line.startswith("manifest.json: means what it should")


def test_counts_that_do_not_add_up_are_told(tokens: Path) -> None:
    manifest = read_manifest(tokens)
    first = replace(manifest.inputs[0], documents=manifest.inputs[0].documents + 1)
    write_manifest(tokens, replace(manifest, inputs=(first, *manifest.inputs[1:])))
    found = findings(tokens)
    assert any("rows were read" in line for line in found)
    assert any("documents are in shards" in line for line in found)


def test_many_workers_find_the_same(tokens: Path) -> None:
    flip(tokens / read_manifest(tokens).shards[-1].path, 5000, 3)
    assert findings(tokens, workers=2) == findings(tokens) != []


def test_exit_codes_tell_a_finding_from_a_mistake(tokens: Path, capsys) -> None:
    flip(tokens / "manifest.json", 100, 0)
    with pytest.raises(SystemExit) as caught:
        dispatch(["audit", str(tokens)])
    assert caught.value.code == 1
    assert capsys.readouterr().out.startswith("manifest.json: ")
    with pytest.raises(UserError, match=r"no manifest\.json"):
        dispatch(["audit", str(tokens.parent)])


def test_a_plain_webdataset_pipeline_reads_the_folder(shards_dir: Path) -> None:
    import webdataset

    manifest = read_manifest(shards_dir)
    paths = [str(shards_dir / shard.path) for shard in manifest.select("train")]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert len(samples) == sum(shard.samples for shard in manifest.select("train"))
    assert all(sample["tokens.npy"].shape == (manifest.block_tokens,) for sample in samples)
