"""The corpus as others see it: RedPajama's shapes, its defects, no repeats, no leaks, no luck."""

import ast
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from pipeline.options import UserError
from tools import sample_corpus
from tools.corpus import find_inputs, source_of_path
from tools.corpus_rows import Document, Reject, read_documents
from tools.sample_corpus.gather import Installation, gather
from tools.sample_corpus.instructions import TASKS, units_of
from tools.sample_corpus.redpajama import write_corpus

MEGABYTES = 1.5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("sample") / "corpus"
    sample_corpus.run(sample_corpus.Options(out=str(out), megabytes=MEGABYTES))
    return out


def rows(path):
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return [json.loads(line) for line in data.splitlines()]


def files(corpus, source):
    return sorted(p for p in (corpus / "redpajama" / source).rglob("*.jsonl*") if p.is_file())


def test_it_lies_as_redpajama_does(corpus):
    sources = {path.name for path in (corpus / "redpajama").iterdir()}
    assert sources == {"common_crawl", "github", "wikipedia", "stackexchange", "book"}
    for source in sources:
        assert files(corpus, source)
        assert {source_of_path(path) for path in files(corpus, source)} == {source}
        for line in (corpus / "redpajama" / source / "SHA256SUMS").read_text().splitlines():
            digest, name = line.split("  ")
            data = (corpus / "redpajama" / source / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest
    dumps = {path.parent.name for path in files(corpus, "common_crawl")}
    assert dumps == {"2019-30", "2020-05", "2021-04", "2022-05", "2023-06"}
    assert all(path.name.endswith(".jsonl.zst") for path in files(corpus, "common_crawl"))
    assert len(files(corpus, "github")) == 4
    assert all(
        re.fullmatch(r"filtered_\w+\.sampled\.jsonl", p.name) for p in files(corpus, "github")
    )
    for source, name in [("wikipedia", "wiki"), ("book", "book"), ("stackexchange",) * 2]:
        assert [path.name for path in files(corpus, source)] == [f"{name}.jsonl"]


def test_rows_have_redpajamas_keys(corpus):
    keys = {
        "github": {"content_hash", "timestamp", "source", "line_count", "max_line_length"}
        | {"avg_line_length", "alnum_prop", "repo_name", "path", "license", "size", "ref"},
        "wikipedia": {"title", "url", "language", "timestamp"},
        "stackexchange": {"language", "url", "timestamp", "source", "question_score"},
        "book": set(),
    }
    for source, meta in keys.items():
        for path in files(corpus, source):
            for row in rows(path):
                assert set(row) == {"text", "meta"}
                assert meta <= set(row["meta"])
    for path in files(corpus, "common_crawl"):
        for row in rows(path):
            assert set(row) == {"text", "pred_label", "pred_label_prob", "wiki_prob", "source"}


def test_it_has_the_defects(corpus):
    text = {s: b"".join(p.read_bytes() for p in files(corpus, s)) for s in ("github", "book")}
    assert text["github"].isascii()
    assert rb"\u" in text["github"]
    assert b"symlink_target" in text["github"]
    assert sum(not row["text"] for row in rows(files(corpus, "book")[0])) == 2
    assert sum(not row["text"] for path in files(corpus, "github") for row in rows(path)) == 2
    found = [d for p in files(corpus, "common_crawl") for d in read_documents(p)]
    # As many as there are texts with a surrogate pair to cut in, two at most.
    assert sum(d.replaced_surrogates for d in found if isinstance(d, Document)) in (1, 2)
    frames = [
        path.read_bytes().count(b"\x28\xb5\x2f\xfd") for path in files(corpus, "common_crawl")
    ]
    assert min(frames) >= 2


def test_text_is_as_much_as_asked_for_and_never_twice(corpus):
    marker = json.loads((corpus / "corpus.json").read_text())
    texts = []
    for source, told in marker["sources"].items():
        found = [d for path in files(corpus, source) for d in read_documents(path)]
        used = [d.text for d in found if isinstance(d, Document)]
        assert len(found) == told["rows"]
        assert {d.reason for d in found if isinstance(d, Reject)} <= {"empty"}
        assert sum(len(t.encode()) for t in used) == pytest.approx(told["text_bytes"], abs=64)
        texts += used
    assert len(texts) == len(set(texts))
    size = sum(len(text.encode()) for text in texts)
    # What a cut document lost is not made up for.
    assert MEGABYTES * 0.98e6 <= size < MEGABYTES * 1e6 + 1e6


def test_rows_tell_nothing_of_this_machine(corpus):
    secret = re.compile(re.escape(str(Path(sys.prefix))) + "|isoflop")
    for path in find_inputs([str(corpus)]):
        for row in rows(path.path):
            described = {k: v for k, v in row.items() if k != "text"}
            assert not secret.search(json.dumps(described))
    assert sys.prefix not in (corpus / "corpus.json").read_text()


@pytest.mark.distributed
def test_another_process_makes_the_same_bytes(corpus, tmp_path):
    code = "from tools.cli import main; main()"
    flags = ["sample-corpus", str(tmp_path / "again"), "--megabytes", str(MEGABYTES)]
    subprocess.run(
        [sys.executable, "-c", code, *flags],
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    made = [
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for out in (corpus, tmp_path / "again")
    ]
    assert made[0] == made[1]


def test_a_finished_corpus_is_left_alone_and_another_refused(corpus, tmp_path, capsys):
    sample_corpus.run(sample_corpus.Options(out=str(corpus), megabytes=MEGABYTES))
    assert capsys.readouterr().out == f"sample-corpus: {corpus} is complete\n"
    with pytest.raises(UserError, match=r"seed=1: .*made with 0"):
        sample_corpus.run(sample_corpus.Options(out=str(corpus), megabytes=MEGABYTES, seed=1))
    with pytest.raises(UserError, match=r"megabytes=3: .*made with 1\.5"):
        sample_corpus.run(sample_corpus.Options(out=str(corpus), megabytes=3))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is no sample corpus"):
        sample_corpus.run(sample_corpus.Options(out=str(tmp_path)))


@pytest.fixture(scope="module")
def installation():
    found = Installation.find()
    # A few hundred files stand for all: what follows does not depend on how many there are.
    return Installation(found.libraries, found.code[::25], found.prose)


def test_only_the_standard_library_and_what_isoflop_needs(installation):
    names = {library.name for library in installation.libraries}
    assert {"python", "torch", "deepspeed", "datatrove", "numpy"} <= names
    assert not names & {"isoflop", "pytest", "hypothesis", "ruff", "mypy", "pre-commit"}
    for file in (*installation.code, *installation.prose):
        assert not {"__pycache__", "..", "tests"} & set(Path(file.name).parts)
        assert not Path(file.name).is_absolute()


def test_no_file_serves_two_uses(installation):
    uses = [installation.code_for(use, 0) for use in ("github", "stackexchange", "instructions")]
    assert sum(map(len, uses)) == len(installation.code)
    assert len({(f.library.name, f.name) for use in uses for f in use}) == len(installation.code)
    assert installation.code_for("github", 1) != uses[0]


def test_too_little_text_is_said(installation):
    with pytest.raises(UserError, match="megabytes=900: this installation holds only"):
        gather(installation, 900_000_000, 0)


def test_a_seed_changes_the_choice(installation, tmp_path):
    texts = [gather(installation, 600_000, seed)["github"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    write_corpus(tmp_path, gather(installation, 600_000, 0), 0)


def flan(corpus, split):
    return {path.name.partition(".")[0]: rows(path) for path in (corpus / "flan" / split).iterdir()}


def test_flan_rows_have_flans_keys_and_several_templates(corpus):
    train, heldout = flan(corpus, "train"), flan(corpus, "heldout")
    assert len(train) >= 6
    assert set(heldout) - set(train) == {t.name for t in TASKS if t.held_out}
    assert len(set(heldout) - set(train)) >= 2
    for name, found in [*train.items(), *heldout.items()]:
        for row in found:
            assert list(row) == ["inputs", "targets", "task_source", "task_name", "template_type"]
            assert row["task_name"] == name
            assert row["template_type"] in ("zs_noopt", "fs_noopt")
            assert row["inputs"].strip()
            assert row["targets"].strip()
    for task in TASKS:
        if not task.held_out and len(train[task.name]) > 30:
            words = [template.replace("{}", "").strip() for template in task.templates]
            used = {w for w in words for row in train[task.name] if w in row["inputs"]}
            assert len(used) == 2


def test_no_function_is_on_both_sides(corpus):
    train, heldout = flan(corpus, "train"), flan(corpus, "heldout")
    answers = {row["targets"] for row in train["signature_to_summary"]}
    held = {row["targets"] for row in heldout["source_to_summary"]}
    held |= {row["targets"] for row in heldout["signature_to_summary"]}
    assert len(held) > 5
    assert not answers & held
    shown = "\n".join(row["inputs"] for found in train.values() for row in found)
    assert not [summary for summary in held if summary in shown]


def test_units_are_what_the_source_says():
    text = '''
class Shape(Base):
    """A shape.

    More."""

    def area(self, scale: float = 1.0) -> float:
        """Its area."""
        side = self.side
        return side * scale

    def _hidden(self):
        pass


async def fetch(url, *, retries=3):
    "Fetch it."
    def inner():
        """Not told."""
    return url
'''
    area, fetch, shape = units_of("m", ast.parse(text), text)
    assert area.signature == "def area(self, scale: float=1.0) -> float:"
    assert (area.summary, area.members) == ("Its area.", ("scale",))
    assert area.source.splitlines()[1:] == ["    side = self.side", "    return side * scale"]
    assert fetch.signature == "async def fetch(url, *, retries=3):"
    assert fetch.members == ("url", "retries")
    assert (shape.is_class, shape.members, shape.rest) == (True, ("area",), "More.")
