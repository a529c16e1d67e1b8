"""Nothing is lost, nothing repeated, and what is not used is told."""

import hashlib
import json
import random
import tarfile
from collections import Counter

from pipeline.data.cuts import Cuts
from pipeline.data.manifest import read_manifest
from tests.tools.tokenising import content
from tests.tools.tokenize_corpus.small import line, recovered, run


def test_every_document_comes_back_once_and_in_its_source(corpus, shards):
    manifest = read_manifest(shards)
    assert manifest.sources("train") == tuple(sorted(corpus[1]))
    for source, expected in corpus[1].items():
        found = {split: recovered(shards, split, source) for split in ("train", "validation")}
        assert Counter(found["train"] + found["validation"]) == Counter(expected)
        assert not set(found["train"]) & set(found["validation"])
        for split, documents in found.items():
            told = manifest.select(split, source)
            assert sum(s.documents for s in told) == len(documents)
            assert sum(s.text_bytes for s in told) == sum(len(d.encode()) for d in documents)
    assert sum(s.documents for s in manifest.select("validation")) > 10


def test_any_jsonl_is_read_by_the_field_that_holds_its_text(model, tmp_path):
    (tmp_path / "in").mkdir()
    rows = [{"content": f"row {i}", "text": "another"} for i in range(20)] + [{"text": "none"}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "in/some.jsonl").write_text(content)
    given = {"text_field": "content", "default_source": "mine", "validation_fraction": 0.0}
    out = run(tmp_path / "in", model, tmp_path / "out", **given)
    assert recovered(out, "train", "mine") == [f"row {i}" for i in range(20)]
    assert read_manifest(out).inputs[0].rejects == {"no text": 1}


def test_equal_texts_of_different_sources_are_on_one_side(model, tmp_path):
    for name in ("book", "github"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_bytes(b"".join(line(f"text {i}") for i in range(200)))
    out = run(tmp_path, model, tmp_path / "out", validation_fraction=0.5)
    sides = {s: recovered(out, "validation", s) for s in ("book", "github")}
    assert sides["book"] == sides["github"]
    assert 60 < len(sides["book"]) < 140


def test_shards_are_as_the_manifest_says(shards):
    manifest = read_manifest(shards)
    assert len(manifest.shards) > 20
    for shard in manifest.shards:
        data = (shards / shard.path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        with tarfile.open(shards / shard.path) as tar:
            assert len(tar.getnames()) == 2 * shard.samples
    assert {p for p in content(shards) if p.endswith(".tar")} == {s.path for s in manifest.shards}


def test_rejected_rows_are_counted_and_listed(corpus, shards):
    manifest = read_manifest(shards)
    (item,) = [item for item in manifest.inputs if item.path == "github/filtered_1.jsonl"]
    assert item.rejects == {"bad JSON": 1, "empty": 1, "no text": 1}
    assert item.rows == item.documents + 3 == 39
    listed = [json.loads(row) for row in (shards / "rejects.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in listed] == ["bad JSON", "empty", "no text"]
    data = (corpus[0] / listed[0]["file"]).read_bytes()
    assert data[listed[0]["offset"] :].startswith(b"{bad\n")
    assert {i.path: i.replaced_surrogates for i in manifest.inputs}["book/book.jsonl.gz"] == 1


def test_texts_of_the_wrong_length_are_left_out_by_choice(corpus, model, tmp_path):
    limits = {"min_characters": 10, "max_characters": 500, "max_reject_rate": 0.05}
    out = run(corpus[0], model, tmp_path / "out", **limits)
    manifest = read_manifest(out)
    for source, expected in corpus[1].items():
        found = [d for split in ("train", "validation") for d in recovered(out, split, source)]
        assert Counter(found) == Counter(t for t in expected if 10 <= len(t) <= 500)
    rejects = sum((Counter(item.rejects) for item in manifest.inputs), Counter())
    texts = [text for expected in corpus[1].values() for text in expected]
    assert rejects["too short"] == sum(len(text) < 10 for text in texts) > 0
    assert rejects["too long"] == sum(len(text) > 500 for text in texts) > 0
    listed = [json.loads(row) for row in (out / "rejects.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in listed) == rejects
    assert manifest.settings["min_characters"] == 10


def test_a_row_too_long_to_hold_is_passed_over(model, tmp_path):
    long = line("x " * 40_000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(line("before") + long + line("after"))
    # Tasks begin and end inside the long row.
    given = {"max_row_bytes": 1000, "task_bytes": 7000, "max_reject_rate": 1.0}
    out = run(tmp_path / "in", model, tmp_path / "out", validation_fraction=0.0, **given)
    assert recovered(out, "train", "corpus") == ["before", "after"]
    (listed,) = [json.loads(row) for row in (out / "rejects.jsonl").read_text().splitlines()]
    told = {"file": "a.jsonl", "offset": len(line("before")), "reason": "row too long"}
    assert listed == told


def test_a_document_is_in_one_piece_however_it_was_encoded(model, tmp_path, monkeypatch):
    from pipeline.data import encoder

    monkeypatch.setattr(encoder, "PART_CHARACTERS", 1000)
    monkeypatch.setattr(encoder, "UNCUT_CHARACTERS", 4000)
    is_safe = Cuts.is_safe
    monkeypatch.setattr(Cuts, "is_safe", lambda *given: "##" not in given[1] and is_safe(*given))
    generator = random.Random(2)
    texts = [" ".join(generator.choices(["word", "[EOD]", "日本"], k=5000)) for _ in range(3)]
    (tmp_path / "in").mkdir()
    rows = [line(text) for text in [*texts, "##" * 5000]]
    (tmp_path / "in/a.jsonl").write_bytes(b"".join(rows))
    given = {"validation_fraction": 0.0, "task_bytes": 10**7, "max_reject_rate": 0.5}
    out = run(tmp_path / "in", model, tmp_path / "out", **given)
    assert recovered(out, "train", "corpus") == texts
    assert read_manifest(out).inputs[0].rejects == {"no place to cut": 1}
    # Cut or not, the ids are the same; the last shards hold the document that was left out, too.
    monkeypatch.setattr(encoder, "PART_CHARACTERS", 10**6)
    again = run(tmp_path / "in", model, tmp_path / "again", **given)
    shards = [item for item in content(out).items() if "shard-000000" in item[0]][:-1]
    assert len(shards) > 5
    assert set(shards) <= set(content(again).items())
