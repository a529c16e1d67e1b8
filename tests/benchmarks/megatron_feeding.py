"""Megatron-core's GPTDataset over the same tokens, from a user's checkout (MEGATRON_DIR)."""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import feeding
from tests.benchmarks.measure import Benchmark, NotRun


@dataclass(frozen=True)
class _Tokenizer:
    """All that GPTDataset asks of a tokenizer."""

    vocab_size: int = 1 << 15
    eod: int = 2
    unique_identifiers: dict[str, str] = field(default_factory=lambda: {"class": "none"})


def datasets_of_checkout() -> Any:
    """The modules of `megatron.core.datasets` that are needed. Raises NotRun."""
    checkout = os.environ.get("MEGATRON_DIR")
    if not checkout:
        raise NotRun(
            "set MEGATRON_DIR to a checkout of Megatron-LM in which "
            "`make -C megatron/core/datasets` was run (needs pybind11)"
        )
    package = Path(checkout) / "megatron" / "core"
    if not (package / "datasets" / "gpt_dataset.py").is_file():
        raise NotRun(f"MEGATRON_DIR={checkout!r} has no megatron/core/datasets")
    if checkout not in sys.path:
        sys.path.append(checkout)
    if "megatron.core" not in sys.modules:
        # Its own __init__ imports every model and their kernels, which need a GPU's packages.
        bare = types.ModuleType("megatron.core")
        bare.__path__ = [str(package)]
        sys.modules["megatron.core"] = bare
    names = ("gpt_dataset", "indexed_dataset", "blended_megatron_dataset_builder")
    try:
        with warnings.catch_warnings(action="ignore"):
            importlib.import_module("megatron.core.parallel_state")
            importlib.import_module("megatron.core.datasets.helpers_cpp")
            modules = [importlib.import_module(f"megatron.core.datasets.{name}") for name in names]
    except ImportError as error:
        raise NotRun(
            f"MEGATRON_DIR: {error}; run make -C megatron/core/datasets there (needs pybind11), "
            "with the Python that runs this"
        ) from None
    merged = types.SimpleNamespace()
    for module in modules:
        merged.__dict__.update(vars(module))
    return merged


def megatron_dataset(folder: Path) -> Callable[[int], Iterator[np.ndarray]]:
    """Epoch number → its batches, in one shuffled order: the index is built before, once.

    As lean as it can be asked for: one document, so that each sample is one read of the mapped
    file; no attention mask, no extra token. Labels, loss mask and positions cannot be left out.
    """
    core = datasets_of_checkout()
    prefix = str(folder / "megatron")
    ids = np.concatenate(list(feeding.sequences_in_order(folder))).astype(np.uint16)
    builder = core.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    samples = len(ids) // feeding.SEQ_LEN
    config = core.GPTDatasetConfig(
        random_seed=0,
        sequence_length=feeding.SEQ_LEN,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(folder / "megatron-cache"),
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
    )
    sizes = [samples, 0, 0]
    made = core.BlendedMegatronDatasetBuilder(core.GPTDataset, sizes, lambda: True, config)
    dataset = made.build()[0]

    def epoch(number: int) -> Iterator[np.ndarray]:
        rows = []
        for index in range(samples):
            rows.append(dataset[index]["tokens"].numpy())
            if len(rows) == feeding.BATCH:
                yield np.stack(rows)
                rows = []

    return epoch


def prepare(folder: Path) -> Any:
    """See `BENCHMARKS`."""
    datasets_of_checkout()
    feeding.make_shards(folder)
    return feeding.contest(folder, megatron_dataset)


BENCHMARKS = (
    Benchmark(
        name="feeding-megatron",
        ours="TrainingOrder: epoch-wide permutation, every read verified",
        theirs="Megatron-core GPTDataset over .bin/.idx: epoch shuffle, labels, nothing verified",
        process="one process",
        prepare=prepare,
        peer=True,
        note="page cache warm; their index is built outside the timing; MEGATRON_DIR",
    ),
)
