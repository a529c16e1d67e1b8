import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.flan import FlanStore
from pipeline.data.shards import CorruptShardError
from pipeline.data.tokenizer import load
from pipeline.options import UserError
from tools import flan


@pytest.fixture(scope="module")
def rows():
    return [
        {
            "inputs": f"Question {i} " + "why? " * (i % 50),
            "targets": f"answer {i} " + "so " * (i % 7),
            "task_name": f"task_{i % 11}",
            "task_source": ["Flan2021", "CoT"][i % 2],
        }
        for i in range(300)
    ]


@pytest.fixture(scope="module")
def folder(rows, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flan")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:250]))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[250:]))
    flan.run(
        flan.Options(
            input=(f"{folder}/rows.jsonl",),
            validation_input=(f"{folder}/held.jsonl",),
            output=f"{folder}/out",
            tokenizer=str(model),
            max_input=256,
            max_target=64,
            block_tokens=1024,
            shard_bytes=50_000,
        )
    )
    return folder / "out"


def test_every_row_comes_back_with_its_task(folder, rows):
    tokenizer = load(folder / "tokenizer.model")
    for split, expected in (("train", rows[:250]), ("heldout", rows[250:])):
        store = FlanStore(folder, split)
        assert len(store) == len(expected)
        assert len(store.manifest.select(split)) > 1
        found = []
        for index in range(len(store)):
            inputs, targets, task = store.read(index)
            assert targets[-1] == tokenizer.eod
            found.append((tokenizer.decode(inputs), tokenizer.decode(targets[:-1]), task))
        told = [(row["inputs"], row["targets"], row["task_name"]) for row in expected]
        cut = [row for row in told if len(tokenizer.encode(row[0])) > 256]
        assert sorted(set(told) - set(cut)) == sorted(set(told) & set(found))
        assert len(set(found)) == len(found)


def test_any_tar_reader_finds_inputs_targets_offsets_and_names(folder):
    store = FlanStore(folder, "train")
    shard = store.manifest.select("train")[0]
    with tarfile.open(folder / shard.path) as tar:
        sample = {
            m.name.partition(".")[2]: np.load(io.BytesIO(tar.extractfile(m).read()))
            for m in list(tar)[:5]
        }
    assert set(sample) == {"inputs.npy", "targets.npy", "offsets.npy", "tasks.npy", "xxh3.npy"}
    begin, end = sample["offsets.npy"][:2]
    inputs, targets, task = store.read(0)
    assert np.array_equal(sample["inputs.npy"][begin[0] : end[0]], inputs)
    assert np.array_equal(sample["targets.npy"][begin[1] : end[1]], targets)
    assert sample["tasks.npy"][0].decode() == task


def test_the_evaluation_choice_is_fixed(folder):
    store = FlanStore(folder, "heldout")
    assert store.evaluation_choice(10) == FlanStore(folder, "heldout").evaluation_choice(10)
    assert len(set(store.evaluation_choice(10))) == 10
    assert store.evaluation_choice(1000) == list(range(50))


def test_what_is_not_there_is_refused(folder, shards):
    with pytest.raises(UserError, match="holds only heldout, train"):
        FlanStore(folder, "test")
    with pytest.raises(UserError, match="isoflop flan"):
        FlanStore(shards, "train")
    store = FlanStore(folder, "train")
    with pytest.raises(IndexError):
        store.read(len(store))


def test_a_flipped_byte_is_noticed(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    shard = FlanStore(folder, "train").manifest.select("train")[0]
    path = tmp_path / "copy" / shard.path
    content = bytearray(path.read_bytes())
    content[512 + 128 + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError):
        FlanStore(tmp_path / "copy", "train").read(0)


def test_shards_that_traded_places_are_refused(folder, tmp_path):
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    rows = FlanStore(folder, "train").manifest.select("train")
    first, second = next(
        (copy / a.path, copy / b.path)
        for a in rows
        for b in rows
        if a.bytes == b.bytes and Path(a.path).name < Path(b.path).name
    )
    first.rename(tmp_path / "held")
    second.rename(first)
    (tmp_path / "held").rename(second)
    store = FlanStore(copy, "train")
    with pytest.raises(CorruptShardError, match="is another shard's"):
        [store.read(index) for index in range(len(store))]
