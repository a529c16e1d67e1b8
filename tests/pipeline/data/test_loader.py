import io
import itertools
import shutil
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.loader import SequenceStore, TrainingOrder
from pipeline.data.manifest import read_manifest
from pipeline.data.shards import CorruptShardError
from pipeline.data.tokenizer import load
from pipeline.options import UserError
from tools import flan, tokenize_corpus

KEY = r"\d{6}-\d{3}"


def independent(shards, split, source):
    """All ids of a source in shard order, padding included, read by tarfile and numpy."""
    blocks = []
    for path in sorted((shards / split / source).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".tokens.npy"):
                    blocks.append(np.load(io.BytesIO(tar.extractfile(member).read())))
    return np.concatenate(blocks)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("seq_len", [1, 16, 64, 512])
def test_sequences_are_the_slices_of_the_stored_blocks(shards, split, seq_len):
    store = SequenceStore(shards, split, seq_len)
    tokenizer = load(shards / "tokenizer.model")
    for source in store.sources:
        expected = independent(shards, split, source)
        tokens = sum(s.tokens for s in store.manifest.select(split, source))
        assert len(expected) - tokens < 512
        assert (expected[tokens:] == tokenizer.pad).all()
        assert store.num_sequences[source] == -(-tokens // seq_len)
        seen = 0
        for index in range(store.num_sequences[source]):
            ids, valid = store.read(source, index)
            assert ids.shape == (seq_len,)
            assert np.array_equal(ids, expected[index * seq_len : (index + 1) * seq_len])
            seen += valid
        assert seen == tokens


def test_the_fixture_has_several_shards_and_a_padded_end(shards):
    manifest = read_manifest(shards)
    github = manifest.select("train", "github")
    assert len(github) > 3
    assert max(shard.samples for shard in github) > 1
    assert github[-1].tokens < github[-1].samples * 512


def test_no_such_sequence(shards):
    store = SequenceStore(shards, "train", 64)
    for index in (-1, store.num_sequences["github"]):
        with pytest.raises(IndexError):
            store.read("github", index)


@pytest.mark.parametrize(
    ("seq_len", "nearest"), [(100, "64 and 128"), (1024, "are 512"), (0, "are 1")]
)
def test_a_length_that_does_not_divide_the_block_names_the_nearest(shards, seq_len, nearest):
    with pytest.raises(UserError, match=f"seq_len={seq_len}: .*{nearest}"):
        SequenceStore(shards, "train", seq_len)


def test_an_unknown_split_names_those_there_are(shards):
    with pytest.raises(UserError, match=r"split='test'.*train, validation"):
        SequenceStore(shards, "test", 64)


def test_a_corrupt_block_is_never_returned(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    store = SequenceStore(copy, "train", 512)
    shard = store.manifest.select("train", "github")[0]
    content = bytearray((copy / shard.path).read_bytes())
    content[512 + 128 + 100] ^= 1
    (copy / shard.path).write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"shard-.*byte"):
        store.read("github", 0)
    store.read("github", 1)


@pytest.mark.parametrize("sources", [("github", "github"), ("book", "github"), ("c4", "book")])
def test_shards_that_traded_places_are_never_read(shards, tmp_path, sources):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    store = SequenceStore(copy, "train", 512)
    ours, theirs = (reversed(store.manifest.select("train", source)) for source in sources)
    # Last of all those that were made by one task, the joined tails.
    first, second = next(
        (copy / a.path, copy / b.path)
        for a, b in itertools.product(ours, list(theirs))
        if a != b and a.bytes == b.bytes
    )
    first.rename(tmp_path / "held")
    second.rename(first)
    (tmp_path / "held").rename(second)
    with pytest.raises(CorruptShardError, match=rf"shard .*shard-{KEY}\.tar: .* instead of '{KEY}"):
        TrainingOrder(store, 1).batch(0, store.total)


orders = {
    "seed": st.integers(0, 1000),
    "window": st.one_of(st.just("all"), st.integers(1, 9)),
    "seq_len": st.sampled_from([32, 128, 512]),
}


@settings(deadline=None, max_examples=10)
@given(**orders)
def test_an_epoch_holds_every_sample_once_whatever_the_weights(shards, seed, window, seq_len):
    store = SequenceStore(shards, "train", seq_len)
    order = TrainingOrder(store, seed, window, dict.fromkeys(store.sources, 1.0))
    longest = max(store.num_sequences.values()) * len(store.sources) + len(store.sources)
    source, epoch, index = order.locate(np.arange(longest))
    for s, name in enumerate(order.mixture.sources):
        first = index[(source == s) & (epoch == 0)]
        assert np.array_equal(np.sort(first), np.arange(store.num_sequences[name]))
        second = index[(source == s) & (epoch == 1)]
        assert len(set(second.tolist())) == len(second)


def test_natural_proportions_see_everything_once_in_each_pass(shards):
    store = SequenceStore(shards, "train", 32)
    order = TrainingOrder(store, 1)
    for begin in (0, store.total):
        numbers = order.batch(begin, store.total).sample_numbers
        assert np.array_equal(np.sort(numbers), np.arange(store.total))
    assert set(order.epochs(store.total).values()) == {1.0}


@settings(deadline=None, max_examples=25)
@given(
    **orders, start=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 7), min_size=1, max_size=4)
)
def test_batches_are_the_same_however_they_are_cut(shards, seed, window, seq_len, start, cuts):
    store = SequenceStore(shards, "train", seq_len)
    whole = TrainingOrder(store, seed, window).batch(start, sum(cuts))
    pieces, position = [], start
    for count in cuts:
        pieces.append(TrainingOrder(store, seed, window).batch(position, count))
        position += count
    joined = np.concatenate([piece.sample_numbers for piece in pieces])
    assert np.array_equal(joined, whole.sample_numbers)
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces]), whole.ids)
    assert np.array_equal(np.concatenate([piece.valid for piece in pieces]), whole.valid)


