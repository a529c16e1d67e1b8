"""Bytes flipped anywhere: one readable error or the right batches, never a silent difference."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np

from pipeline.data.loader import TrainingOrder
from pipeline.data.manifest import check_folder, read_manifest
from pipeline.data.sequences import SequenceStore
from pipeline.options import UserError


def batches(folder: Path) -> list[np.ndarray]:
    """What a run over the whole split reads, small as it is."""
    order = TrainingOrder(SequenceStore(folder, "train", 128), 1)
    batch = order.batch(0, order.store.total)
    return [batch.sample_numbers, batch.ids, batch.valid]


def mutate(content: bytearray, generator: random.Random) -> None:
    """One to four bits flipped, or a piece cut, doubled or zeroed."""
    kind, at = generator.randrange(6), generator.randrange(len(content))
    length = generator.randrange(1, 600)
    if kind == 0:
        del content[at : at + length]
    elif kind == 1:
        content[at:at] = content[at : at + length]
    elif kind == 2:
        content[at : at + length] = bytes(len(content[at : at + length]))
    else:
        for _ in range(generator.randrange(1, 5)):
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)


def damage(folder: Path, copy: Path, count: int, seed: int) -> tuple[int, int]:
    """Damage one file `count` times; how often it was refused, and how often nothing was read."""
    generator = random.Random(seed)
    expected = batches(folder)
    names = [shard.path for shard in read_manifest(folder).select("train")]
    refused = harmless = 0
    for number in range(count):
        name = "manifest.json" if number % 4 == 0 else generator.choice(names)
        content = bytearray((folder / name).read_bytes())
        mutate(content, generator)
        (copy / name).write_bytes(content)
        try:
            check_folder(copy)
            found = batches(copy)
        except UserError:
            refused += 1
        else:
            # What was hit is not read: a tar header, or padding.
            harmless += 1
            assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))
        shutil.copy(folder / name, copy / name)
    return refused, harmless


def test_damage_is_refused_or_harmless_and_never_silent(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    refused, harmless = damage(shards, copy, 100, seed=2)
    assert refused > 50
    assert harmless > 0
