"""What comes out is what sentencepiece gives, whatever makes it."""

import io
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data import encoder as module
from pipeline.data.encoder import Encoder, EncodersDifferError, UncuttableError, encoder_of
from pipeline.data.tokenizer import load

LITERALS = ["[PAD]", "[EOD]", "<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_99>", "[MASK", "▁"]
texts = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from([*LITERALS, "def f():\n    ", "  ", "return  1", "word ", "12345", "\t\t"]),
    ),
    max_size=30,
).map("".join)


@pytest.fixture(scope="module")
def encoder(model):
    made = Encoder(load(model))
    assert made.engine.name == "gigatoken", made.engine.reason
    return made


def foreign(tmp_path, **options):
    model = io.BytesIO()
    given = {"byte_fallback": True, "model_type": "bpe", "normalization_rule_name": "identity"}
    given |= {"remove_extra_whitespaces": False, "vocab_size": 330, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words of text ﬁrst", "and some more of it, <s> too"] * 20),
        model_writer=model,
        minloglevel=2,
        **(given | options),
    )
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    return Encoder(load(tmp_path / "foreign.model"))


def ids(encoder, text, **options):
    return np.concatenate(list(encoder.encode(text.encode(), **options))).tolist()


@settings(deadline=None, max_examples=300)
@given(text=texts)
@example("a [EOD] b")
@example("<extra_id_0>")
@example("▁ is not a space <unk>")
def test_ids_are_sentencepieces_own(encoder, text):
    assert ids(encoder, text) == encoder.tokenizer.encode(text).tolist()


@settings(deadline=None, max_examples=200)
@given(text=texts)
@example("<s>a</s> <unk>")
def test_so_they_are_for_a_foreign_model(tmp_path_factory, text):
    made = _foreign(tmp_path_factory)
    assert ids(made, text) == made.tokenizer.encode(text).tolist()


_made = {}


def _foreign(factory):
    if not _made:
        _made[0] = foreign(factory.mktemp("foreign"), user_defined_symbols=["<mine>", "of it"])
    assert _made[0].engine.name == "gigatoken", _made[0].engine.reason
    return _made[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "BPE"),
        ({"normalization_rule_name": "nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "normalises"),
        ({"byte_fallback": False}, "byte_fallback"),
    ],
)
def test_what_gigatoken_cannot_do_goes_through_sentencepiece(tmp_path, options, reason):
    made = foreign(tmp_path, **options)
    assert made.engine.name == "sentencepiece"
    assert reason in made.engine.reason
    text = "  a ﬁrst   word <s> "
    assert ids(made, text) == made.tokenizer.encode(text).tolist()


def test_without_gigatoken_all_goes_through_sentencepiece(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    made = Encoder(load(model))
    assert made.engine.name == "sentencepiece"
    assert "pip install gigatoken" in made.engine.reason
    assert ids(made, "a  b") == made.tokenizer.encode("a  b").tolist()


def test_an_engine_that_differs_anywhere_in_the_probe_is_not_used(model, monkeypatch):
    encode = Encoder._encode_fast

    def wrong(self, data):
        found = encode(self, data)
        return found[::-1] if b"\xf4\x8f\xbf\xbf" in data and len(found) > 1 else found

    monkeypatch.setattr(Encoder, "_encode_fast", wrong)
    made = Encoder(load(model))
    assert made.engine.name == "sentencepiece"
    assert "otherwise" in made.engine.reason


def test_a_checked_text_that_differs_is_told(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "_encode_fast", lambda data: np.array([5, 5, 5]))
    assert ids(encoder, "words") == [5, 5, 5]
    with pytest.raises(EncodersDifferError, match="words"):
        ids(encoder, "words", check=True)


# What a cache holds beyond the cap, in a process of its own: elsewhere it fills what others freed.
GROWTH = """
import random, sys
import psutil
import pipeline.data.encoder as module
from pipeline.data.tokenizer import load

module.CACHE_BYTES = int(sys.argv[2])
module._CHECK_EVERY_BYTES = 1 << 16
made = module.Encoder(load(sys.argv[1]))
assert made.engine.name == "gigatoken", made.engine
generator = random.Random(0)
held = psutil.Process().memory_info().rss
letters = bytes(b"abcdefghijklmnopqrstuvwxyz  "[byte % 28] for byte in range(256))
for number in range(500):
    text = generator.randbytes(20_000).translate(letters)
    assert list(made.encode(text, check=number % 20 == 0))
print(psutil.Process().memory_info().rss - held)
"""


def test_the_cache_is_bounded(model):
    def growth(cap: int) -> int:
        words = (sys.executable, "-c", GROWTH, str(model), str(cap))
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        return int(done.stdout)

    assert growth(8 << 20) < 40 << 20 < 64 << 20 < growth(1 << 40)


def test_long_texts_are_cut_and_endless_ones_refused(encoder, monkeypatch):
    monkeypatch.setattr(module, "PART_CHARACTERS", 500)
    monkeypatch.setattr(module, "UNCUT_CHARACTERS", 2000)
    generator = random.Random(1)
    text = " ".join(generator.choices(["word", "another", "naïve", *LITERALS], k=3000))
    parts = list(encoder.encode(text.encode(), check=True))
    assert len(parts) > 10
    assert np.concatenate(parts).tolist() == encoder.tokenizer.encode(text).tolist()
    joined = next(p for p in encoder.tokenizer.describe().pieces if p == p[0] * len(p) and p[1:])
    with pytest.raises(UncuttableError, match="9000 characters"):
        encoder.encode(joined[0].replace("▁", " ").encode() * 9000)


def test_one_encoder_serves_a_process(model):
    assert encoder_of(load(model)) is encoder_of(load(model))


def test_a_model_that_gigatokens_parser_stumbles_over_goes_through_sentencepiece(
    model, monkeypatch
):
    import gigatoken

    def assert_something(model):
        raise AssertionError

    monkeypatch.setattr(gigatoken.Tokenizer, "from_sentencepiece", assert_something)
    made = Encoder(load(model))
    assert (made.engine.name, made.engine.reason) == ("sentencepiece", "gigatoken: AssertionError")
