"""Random [8, 2048] int64 batches from shards: the training order against its peers.

Both read the same tars, one epoch a run, in one process that has imported everything. Ours gives a
permutation of the whole epoch and checks every 4 KiB it reads; webdataset shuffles blocks in a
buffer, the order that a stream allows. Only the set of sequences can be, and is, compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipeline.data.manifest import Manifest, Shard, TokenizerInfo, write_manifest
from pipeline.data.shards import ShardWriter, token_layout
from tests.benchmarks.measure import Benchmark, Contest, NotRun, Sample, UnequalWork, timed

BATCH, SEQ_LEN = 8, 2048
BLOCK_TOKENS, BLOCKS, SHARDS = 131_072, 1024, 4
SHUFFLE_BUFFER = 10_000


def make_shards(folder: Path) -> None:
    """A shard folder of random ids, 134 million: more than a processor's caches hold."""
    generator = np.random.default_rng(0)
    layout = token_layout(BLOCK_TOKENS, "uint16")
    shards = []
    for number in range(SHARDS):
        name = f"train/random/shard-{number:06d}-000.tar"
        writer = ShardWriter(folder / name, layout)
        for _ in range(BLOCKS // SHARDS):
            writer.add({"tokens.npy": generator.integers(0, 1 << 15, BLOCK_TOKENS, np.uint16)})
        written = writer.close()
        tokens = written.samples * BLOCK_TOKENS
        counted = (written.samples, tokens, 0, 0, written.bytes, written.sha256)
        shards.append(Shard(name, "train", "random", *counted))
    tokenizer = TokenizerInfo("0" * 64, 1 << 15, {"pad": 0, "bos": 1, "eod": 2})
    write_manifest(
        folder, Manifest("tokens", "uint16", BLOCK_TOKENS, tokenizer, {}, tuple(shards), ())
    )


def training_order(folder: Path) -> Callable[[int], Iterator[np.ndarray]]:
    """Epoch number → its batches, as pipeline.sources makes them: uint16 rows, then int64."""
    from pipeline.data.loader import SequenceStore, TrainingOrder

    order = TrainingOrder(SequenceStore(folder, "train", SEQ_LEN), seed=0)
    batches = order.store.total // BATCH

    def epoch(number: int) -> Iterator[np.ndarray]:
        for step in range(number * batches, (number + 1) * batches):
            yield order.batch(step * BATCH, BATCH).ids.astype(np.int64)

    return epoch


def webdataset_pipeline(folder: Path) -> Callable[[int], Iterator[np.ndarray]]:
    """Epoch number → its batches: shuffled shards, blocks cut up, a shuffle buffer, stacking."""
    import random

    import webdataset

    def sequences(blocks: Iterator[tuple[np.ndarray]]) -> Iterator[np.ndarray]:
        for (block,) in blocks:
            yield from block.reshape(-1, SEQ_LEN)

    def epoch(number: int) -> Iterator[np.ndarray]:
        shards = [str(path) for path in sorted(folder.glob("train/random/*.tar"))]
        pipeline = webdataset.DataPipeline(
            webdataset.SimpleShardList(shards),
            webdataset.shuffle(len(shards), rng=random.Random(number)),
            webdataset.tarfile_to_samples(),
            webdataset.decode(only=["tokens.npy"]),
            webdataset.to_tuple("tokens.npy"),
            sequences,
            webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=random.Random(number)),
        )
        rows = []
        for row in pipeline:
            rows.append(row)
            if len(rows) == BATCH:
                yield np.stack(rows).astype(np.int64)
                rows = []

    return epoch


def sequences_in_order(folder: Path) -> Iterator[np.ndarray]:
    """Every sequence of the shards, for peers that want them in a format of their own."""
    from pipeline.data.sequences import SequenceStore

    store = SequenceStore(folder, "train", SEQ_LEN)
    for index in range(store.total):
        yield store.read("random", index)[0]


def litdata_loader(folder: Path) -> Callable[[int], Iterator[np.ndarray]]:
    """Epoch number → litdata's TokensLoader over chunks of 64 MiB, shuffled."""
    write_litdata(folder)
    return litdata_epochs(folder)


def write_litdata(folder: Path) -> None:
    """The sequences of the shards as litdata's chunks."""
    import litdata
    import torch
    from litdata.streaming.writer import BinaryWriter

    item_loader = litdata.TokensLoader(block_size=SEQ_LEN)
    writer = BinaryWriter(str(folder / "litdata"), chunk_bytes=64 << 20, item_loader=item_loader)
    for number, ids in enumerate(sequences_in_order(folder)):
        writer[number] = torch.from_numpy(ids.astype(np.uint16))
    writer.done()
    writer.merge()


