"""JSONL to token ids: `isoflop tokenize`'s step against what a user would write or install."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from tests.benchmarks.measure import (
    Benchmark,
    Contest,
    NotRun,
    Sample,
    UnequalWork,
    cpu_seconds_so_far,
    in_fresh_process,
    peak_memory,
)
from tests.benchmarks.text import make_corpus, make_tokenizer, text_megabytes

VOCAB_SIZE = 32_768
TEXT_BYTES = 12_000_000
BLOCK_TOKENS = 131_072


def open_rows(corpus: str) -> TextIO:
    """The lines of a corpus, unpacked as one would do it in a script."""
    if corpus.endswith(".zst"):
        import zstandard

        return zstandard.open(corpus, "rt", encoding="utf-8")
    return open(corpus, encoding="utf-8")


def sentencepiece_loop(corpus: str, model: str, output: str) -> Callable[[], None]:
    """The loop everybody writes: rows in, ids and the end of the document out, a flat file."""
    import numpy as np
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    end = processor.eos_id()

    def work() -> None:
        with open_rows(corpus) as rows, open(output, "wb") as flat:
            for row in rows:
                ids = processor.encode(json.loads(row)["text"])
                ids.append(end)
                flat.write(np.array(ids, np.uint16).tobytes())

    return work


def isoflop_step(corpus: str, model: str, output: str) -> Callable[[], None]:
    """One task of `isoflop tokenize`: rejects, splits, blocks, checksums and shards included."""
    from pipeline.data.encoder import encoder_of
    from pipeline.data.tokenizer import load
    from tools.corpus_engine import run_locally  # noqa: F401 (datatrove is part of start-up)
    from tools.corpus_plan import Settings, Task
    from tools.corpus_tasks import TOKENIZER_FILE, run_task

    folder = Path(output)
    (folder / "tasks").mkdir(parents=True)
    shutil.copyfile(model, folder / TOKENIZER_FILE)
    settings = Settings(
        BLOCK_TOKENS, 1 << 40, 1 << 30, 0.0, "text", "corpus", 64 << 20, 0, None, "none", ""
    )
    end = None if corpus.endswith(".zst") else Path(corpus).stat().st_size
    task = Task(0, Path(corpus).name, corpus, 0, end, "corpus")
    # Loading and probing a model is start-up, as it is on the other sides.
    engine = encoder_of(load(folder / TOKENIZER_FILE)).engine
    if engine.name != "gigatoken":
        raise NotRun(f"the fast path is not taken: {engine.reason}")
    return lambda: run_task(task, settings, folder) and None


def datatrove_tokenizer(corpus: str, model: str, output: str) -> Callable[[], None]:
    """datatrove's reader and DocumentTokenizer (Hugging Face tokenizers), shuffling off."""
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    from pipeline.data.tokenizer import EOD

    logger.remove()
    reader = JsonlReader(str(Path(corpus).parent), glob_pattern=Path(corpus).name)
    writer = DocumentTokenizer(
        output,
        tokenizer_name_or_path=str(Path(model).with_name("tokenizer.json")),
        eos_token=EOD,
        shuffle_documents=False,
        save_final_metadata=False,
    )
    return lambda: writer.run(reader.run(None, 0, 1), 0, 1)


