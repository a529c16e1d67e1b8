"""A small corpus with every kind of trouble, tokenised once for all tests of this folder."""

import gzip
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zstandard

from tools import tokenize_corpus, tokenizer


@dataclass
class Corpus:
    """Files, and the texts that should come out of them by source."""

    folder: Path
    glob: str
    texts: dict[str, list[str]] = field(default_factory=dict)


def make_text(generator: random.Random) -> str:
    words = ["def", "f(x):", "\n    ", "return", "  ", "naïve", "日本", "😀", "\t", "[EOD]", "<s>"]
    words += ["▁", "\r\n", "\0", "<extra_id_0>", "word", "another", "1234", "_", "end."]
    return "".join(generator.choice(words) for _ in range(int(2 ** generator.uniform(1, 9)))) or "x"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    generator = random.Random(5)
    folder = tmp_path_factory.mktemp("corpus")
    made = Corpus(folder, f"{folder}/**/*.jsonl*")

    def rows(source: str, count: int) -> list[bytes]:
        texts = [make_text(generator) for _ in range(count)]
        made.texts.setdefault(source, []).extend(texts)
        return [json.dumps({"text": text, "meta": {}}).encode() + b"\n" for text in texts]

    for name in ("common_crawl/2019-30", "github", "book", "other"):
        (folder / name).mkdir(parents=True)
    (folder / "github/filtered_a.jsonl").write_bytes(b"".join(rows("github", 80)))
    (folder / "github/filtered_b.jsonl").write_bytes(b"".join(rows("github", 50)))
    frames = [zstandard.compress(b"".join(rows("common_crawl", 30))) for _ in range(2)]
    (folder / "common_crawl/2019-30/en_head.jsonl.zst").write_bytes(b"".join(frames))
    (folder / "book/book.jsonl.gz").write_bytes(gzip.compress(b"".join(rows("book", 20))))
    slim = [
        json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n"
        for text in ["one document", "two documents"]
    ]
    made.texts["c4"] = ["one document", "two documents"]
    (folder / "other/part.jsonl").write_text("".join(slim))
    return made


@pytest.fixture(scope="session")
def model(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "spm.model"
    tokenizer.run(tokenizer.Options(input=(corpus.glob,), output=str(path), vocab_size=400))
    return path


@pytest.fixture(scope="session")
def shards(corpus, model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    tokenize_corpus.run(
        tokenize_corpus.Options(
            input=(corpus.glob,),
            output=str(folder),
            tokenizer=str(model),
            validation_fraction=0.2,
            block_tokens=512,
            task_bytes=8000,
            shard_bytes=8000,
        )
    )
    return folder
