"""Manifests of large corpora whose shards are not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.manifest import Input, Manifest, Shard, TokenizerInfo, write_manifest

BLOCK_TOKENS = 131_072
# Billions of tokens of RedPajama's subsets, 2,084 files; a shard of 1 GiB holds 4,000 blocks.
REDPAJAMA = {
    "common_crawl": 878, "c4": 175, "github": 59, "book": 26, "arxiv": 28, "wikipedia": 24,
    "stackexchange": 20,
}  # fmt: skip
_SHARD_BLOCKS, _FILES = 4000, 2084


def _write(folder: Path, shards: Sequence[Shard], inputs: Sequence[Input] = ()) -> None:
    info = TokenizerInfo("0" * 64, 1 << 15, {"pad": 0, "bos": 1, "eod": 2})
    manifest = Manifest(
        "tokens", "uint16", BLOCK_TOKENS, info, {}, tuple(shards), tuple(inputs)
    )  # fmt: skip
    write_manifest(folder, manifest)


def one_source(folder: Path, shards: int, samples: int) -> int:
    """Shards of `samples` blocks each; the number of blocks."""
    tokens = samples * BLOCK_TOKENS
    rows = [
        Shard(f"train/a/shard-{n:06d}-000.tar", "train", "a", samples, tokens, 9, 9, 1, "0" * 64)
        for n in range(shards)
    ]
    _write(folder, rows)
    return shards * samples


def redpajama(folder: Path, extra: dict[str, int]) -> None:
    """RedPajama's sources, and `extra` tokens of others."""
    tokens = _SHARD_BLOCKS * BLOCK_TOKENS
    shards = [
        Shard(
            f"train/{name}/shard-{number:06d}-000.tar", "train", name, _SHARD_BLOCKS, tokens,
            9, 9, _SHARD_BLOCKS * 264_192, f"{number:064x}",
        )
        for name, billions in sorted(REDPAJAMA.items())
        for number in range(billions * 10**9 // tokens + 1)
    ]  # fmt: skip
    shards += [
        Shard(f"train/{name}/shard-999999-000.tar", "train", name, 1, tokens, 9, 9, 1, "0" * 64)
        for name, tokens in extra.items()
    ]
    inputs = [
        Input(f"c4/c4-train.{n:05d}-of-01024.jsonl", 10**9, f"{n:016x}", 9, 9, {"empty": 1}, 0)
        for n in range(_FILES)
    ]
    _write(folder, shards, inputs)