def test_every_source_has_an_order_of_its_own(model, tmp_path):
    for source in ("book", "github"):
        (tmp_path / source).mkdir()
        (tmp_path / source / "x.jsonl").write_text('{"text": "the same text"}\n' * 100)
    options = tokenize_corpus.Options(
        input=(str(tmp_path),), output=f"{tmp_path}/out", tokenizer=str(model), block_tokens=64
    )
    tokenize_corpus.run(options)
    store = SequenceStore(tmp_path / "out", "train", 8)
    order = TrainingOrder(store, 1)
    source, _, index = order.locate(np.arange(store.total))
    first, second = index[source == 0], index[source == 1]
    assert len(first) == len(second) > 50
    assert (first != second).mean() > 0.8


def test_a_sample_number_names_one_sequence(shards):
    store = SequenceStore(shards, "train", 64)
    order = TrainingOrder(store, 3)
    source, _, index = order.locate(np.arange(40))
    for position in range(40):
        number, ids, valid = order.sample(position)
        name = order.mixture.sources[source[position]]
        assert number == store.sample_number(name, int(index[position]))
        expected, expected_valid = store.read(name, int(index[position]))
        assert np.array_equal(ids, expected)
        assert valid == expected_valid
    numbers = {
        store.sample_number(s, i) for s in store.sources for i in range(store.num_sequences[s])
    }
    assert numbers == set(range(store.total))


def test_weights_are_kept_and_others_never_come(shards):
    store = SequenceStore(shards, "train", 32)
    order = TrainingOrder(store, 0, weights={"github": 3, "book": 1})
    source, _, _ = order.locate(np.arange(400))
    assert np.bincount(source).tolist() == [100, 300]
    for weights, told in [({"arxiv": 1}, "arxiv"), ({"github": 0}, "weights="), ({}, "weights=")]:
        with pytest.raises(UserError, match=told):
            TrainingOrder(store, 0, weights=weights)
    with pytest.raises(UserError, match="shuffle_window"):
        TrainingOrder(store, 0, 0)


@pytest.mark.parametrize("count", [1, 5, 20, 10**6])
def test_the_evaluation_choice_is_fixed_proportional_and_without_repeats(shards, count):
    store = SequenceStore(shards, "validation", 32)
    chosen = store.evaluation_choice(count)
    assert chosen == SequenceStore(shards, "validation", 32).evaluation_choice(count)
    assert len(chosen) == len(set(chosen)) == min(count, store.total)
    for source, available in store.num_sequences.items():
        taken = sum(name == source for name, _ in chosen)
        assert abs(taken - len(chosen) * available / store.total) < 1
    if count < 10**6:
        lengths = [store.read(*pair)[1] for pair in chosen]
        assert min(lengths) == 32


def test_flan_rows_are_no_token_store(shards, tmp_path, model):
    (tmp_path / "rows.jsonl").write_text('{"inputs": "a", "targets": "b", "task_name": "t"}\n')
    options = flan.Options(
        input=(f"{tmp_path}/rows.jsonl",), output=f"{tmp_path}/flan", tokenizer=str(model)
    )
    flan.run(options)
    with pytest.raises(UserError, match="holds flan rows"):
        SequenceStore(tmp_path / "flan", "train", 64)
