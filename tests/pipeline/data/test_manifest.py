import hashlib
import json
import shutil
from dataclasses import replace

import pytest

from pipeline.data.manifest import (
    Input,
    Manifest,
    Shard,
    TokenizerInfo,
    read_manifest,
    write_manifest,
)
from pipeline.options import UserError
from tools import tokenize_corpus


def manifest():
    shard = Shard("train/book/shard-000000-000.tar", "train", "book", 2, 12, 3, 40, 20480, "ab")
    return Manifest(
        kind="tokens",
        dtype="uint16",
        block_tokens=8,
        tokenizer=TokenizerInfo("cd", 400, {"pad": 0}),
        settings={"validation_fraction": 0.1},
        shards=(shard, replace(shard, split="validation", source="c4", path="validation/c4/x.tar")),
        inputs=(Input("book.jsonl", 100, "ef", 4, 3, {"empty": 1}, 0),),
    )


def test_what_is_written_is_read(tmp_path):
    write_manifest(tmp_path, manifest())
    assert read_manifest(tmp_path) == manifest()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert manifest().splits() == ("train", "validation")
    assert manifest().sources("validation") == ("c4",)


def test_fingerprint_covers_everything():
    changed = [
        replace(manifest(), block_tokens=16),
        replace(manifest(), settings={}),
        replace(manifest(), shards=manifest().shards[:1]),
        replace(manifest(), inputs=()),
        replace(manifest(), tokenizer=TokenizerInfo("cd", 400, {"pad": 1})),
    ]
    assert len({m.fingerprint for m in [manifest(), *changed]}) == len(changed) + 1


@pytest.mark.parametrize("folder", ["absent", "."])
def test_absent_manifest_names_folder_and_remedy(tmp_path, folder):
    with pytest.raises(UserError, match=r"data=.*no manifest\.json.*isoflop tokenize"):
        read_manifest(tmp_path / folder)


def edit(tmp_path, change):
    write_manifest(tmp_path, manifest())
    path = tmp_path / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def test_an_edited_manifest_is_refused(tmp_path):
    edit(tmp_path, lambda fields: fields["shards"][0].update(tokens=11))
    with pytest.raises(UserError, match="fingerprint"):
        read_manifest(tmp_path)


def test_another_format_is_refused(tmp_path):
    edit(tmp_path, lambda fields: fields.update(format=2))
    with pytest.raises(UserError, match="format 2"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("path", ["../x.tar", "/etc/x.tar", "train/../../x.tar"])
def test_a_shard_outside_the_folder_is_refused(tmp_path, path):
    bad = manifest()
    write_manifest(tmp_path, replace(bad, shards=(replace(bad.shards[0], path=path),)))
    with pytest.raises(UserError):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', "\0\0"])
def test_garbage_is_refused_readably(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest"):
        read_manifest(tmp_path)


def test_a_finished_folder_that_lost_a_shard_is_not_called_complete(
    corpus, model, shards, tmp_path, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    options = tokenize_corpus.Options(
        input=(corpus.glob,),
        output=str(copy),
        tokenizer=str(model),
        validation_fraction=0.2,
        block_tokens=512,
        task_bytes=8000,
        shard_bytes=8000,
    )
    tokenize_corpus.run(options)
    assert "is complete" in capsys.readouterr().out
    (copy / read_manifest(copy).shards[3].path).unlink()
    with pytest.raises(UserError, match="is missing; restore it or tokenise again"):
        tokenize_corpus.run(options)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"fraction": 1e-05, "large": 1e22, "whole": 2.0}},
        {"settings": {"text_field": "文\u2028"}},
        {"inputs": (Input("name-\udc80.jsonl", 1, "0", 1, 1, {}, 0),)},
    ],
)
def test_rare_names_and_numbers_come_back(tmp_path, change):
    written = replace(manifest(), **change)
    write_manifest(tmp_path, written)
    found = read_manifest(tmp_path)
    assert found == written
    # The fingerprint that was read is the one that would be worked out.
    assert found.fingerprint == replace(found).fingerprint == written.fingerprint


def test_rows_with_other_fields_are_refused(tmp_path):
    for rows, field in (("shards", "tokens"), ("inputs", "truncated")):
        write_manifest(tmp_path, manifest())
        fields = json.loads((tmp_path / "manifest.json").read_text())
        fields.pop("fingerprint")
        fields[rows][0].pop(field)
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        fields["fingerprint"] = hashlib.sha256(canonical.encode()).hexdigest()
        (tmp_path / "manifest.json").write_text(json.dumps(fields))
        with pytest.raises(UserError, match="fingerprint"):
            read_manifest(tmp_path)
