import io

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.data.tokenizer import load
from pipeline.options import UserError

# Every character but lone surrogates, which no UTF-8 can hold.
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
code = st.lists(
    st.sampled_from(["def f():", "\n", "    ", "  ", "\t", "return  1", "▁", "[EOD]", "<unk>"])
).map("".join)


@settings(deadline=None, max_examples=200)
@given(text=st.one_of(unicode_text, code))
@example("def f():\n    return  1")
@example("  leading and trailing  \n\n")
@example("▁ is not a space")
@example("\0\ufffd\u2585\r\n\x85")
def test_decoding_gives_the_text_back(model, text):
    tokenizer = load(model)
    assert tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(st.lists(st.one_of(unicode_text, code), max_size=5))
def test_a_batch_is_each_text_alone(model, texts):
    tokenizer = load(model)
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]


@settings(deadline=None)
@given(st.one_of(unicode_text, code))
def test_byte_lengths_add_up_to_the_text(model, text):
    tokenizer = load(model)
    assert tokenizer.byte_lengths()[tokenizer.encode(text)].sum() == len(text.encode())


def test_special_ids_are_distinct_stand_for_nothing_and_never_come_from_text(model):
    tokenizer = load(model)
    special = [*tokenizer.special_ids.values(), *tokenizer.extra_ids]
    assert len(set(special)) == 104
    assert list(tokenizer.special_ids) == ["pad", "bos", "eod", "mask"]
    assert not tokenizer.byte_lengths()[special].any()
    assert tokenizer.decode(special) == ""
    literal = "[PAD] [BOS] [EOD] [MASK] <extra_id_0> <extra_id_99> <unk>"
    assert not set(tokenizer.encode(literal).tolist()) & set(special)


def foreign(tmp_path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words of text", "and some more of it"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    return tmp_path / "foreign.model"


def test_a_foreign_model_lends_its_end_and_unknown_ids(tmp_path):
    tokenizer = load(foreign(tmp_path))
    assert (tokenizer.eod, tokenizer.pad, tokenizer.bos) == (2, 0, 1)
    assert tokenizer.mask is None
    assert not tokenizer.lossless
    assert tokenizer.extra_ids == ()
    assert tokenizer.decode(tokenizer.encode("a few words")) == "a few words"


def test_a_foreign_model_without_an_end_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"\[EOD\]"):
        load(foreign(tmp_path, eos_id=-1))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "absent.model")
    (tmp_path / "garbage.model").write_bytes(b"no model at all")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load(tmp_path / "garbage.model")
    (tmp_path / "empty.model").touch()
    with pytest.raises(UserError, match="holds no pieces"):
        load(tmp_path / "empty.model")


def test_a_model_with_a_damaged_piece_is_refused(model, tmp_path):
    tokenizer = load(model)
    piece = next(piece for piece in tokenizer.describe().pieces if len(piece) > 3).encode()
    damaged = b"\xff" + piece[1:]
    (tmp_path / "damaged.model").write_bytes(tokenizer.model.replace(piece, damaged))
    with pytest.raises(UserError, match="a piece is no UTF-8"):
        load(tmp_path / "damaged.model")
