import hashlib
import json
from pathlib import Path

import pytest

from pipeline.data.flan import FlanStore
from pipeline.data.manifest import read_manifest
from pipeline.data.tokenizer import load
from pipeline.options import UserError
from pipeline.options import load as load_options
from tests.power_cut import PowerCut
from tools import flan, tokenizer


def row(i, **changes):
    given = {"inputs": f"question {i}", "targets": f"answer {i}", "task_name": "t"}
    return json.dumps({**given, "task_source": "CoT", **changes}) + "\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [json.dumps({"text": f"question {i} answer {i}"}) for i in range(300)]
    (folder / "x.jsonl").write_text("\n".join(texts))
    tokenizer.run(
        tokenizer.Options(input=(str(folder),), output=f"{folder}/spm.model", vocab_size=390)
    )
    return folder / "spm.model"


def run(folder, model, **changes):
    given = {"input": (f"{folder}/*.jsonl",), "output": f"{folder}/out", "tokenizer": str(model)}
    options = flan.Options(**{**given, "block_tokens": 2048, **changes})
    flan.run(options)
    return Path(options.output)


def test_long_rows_are_cut_and_bad_rows_counted(tmp_path, model):
    long = "word " * 500
    bad = [
        "{bad\n",
        row(1, inputs=""),
        row(2, targets=" \n"),
        row(3, targets=None),
        row(4, task_name="n" * 97),
    ]
    good = [row(5, inputs=long), row(6, targets=long), row(7, targets="fine \ud800")]
    (tmp_path / "a.jsonl").write_text("".join(bad + good))
    out = run(tmp_path, model, max_input=128, max_target=16, validation_fraction=0.0)
    (item,) = read_manifest(out).inputs
    assert item.rejects == {
        "bad JSON": 1,
        "empty inputs": 1,
        "empty targets": 1,
        "no targets": 1,
        "task_name over 96 bytes": 1,
    }
    assert (item.rows, item.documents, item.truncated, item.replaced_surrogates) == (8, 3, 2, 1)
    listed = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert (listed[0]["offset"], listed[0]["reason"]) == (0, "bad JSON")
    assert len(listed) == 5
    store, trained = FlanStore(out, "train"), load(model)
    read = [store.read(i) for i in range(3)]
    assert [(len(inputs), len(targets)) for inputs, targets, _ in read[:2]] == [
        (128, len(trained.encode("answer 5")) + 1),
        (len(trained.encode("question 6")), 16),
    ]
    assert all(targets[-1] == trained.eod for _, targets, _ in read)
    assert trained.decode(read[2][1]) == "fine \ufffd"
    shard = store.manifest.select("train")[0]
    kept = trained.decode(read[1][1])
    assert shard.text_bytes == len("answer 5") + len(kept) + len("fine \ufffd".encode())


def test_without_held_out_rows_a_share_is_held_out_by_hash(tmp_path, model):
    (tmp_path / "a.jsonl").write_text("".join(row(i % 150) for i in range(300)))
    out = run(tmp_path, model, validation_fraction=0.2)
    sides = {}
    for split in ("train", "heldout"):
        store = FlanStore(out, split)
        sides[split] = [tuple(store.read(i)[0].tolist()) for i in range(len(store))]
    assert len(sides["train"]) + len(sides["heldout"]) == 300
    assert 30 < len(sides["heldout"]) < 90
    assert not set(sides["train"]) & set(sides["heldout"])


