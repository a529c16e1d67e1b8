"""What is left out by choice: duplicates, near duplicates, contaminated texts."""

import json
import random
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.manifest import read_manifest
from pipeline.options import UserError
from tools import corpus_dedup, corpus_minhash, tokenize_corpus, tokenizer
from tools.corpus_decontaminate import Contamination, ngrams, ngrams_in_pieces, strings
from tools.corpus_dedup import DUPLICATE, HASH, Drops, find_duplicates
from tools.corpus_plan import Settings, Task

# Letters alone: MinHash takes all digits for one.
WORDS = ["".join(letters) for letters in product("aeiou", "bdfghklmnprst", "aeiou")]


def prose(generator, count):
    return " ".join(generator.choices(WORDS, k=count))


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write(folder / "a.jsonl", [prose(random.Random(0), 3000)])
    path = folder / "spm.model"
    tokenizer.run(tokenizer.Options(input=(str(folder),), output=str(path), vocab_size=380))
    return path


def run(folder, model, output, **changes):
    given = {"input": (str(folder),), "output": str(output), "tokenizer": str(model)}
    given |= {"validation_fraction": 0.2, "block_tokens": 256, "task_bytes": 1500}
    tokenize_corpus.run(tokenize_corpus.Options(**{**given, **changes}))
    return read_manifest(output)


def listed(output):
    rows = [json.loads(row) for row in (output / "rejects.jsonl").read_text().splitlines()]
    return [(row["file"], row["offset"], row["reason"]) for row in rows]


def first_copies_rejected(folder, reason="duplicate"):
    """What must be listed: every row whose text was seen in an earlier one, files in name order."""
    seen, expected = set(), []
    for path in sorted(folder.rglob("*.jsonl")):
        offset = 0
        for row in path.read_bytes().splitlines(keepends=True):
            text = json.loads(row)["text"]
            if text in seen:
                expected.append((path.relative_to(folder).as_posix(), offset, reason))
            seen.add(text)
            offset += len(row)
    return expected


@pytest.mark.parametrize("workers", [1, 2])
def test_of_equal_texts_the_first_in_input_order_stays(model, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(corpus_dedup, "RANGE_DOCUMENTS", 7)
    generator = random.Random(1)
    texts = [prose(generator, 5) for _ in range(40)]
    for name in ("book/a", "github/b", "github/c"):
        write(tmp_path / "in" / f"{name}.jsonl", generator.choices(texts, k=40))
    manifest = run(tmp_path / "in", model, tmp_path / "out", dedup="exact", workers=workers)
    expected = first_copies_rejected(tmp_path / "in")
    assert listed(tmp_path / "out") == expected
    assert len(expected) > 60
    assert sum(item.documents for item in manifest.inputs) == 120 - len(expected)
    assert manifest.settings["dedup"] == "exact"
    rejects = sum((Counter(item.rejects) for item in manifest.inputs), Counter())
    assert rejects == {"duplicate": len(expected)}
    assert {path.suffix for path in (tmp_path / "out/tasks").iterdir()} == {".json"}


@settings(deadline=None, max_examples=60)
@given(
    tasks=st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=8), min_size=1, max_size=5),
    size=st.integers(1, 9),
)
def test_duplicates_are_those_a_set_finds(tmp_path_factory, tasks, size):
    output = tmp_path_factory.mktemp("dedup")
    given = Settings(256, 1, 1, 0.0, "text", "x", 1 << 20, 0, None, "exact", "")
    described = []
    for number, texts in enumerate(tasks):
        write(output / "in" / f"{number}.jsonl", texts)
        path = str(output / "in" / f"{number}.jsonl")
        described.append(Task(number, f"{number}", path, 0, None, "x"))
        HASH.work(described[-1], given, output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_dedup, "RANGE_DOCUMENTS", size)
        find_duplicates(output, described)
    drops = Drops(corpus_dedup.exact_path(output))
    seen = set()
    for number, texts in enumerate(tasks):
        expected = []
        for text in texts:
            expected.append(DUPLICATE if text in seen else 0)
            seen.add(text)
        assert drops.of(number).tolist() == expected


@pytest.mark.parametrize("name", ["000000.hashes", "000000.hashed", "exact.drops", "exact.index"])
def test_what_was_damaged_between_passes_is_told_or_made_again(model, tmp_path, monkeypatch, name):
    from tools import corpus_stage

    write(tmp_path / "in/a.jsonl", ["one", "two", "one"] * 3)
    tokenise = corpus_stage.TOKENISE
    with monkeypatch.context() as patch:
        broken = corpus_stage.Stage("x", lambda *a, **k: 1 / 0, tokenise.mark, tokenise.done)
        patch.setattr(corpus_stage, "TOKENISE", broken)
        with pytest.raises(UserError, match="division"):
            run(tmp_path / "in", model, tmp_path / "out", dedup="exact")
    path = tmp_path / "out/tasks" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if name.startswith("exact"):
        with pytest.raises(UserError, match=r"remove .*exact\.drops"):
            run(tmp_path / "in", model, tmp_path / "out", dedup="exact")
        (tmp_path / "out/tasks/exact.drops").unlink()
    run(tmp_path / "in", model, tmp_path / "out", dedup="exact")
    assert [offset for _, offset, _ in listed(tmp_path / "out")] == [
        16 * place for place in range(2, 9)
    ]


