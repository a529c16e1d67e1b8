import json
import random

import pytest

from pipeline.data.tokenizer import load
from pipeline.options import UserError
from pipeline.options import load as load_options
from tools import tokenizer
from tools.corpus import find_inputs


@pytest.fixture
def corpus(tmp_path):
    generator = random.Random(0)
    for name in ("a", "b"):
        rows = [
            json.dumps({"text": " ".join(generator.choices(["if", "x", "==", "ten:\n   "], k=200))})
            for _ in range(200)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


def options(corpus, **changes):
    given = {"input": (f"{corpus}/*.jsonl",), "output": f"{corpus}/spm.model", "vocab_size": 380}
    return tokenizer.Options(**{**given, **changes})


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_same_command_gives_the_same_bytes(corpus, model_type):
    models = []
    for name in ("1", "2"):
        given = options(
            corpus, output=f"{corpus}/{name}.model", model_type=model_type, vocab_size=375
        )
        tokenizer.run(given)
        models.append((corpus / f"{name}.model").read_bytes())
    assert models[0] == models[1]
    trained = load(corpus / "1.model")
    text = "if  x ==\n\tten é"
    assert trained.decode(trained.encode(text)) == text
    assert trained.vocab_size == 375


def test_a_finished_model_is_left_alone_and_another_refused(corpus, capsys):
    tokenizer.run(options(corpus))
    before = (corpus / "spm.model").stat()
    tokenizer.run(options(corpus))
    assert (corpus / "spm.model").stat().st_mtime_ns == before.st_mtime_ns
    assert capsys.readouterr().out.splitlines()[-1].endswith("is complete")
    with pytest.raises(UserError, match="vocab_size 380"):
        tokenizer.run(options(corpus, vocab_size=390))
    (corpus / "a.jsonl").write_text('{"text": "changed"}')
    with pytest.raises(UserError, match="other inputs"):
        tokenizer.run(options(corpus))
    (corpus / "spm.model").write_bytes(b"something else")
    with pytest.raises(UserError, match="not as this command made it"):
        tokenizer.run(options(corpus))


def test_the_sample_keeps_its_budget_and_spreads_over_the_files(corpus):
    files = find_inputs([f"{corpus}/*.jsonl"])
    size = sum(file.size for file in files)
    for share in (0.02, 0.2, 0.7):
        texts = list(tokenizer.sample_texts(files, size * share, 0))
        longest = max(len(text) for text in texts)
        assert size * share * 0.4 < sum(map(len, texts)) < size * share + 4 * longest
    assert list(tokenizer.sample_texts(files, 9000, 0)) != list(
        tokenizer.sample_texts(files, 9000, 1)
    )
    assert len(list(tokenizer.sample_texts(files, 1e9, 0))) == 400


def test_sentences_lose_nothing_and_stay_short():
    text = "a\n" * 3000 + "é" * 9000 + "\r\n\x85 \n\n    end"
    pieces = list(tokenizer.sentences([text]))
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= 4000


def test_what_cannot_be_trained_says_so(corpus, tmp_path, capfd):
    with pytest.raises(UserError, match="vocab_size=9000"):
        tokenizer.run(options(corpus, vocab_size=9000))
    with pytest.raises(UserError, match="no row has text in its field 'body'"):
        tokenizer.run(options(corpus, text_field="body"))
    with pytest.raises(UserError, match=r"vocab_size='300'.*at least 365"):
        load_options(tokenizer.Options, {"input": "x", "output": "y", "vocab_size": "300"})
    with pytest.raises(UserError, match="is a folder"):
        load_options(
            tokenizer.Options, {"input": "x", "output": str(tmp_path), "vocab_size": "400"}
        )