def test_open_orcas_spelling_and_sources(tmp_path, model):
    rows = [
        {"inputs": "a", "targets": "b", "_task_source": "NIv2/x", "_task_name": "niv2_task"},
        {"inputs": "c", "targets": "d"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = run(tmp_path, model, validation_fraction=0.0)
    assert read_manifest(out).sources("train") == ("flan", "niv2_x")
    store = FlanStore(out, "train")
    assert [store.read(i)[2] for i in range(2)] == ["unnamed", "niv2_task"]


def test_the_same_rows_give_the_same_bytes_and_are_written_once(tmp_path, model, capsys):
    (tmp_path / "a.jsonl").write_text("".join(row(i) for i in range(50)))
    digests = []
    for name in ("one", "two"):
        out = run(tmp_path, model, output=f"{tmp_path}/{name}", input=(f"{tmp_path}/a.jsonl",))
        files = sorted(p for p in (tmp_path / name).rglob("*") if p.is_file())
        digests.append([(p.relative_to(tmp_path / name), p.read_bytes()) for p in files])
    del out
    assert digests[0] == digests[1]
    before = (tmp_path / "one/manifest.json").stat().st_mtime_ns
    given = {"output": f"{tmp_path}/one", "input": (f"{tmp_path}/a.jsonl",)}
    run(tmp_path, model, **given)
    assert capsys.readouterr().out.splitlines()[-1].endswith("is complete")
    assert (tmp_path / "one/manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="max_input"):
        run(tmp_path, model, **given, max_input=5)
    (tmp_path / "a.jsonl").write_text(row(1))
    with pytest.raises(UserError, match=r"inputs: .*made otherwise"):
        run(tmp_path, model, **given)
    assert (
        hashlib.sha256(model.read_bytes()).hexdigest()
        == read_manifest(tmp_path / "one").tokenizer.sha256
    )


def test_rows_of_another_shape_are_refused_and_leave_nothing(tmp_path, model):
    (tmp_path / "a.jsonl").write_text('{"text": "a document"}\n')
    with pytest.raises(UserError, match="no row has inputs and targets"):
        run(tmp_path, model)
    assert not (tmp_path / "out").exists()


def test_a_block_must_hold_the_longest_row():
    given = {"input": "x", "output": "y", "tokenizer": "z"}
    for flags in ({"block_tokens": "1024"}, {"block_tokens": "2000", "max_input": "1000"}):
        with pytest.raises(UserError, match="block_tokens="):
            load_options(flan.Options, {**given, **flags})


def test_a_power_cut_leaves_all_of_the_folder_or_none(tmp_path, model, monkeypatch):
    (tmp_path / "a.jsonl").write_text(row(1) + "{bad\n" + row(2))
    placed = []

    def check(source, target):
        assert disk.has_bytes(source), target
        placed.append(target.name)

    with monkeypatch.context() as patch:
        disk = PowerCut(tmp_path, patch, check)
        out = run(tmp_path, model, output=f"{tmp_path}/deep/out")
        assert all(disk.leaves(path) for path in out.rglob("*") if path.is_file())
    assert placed[-1] == "out"


def test_rows_that_change_while_they_are_read_are_refused(tmp_path, model, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text(row(1) + row(2))
    read = flan._Run._read

    def read_then_append(self, file, split):
        counts = read(self, file, split)
        path.write_text(row(1) + row(2) + row(3))
        return counts

    monkeypatch.setattr(flan._Run, "_read", read_then_append)
    with pytest.raises(UserError, match=r"a\.jsonl': changed while it was read"):
        run(tmp_path, model)
    assert not (tmp_path / "out").exists()


def test_shards_of_two_sources_that_traded_places_are_never_read(tmp_path, model):
    rows = [row(i, task_source=source) for i in range(40) for source in ("CoT", "NIv2")]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    out = run(tmp_path, model)
    first, second = (out / shard.path for shard in read_manifest(out).select("train"))
    assert first.stat().st_size == second.stat().st_size
    FlanStore(out, "train").read(0)
    first.rename(tmp_path / "held")
    second.rename(first)
    (tmp_path / "held").rename(second)
    with pytest.raises(UserError, match="the file is another shard's"):
        FlanStore(out, "train").read(0)


def test_a_file_that_is_held_out_is_not_trained_on(tmp_path, model, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(row(i) for i in range(9)))
    (tmp_path / "again.jsonl").hardlink_to(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"validation_input='.*a.*jsonl': is among the training"):
        run(tmp_path, model, validation_input=(f"{tmp_path}/again.jsonl",))
    assert "1 more name of files that are read once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