def flat_digest(output: Path) -> str:
    """SHA-256 of the ids of a flat file, or of the one that datatrove leaves in a folder."""
    file = output if output.is_file() else next(output.glob("*.ds"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def shards_digest(output: Path) -> str:
    """SHA-256 of the ids in a task's shards and tail, read with tarfile and NumPy alone."""
    import io

    import numpy as np

    digest = hashlib.sha256()
    for shard in sorted(output.rglob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                if member.name.endswith(".tokens.npy"):
                    opened = archive.extractfile(member)
                    assert opened is not None
                    digest.update(np.load(io.BytesIO(opened.read())).tobytes())
    for tails in sorted(output.glob("tasks/*.tails.npz")):
        with np.load(tails) as arrays:
            digest.update(arrays["train/corpus/ids"].tobytes())
    return digest.hexdigest()


SIDES: dict[str, tuple[Callable[..., Callable[[], None]], Callable[[Path], str]]] = {
    "sentencepiece": (sentencepiece_loop, flat_digest),
    "isoflop": (isoflop_step, shards_digest),
    "datatrove": (datatrove_tokenizer, flat_digest),
}


def run_side(name: str, corpus: str, model: str, output: str) -> dict[str, Any]:
    """One side in this process: CPU-seconds of start-up and of the work, peak MiB, digest."""
    prepare, digest = SIDES[name]
    work = prepare(corpus, model, output)
    start_up = cpu_seconds_so_far()
    work()
    spent = cpu_seconds_so_far() - start_up
    peak = peak_memory()
    return {"start_up": start_up, "work": spent, "peak": peak, "digest": digest(Path(output))}


def contest(folder: Path, peer: str, packed: bool = False) -> Contest:
    """`isoflop`'s step against `peer`, each run in a fresh process."""
    corpus = make_corpus(folder, TEXT_BYTES)
    model = make_tokenizer(folder, corpus, VOCAB_SIZE)
    megabytes = text_megabytes(corpus)
    if packed:
        corpus = pack(corpus)
    peaks: dict[str, float] = {}

    def side(name: str) -> Sample:
        output = folder / name
        found = in_fresh_process(run_side, name, str(corpus), str(model), str(output))
        shutil.rmtree(output) if output.is_dir() else output.unlink()
        peaks[name] = max(found["peak"], peaks.get(name, 0.0))
        return Sample(found["work"], found["digest"], found["start_up"])

    if peer == "datatrove":
        write_huggingface_tokenizer(model)
    return Contest(
        ours=lambda: side("isoflop"),
        theirs=lambda: side(peer),
        check=same_ids,
        work=megabytes,
        unit="MB",
        memory=(lambda: peaks["isoflop"], lambda: peaks[peer]),
    )


def pack(corpus: Path) -> Path:
    """The corpus as one zstd frame beside it."""
    import zstandard

    packed = corpus.with_name(corpus.name + ".zst")
    packed.write_bytes(zstandard.compress(corpus.read_bytes()))
    return packed


def same_ids(ours: str, theirs: str) -> None:
    """Both files hold the same ids in the same order."""
    if ours != theirs:
        raise UnequalWork(f"ids differ: sha256 {ours[:12]}… against {theirs[:12]}…")


def write_huggingface_tokenizer(model: Path) -> None:
    """`tokenizer.json` beside a SentencePiece BPE model: the same pieces, merges and bytes."""
    if find_spec("tokenizers") is None:
        raise NotRun("tokenizers is not installed; pip install tokenizers")
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # A piece is the merge of two others, and pieces stand in the order they were merged in.
    ordinary = {
        p
        for i, p in enumerate(pieces)
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
    }
    merges = []
    for piece in sorted(ordinary, key=vocab.__getitem__):
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        parts = [cut for cut in cuts if cut[0] in ordinary and cut[1] in ordinary]
        merges += sorted(parts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    unknown = processor.id_to_piece(processor.unk_id())
    made = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Replace("▁", " ")
    controls = [p for i, p in enumerate(pieces) if processor.is_control(i)]
    made.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in controls])
    made.save(str(model.with_name("tokenizer.json")))


def against_datatrove(folder: Path) -> Contest:
    """See `BENCHMARKS`."""
    if find_spec("datatrove") is None:
        raise NotRun("datatrove is not installed; run make install")
    return contest(folder, "datatrove")


def whole_command(corpus: str, model: str, output: str) -> dict[str, Any]:
    """CPU-seconds of `isoflop tokenize` from its start to its exit code; documents made."""
    import subprocess
    import sys

    from pipeline.data.manifest import read_manifest

    before = cpu_seconds_so_far()
    flags = ["--input", corpus, "--output", output, "--tokenizer", model]
    command = [sys.executable, "-m", "tools.cli", "tokenize", *flags]
    subprocess.run(command, check=True, capture_output=True)
    spent = cpu_seconds_so_far() - before
    return {"work": spent, "documents": sum(s.documents for s in read_manifest(output).shards)}


def start_up(folder: Path) -> Contest:
    """All that one row costs: imports, models, probes, the end."""
    model = make_tokenizer(folder, make_corpus(folder, TEXT_BYTES), VOCAB_SIZE)
    write_huggingface_tokenizer(model)
    (folder / "row").mkdir()
    row = folder / "row" / "row.jsonl"
    row.write_text('{"text": "one row"}\n')

    def ours() -> Sample:
        output = folder / "command"
        found = in_fresh_process(whole_command, str(row), str(model), str(output))
        shutil.rmtree(output)
        return Sample(found["work"], found["documents"])

    def theirs() -> Sample:
        output = folder / "datatrove"
        found = in_fresh_process(run_side, "datatrove", str(row), str(model), str(output))
        shutil.rmtree(output)
        return Sample(found["start_up"] + found["work"], 1)

    def check(made: int, expected: int) -> None:
        if made != expected:
            raise UnequalWork(f"{made} documents, {expected} expected")

    return Contest(ours=ours, theirs=theirs, check=check)


BENCHMARKS = (
    Benchmark(
        name="tokenise-start-up",
        ours="isoflop tokenize, the whole command on one row, datatrove's executor included",
        theirs="datatrove's JsonlReader and DocumentTokenizer on the same row",
        process="fresh processes",
        prepare=start_up,
        note=f"{VOCAB_SIZE:,} BPE ids; CPU-seconds from the start of Python to its end",
    ),
    Benchmark(
        name="tokenise-sentencepiece",
        ours="isoflop tokenize's step: JSONL to checked, hashed WebDataset shards",
        theirs="plain sentencepiece loop: JSONL to a flat uint16 file",
        process="fresh processes",
        prepare=lambda folder: contest(folder, "sentencepiece"),
        note=f"Python source, {VOCAB_SIZE:,} BPE ids; imports and models are start-up, apart",
    ),
    Benchmark(
        name="tokenise-sentencepiece-zst",
        ours="isoflop tokenize's step: JSONL.zst to checked, hashed WebDataset shards",
        theirs="plain sentencepiece loop: JSONL.zst to a flat uint16 file",
        process="fresh processes",
        prepare=lambda folder: contest(folder, "sentencepiece", packed=True),
        note="as tokenise-sentencepiece",
    ),
    Benchmark(
        name="tokenise-datatrove",
        ours="isoflop tokenize's step: JSONL to checked, hashed WebDataset shards",
        theirs="datatrove's JsonlReader and DocumentTokenizer, no shuffling",
        process="fresh processes",
        prepare=against_datatrove,
        peer=True,
        note="the SentencePiece model converted piece by piece to a tokenizer.json",
    ),
)