@pytest.mark.parametrize("stage", [corpus_minhash.SIGN, corpus_minhash.PAIR])
def test_a_minhash_file_that_changed_makes_its_task_run_again(tmp_path, stage):
    """Whether a task is done, without datatrove's work: what it left is told by its mark."""
    files = {
        corpus_minhash.SIGN: corpus_minhash.signature_files,
        corpus_minhash.PAIR: corpus_minhash.pair_files,
    }[stage](tmp_path, 3)
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"of " + file.name.encode())
    assert stage.done(tmp_path, 3) is None
    corpus_minhash.mark_done(stage.mark(tmp_path, 3), files)
    assert stage.done(tmp_path, 3) == (0, 0)
    last = files[-1].read_bytes()
    files[-1].write_bytes(last[:-1] + b"?")
    assert stage.done(tmp_path, 3) is None
    files[-1].write_bytes(last)
    assert stage.done(tmp_path, 3) == (0, 0)
    files[-1].unlink()
    assert stage.done(tmp_path, 3) is None


def naive_ngrams(text):
    words = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["a", "b", "B", ", ", "\n", "é", "_1"]), max_size=60),
    st.lists(st.sampled_from(["a", "b", "c ", "."]), max_size=60),
)
def test_ngrams_are_equal_when_words_are(left, right):
    one, other = " ".join(left), " ".join(right)
    assert len(set(ngrams(one).tolist())) == len(naive_ngrams(one))
    shared = bool(set(ngrams(one).tolist()) & set(ngrams(other).tolist()))
    assert shared == bool(naive_ngrams(one) & naive_ngrams(other))


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        st.text(st.sampled_from("aAΣσς İ'.:^,。\n日😀é_\u0301\u00ad")),
        st.text(st.sampled_from("aΣ.' ")),
        st.text(st.sampled_from("aaaaaaaaaaaaé ")),
        st.text(),
    ),
    st.integers(1, 30),
    st.integers(1, 4),
)
def test_ngrams_of_pieces_are_those_of_the_text(text, piece_bytes, words):
    data = text.encode("utf-8", "ignore")
    found = list(ngrams_in_pieces(data, words, piece_bytes))
    assert np.concatenate(found).tolist() == ngrams(data.decode(), words).tolist()


def test_an_ngram_across_two_pieces_is_found():
    long = "word, " * 200_000
    question = prose(random.Random(3), 13)
    held = Contamination(np.sort(ngrams(question)))
    assert not held.holds(long.encode())
    for before in range((1 << 20) - 100, (1 << 20) + 10, 10):
        assert held.holds(f"{'. ' * (before // 2)}{question} {long}".encode())


def test_a_set_of_ngrams_holds_itself_alone():
    generator = random.Random(3)
    texts = [prose(generator, 40) for _ in range(50)]
    held = Contamination(np.unique(np.concatenate([ngrams(text) for text in texts[:25]])))
    assert [held.holds(text.encode()) for text in texts] == [True] * 25 + [False] * 25
    assert not held.holds(b"too short")


def test_strings_are_found_wherever_they_stand():
    row = {"a": "x", "b": {"c": ["y", {"d": "z"}]}, "n": 3, "none": None}
    assert list(strings(row)) == ["x", "y", "z"]


def test_contaminated_texts_are_left_out_and_the_rest_stays(model, tmp_path, capsys):
    generator = random.Random(4)
    question = prose(generator, 20)
    texts = [prose(generator, 60) for _ in range(20)]
    texts[3] = f"{texts[3]} {question.upper().replace(' ', ', ')}"
    texts[9] = " ".join([texts[9], *question.split()[4:16]])  # twelve words: one too few
    write(tmp_path / "in/a.jsonl", texts)
    rows = [{"question": {"stem": question}, "choices": ["a", "b"]}]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"decontaminate": (f"{tmp_path}/eval.jsonl",)}
    manifest = run(tmp_path / "in", model, tmp_path / "out", **given)
    assert "8 n-grams of 3 evaluation texts (2 too short" in capsys.readouterr().err
    offset = sum(len(json.dumps({"text": text})) + 1 for text in texts[:3])
    assert listed(tmp_path / "out") == [("a.jsonl", offset, "contaminated")]
    assert len(manifest.settings["decontaminate"]) == 64
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": prose(generator, 20)}) + "\n")
    with pytest.raises(UserError, match=r"decontaminate=.*was begun with"):
        run(tmp_path / "in", model, tmp_path / "out", **given)
    (tmp_path / "eval.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="no text of 13 words"):
        run(tmp_path / "in", model, tmp_path / "out", **given)


def test_ngrams_of_a_repeated_word_are_not_all_alike():
    hashes = ngrams(" ".join(f"w{i}" for i in range(1000)))
    assert len(set(hashes.tolist())) == 988
    assert all(a != b for a, b in pairwise(hashes.tolist()))
