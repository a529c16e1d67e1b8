"""FLOPs of a share: the table called with what each row really holds."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.config import ModelConfig, named
from models.flops import Flops, training_flops
from models.registry import build
from pipeline.config import RunConfig
from pipeline.sources import PretrainingSource

EOD, PAD, BOS, SEQ_LEN, ROWS = 9, 3, 1, 11, 4
# Architecture, objective, and fields of the model.
KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("decllm", "causal", {"num_heads": 4, "num_kv_heads": 2}),
    ("decllm", "prefix", {}),
    ("redllm", "prefix", {"num_encoder_layers": 1, "num_layers": 2}),
    ("redllm", "prefix", {"merged_attention": True, "activation_checkpointing": True}),
    ("ared", "causal", {"num_cross_heads": 2, "activation_checkpointing": True}),
]


class Order:
    """What a source asks of the training order: the same rows at every step."""

    def __init__(self, ids: np.ndarray, valid: np.ndarray) -> None:
        special = SimpleNamespace(special_ids={"eod": EOD, "pad": PAD, "bos": BOS})
        self.store = SimpleNamespace(
            manifest=SimpleNamespace(tokenizer=special), sources=["a"], num_sequences={"a": ROWS}
        )
        self._rows = SimpleNamespace(ids=ids, valid=valid, sample_numbers=np.arange(ROWS))

    def batch(self, start: int, count: int, stride: int | None = None) -> SimpleNamespace:
        """All rows."""
        return self._rows


def source(
    kind: tuple[str, str, dict[str, Any]], split: int, ids: list[list[int]], valid: list[int]
) -> PretrainingSource:
    """Of `ids` [4, 11], which are read with documents."""
    arch, objective, _ = kind
    config = RunConfig(
        run_dir="run",
        data="data",
        arch=arch,
        size="nano",
        steps=1,
        global_batch=ROWS,
        micro_batch=2,
        seq_len=SEQ_LEN,
        prefix_len=split,
        objective=objective,  # type: ignore[arg-type]
        document_masks=True,
        ds_config="file",
    )
    order: Any = Order(np.array(ids, dtype=np.uint16), np.array(valid))
    return PretrainingSource(config, model_of(kind), order, bos=BOS, pad=PAD)


def model_of(kind: tuple[str, str, dict[str, Any]]) -> ModelConfig:
    """A small one."""
    arch, _, changes = kind
    return named(arch, "nano", 20, d_model=8, d_ffn=12, max_seq_len=SEQ_LEN + 1, **changes)


def expected(
    kind: tuple[str, str, dict[str, Any]], split: int, row: list[int], valid: int
) -> Flops:
    """The table of one row, its documents' lengths counted token by token."""
    arch, objective, _ = kind
    numbers = [row[:place].count(EOD) for place in range(SEQ_LEN)]
    if arch != "redllm":
        lengths = [len(list(same)) for _, same in itertools.groupby(numbers)]
        asked: dict[str, Any] = {}
        if objective == "prefix":
            asked = {"prefix_len": split + 1, "scored": SEQ_LEN - split}
        return training_flops(model_of(kind), seq_len=SEQ_LEN, documents=lengths, **asked)
    # A source's padding is a document that the targets have no part of.
    sources = [n if i < max(valid, 1) else -1 for i, n in enumerate(numbers[:split])]
    seen = sorted({*sources, *numbers[split:]})
    return training_flops(
        model_of(kind),
        seq_len=SEQ_LEN - split,
        source_len=split,
        documents=[numbers[split:].count(number) for number in seen],
        source_documents=[sources.count(number) for number in seen],
    )


ROW = st.lists(st.sampled_from([4, 5, 6, EOD]), min_size=SEQ_LEN, max_size=SEQ_LEN)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}-{len(kind[2])}")
@settings(max_examples=15, deadline=None)
@given(
    split=st.integers(1, SEQ_LEN - 1),
    rows=st.lists(ROW, min_size=ROWS, max_size=ROWS),
    last=st.integers(1, SEQ_LEN),
)
def test_a_share_costs_what_its_own_documents_leave_of_attention(
    kind: tuple[str, str, dict[str, Any]], split: int, rows: list[list[int]], last: int
) -> None:
    """In every convention, to the last FLOP; of the last row only `last` tokens are text."""
    rows[-1][last:] = [PAD] * (SEQ_LEN - last)
    valid = [SEQ_LEN] * (ROWS - 1) + [last]
    found = source(kind, split, rows, valid).share(0, 0, 1).flops
    parts = [expected(kind, split, row, count) for row, count in zip(rows, valid, strict=True)]
    for convention, value in vars(found).items():
        assert value == sum(getattr(part, convention) for part in parts), convention


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}-{len(kind[2])}")
def test_hardware_flops_of_a_share_equal_the_counter(
    kind: tuple[str, str, dict[str, Any]],
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, EOD + 1, (ROWS, SEQ_LEN), generator=generator).tolist()
    ids[-1][7:] = [PAD] * 4
    share = source(kind, 5, ids, [SEQ_LEN] * 3 + [7]).share(0, 0, 1)
    model = build(model_of(kind))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for batch in share.micro_batches:
            # Without loss the padding would not be counted, and the whole row is.
            for terms in model.loss_chunks(batch):
                terms.objective.backward()
    unscored = 4 * 3 * 2 * model.config.d_model * model.config.vocab_size
    assert share.flops.hardware == counter.get_total_flops() + unscored
