import json

import pytest

from pipeline.data.manifest import read_manifest
from pipeline.options import UserError
from tools import flan, inspect_shards, tokenize_corpus, tokenizer
from tools.cli import dispatch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "github").mkdir()
    rows = [json.dumps({"text": f"text number {i}"}) for i in range(400)] + ["{bad"]
    (folder / "github/x.jsonl").write_text("\n".join(rows))
    (folder / "flan.jsonl").write_text('{"inputs": "what", "targets": "that"}\n')
    common = {"tokenizer": f"{folder}/spm.model", "block_tokens": 2048}
    tokenizer.run(
        tokenizer.Options(input=(f"{folder}/github",), output=f"{folder}/spm.model", vocab_size=385)
    )
    tokenize_corpus.run(
        tokenize_corpus.Options(
            input=(f"{folder}/github",),
            output=f"{folder}/shards",
            validation_fraction=0.2,
            **common,
        )
    )
    flan.run(flan.Options(input=(f"{folder}/flan.jsonl",), output=f"{folder}/flan", **common))
    return folder


def test_totals_are_the_manifests(folders):
    manifest = read_manifest(folders / "shards")
    summary = inspect_shards.summarise(manifest)
    assert [(row["split"], row["source"]) for row in summary["rows"]] == [
        ("train", "github"),
        ("validation", "github"),
    ]
    assert sum(row["documents"] for row in summary["rows"]) == 400
    assert sum(row["tokens"] for row in summary["rows"]) == sum(s.tokens for s in manifest.shards)
    assert summary["inputs"]["rejects"] == {"bad JSON": 1}
    assert summary["fingerprint"] == manifest.fingerprint


def test_the_table_and_the_json_tell_the_same(folders, capsys):
    dispatch(["inspect", str(folders / "shards"), "--json"])
    summary = json.loads(capsys.readouterr().out)
    dispatch(["inspect", str(folders / "shards")])
    table = capsys.readouterr().out
    row = summary["rows"][0]
    (line,) = [line for line in table.splitlines() if line.split()[:2] == ["train", "github"]]
    ratio = row["text_bytes"] / row["tokens"]
    assert line.split()[2:] == [
        f"{row['shards']:,}",
        f"{row['tokens']:,}",
        f"{row['documents']:,}",
        f"{row['text_bytes'] / 1e6:.2f}",
        f"{ratio:.2f}",
    ]
    assert "rejected: bad JSON 1" in table
    assert summary["fingerprint"] in table


def test_a_flan_folder_is_shown_too(folders, capsys):
    dispatch(["inspect", str(folders / "flan")])
    table = capsys.readouterr().out
    assert "rows" in table.splitlines()[0]
    assert "cut: 0" in table


def test_no_folder_is_a_readable_error(folders):
    with pytest.raises(UserError, match=r"no manifest\.json"):
        dispatch(["inspect", str(folders / "github")])