def litdata_epochs(folder: Path) -> Callable[[int], Iterator[np.ndarray]]:
    """Epoch number → its batches, from what `write_litdata` wrote."""
    import litdata

    out, item_loader = str(folder / "litdata"), litdata.TokensLoader(block_size=SEQ_LEN)

    def epoch(number: int) -> Iterator[np.ndarray]:
        data = litdata.StreamingDataset(out, item_loader=item_loader, shuffle=True, seed=number)
        rows = []
        for row in data:
            rows.append(row.numpy())
            if len(rows) == BATCH:
                yield np.stack(rows).astype(np.int64)
                rows = []

    return epoch


def streaming_dataset(folder: Path) -> Callable[[int], Iterator[np.ndarray]]:
    """Epoch number → mosaicml-streaming over MDS shards, shuffled by its default."""
    import streaming

    out = str(folder / "mds")
    with streaming.MDSWriter(out=out, columns={"ids": f"ndarray:uint16:{SEQ_LEN}"}) as writer:
        for ids in sequences_in_order(folder):
            writer.write({"ids": ids.astype(np.uint16)})
    data = streaming.StreamingDataset(local=out, shuffle=True, batch_size=BATCH)

    def epoch(number: int) -> Iterator[np.ndarray]:
        rows = []
        for sample in data:
            rows.append(sample["ids"])
            if len(rows) == BATCH:
                yield np.stack(rows).astype(np.int64)
                rows = []

    return epoch


def contest_with(
    module: str, package: str, theirs: Callable[[Path], Callable[[int], Iterator[np.ndarray]]]
) -> Callable[[Path], Contest]:
    """A contest against the peer that `module` is, which pip knows as `package`."""

    def prepare(folder: Path) -> Contest:
        if find_spec(module) is None:
            raise NotRun(f"{module} is not installed; pip install {package}")
        make_shards(folder)
        try:
            return contest(folder, theirs)
        except ImportError as error:
            raise NotRun(f"{module} cannot be imported ({error}); pip install {package}") from None

    return prepare


def contest(
    folder: Path, theirs: Callable[[Path], Callable[[int], Iterator[np.ndarray]]]
) -> Contest:
    """Whole epochs of both sides, on the shards in `folder`."""

    def side(epoch: Callable[[int], Iterator[np.ndarray]]) -> Callable[[], Sample]:
        numbers = iter(range(1 << 30))
        # Once, outside the timing: which sequences an epoch holds.
        digest = epoch_digest(epoch(0))

        def run() -> Sample:
            number = next(numbers)
            sample = timed(lambda: sum(len(batch) for batch in epoch(number)))
            return Sample(sample.cpu_seconds, (digest, sample.result))

        return run

    return Contest(
        ours=side(training_order(folder)),
        theirs=side(theirs(folder)),
        check=same_sequences,
        work=BLOCKS * BLOCK_TOKENS / 1e6,
        unit="Mtok",
    )


def epoch_digest(batches: Iterator[np.ndarray]) -> str:
    """One digest of the multiset of rows, whatever their order."""
    rows = sorted(hashlib.sha256(row.tobytes()).digest() for batch in batches for row in batch)
    return hashlib.sha256(b"".join(rows)).hexdigest()


def same_sequences(ours: tuple[str, int], theirs: tuple[str, int]) -> None:
    """Both epochs hold the same sequences, and as many."""
    expected = BLOCKS * BLOCK_TOKENS // SEQ_LEN
    if ours != theirs or ours[1] != expected:
        raise UnequalWork(f"sequences differ: {ours} against {theirs}, {expected} expected")


BENCHMARKS = (
    Benchmark(
        name="feeding",
        ours="TrainingOrder: epoch-wide permutation, every read verified",
        theirs="webdataset: blocks through a 10,000-sequence shuffle buffer, nothing verified",
        process="one process",
        prepare=contest_with("webdataset", "webdataset", webdataset_pipeline),
        note="page cache warm; their order is local, ours is uniform over the epoch",
    ),
    Benchmark(
        name="feeding-litdata",
        ours="TrainingOrder: epoch-wide permutation, every read verified",
        theirs="litdata: TokensLoader, chunks shuffled, nothing verified",
        process="one process",
        prepare=contest_with("litdata", "litdata", litdata_loader),
        peer=True,
        note="page cache warm; their order is chunk by chunk",
    ),
    Benchmark(
        name="feeding-mosaicml-streaming",
        ours="TrainingOrder: epoch-wide permutation, every read verified",
        theirs="mosaicml-streaming: MDS shards, its default shuffle",
        process="one process",
        prepare=contest_with("streaming", "mosaicml-streaming", streaming_dataset),
        peer=True,
        note="page cache warm",
    ),
)
