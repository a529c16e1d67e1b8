"""ZeRO at every stage gives the numbers of one process of plain PyTorch on the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed.parity import Case, largest_difference, too_large, trained
from tests.distributed.plain_training import plain

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
CHUNKED = 300  # pairs: two rows of 16 tokens at once
# Every architecture at every stage; the rest so that each pair of choices comes up.
CASES = [
    Case("decllm", 0, micro_batch=2, checkpointing=True),
    Case("decllm", 1, micro_batch=6, offload="optimizer"),
    Case("decllm", 2, micro_batch=2),
    Case("decllm", 3, micro_batch=6, checkpointing=True, offload="both"),
    Case("redllm", 0, micro_batch=6),
    Case("redllm", 1, micro_batch=2, checkpointing=True),
    Case("redllm", 2, micro_batch=6, checkpointing=True, offload="optimizer"),
    Case("redllm", 3, micro_batch=2, offload="optimizer"),
    Case("entp", 0, micro_batch=2, entp_chunk_pairs=CHUNKED),
    Case("entp", 1, micro_batch=2, offload="optimizer", entp_chunk_pairs=CHUNKED),
    Case("entp", 2, micro_batch=6, checkpointing=True, offload="optimizer", entp_chunk_pairs=50),
    # a part of a row at once
    Case("entp", 3, micro_batch=6, checkpointing=True, entp_chunk_pairs=50),
    Case("ared", 0, micro_batch=6, checkpointing=True),
    Case("ared", 1, micro_batch=6),
    Case("ared", 2, micro_batch=2, offload="optimizer"),
    Case("ared", 3, micro_batch=2, checkpointing=True, offload="both"),
]


def differences(cases: Sequence[Case], shards: Path, steps: int, ranks: int) -> dict[str, float]:
    """By case, the largest relative difference from plain PyTorch."""
    curves = trained(cases, shards, steps, ranks)
    return {
        str(case): largest_difference(curve, plain(case, shards, steps))
        for case, curve in zip(cases, curves, strict=True)
    }


def test_every_stage_equals_plain_pytorch(shards_dir: Path) -> None:
    assert not too_large(differences(CASES, shards_dir, 3, 2), TOLERANCE)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_uneven_masks_weigh_as_in_one_big_batch(ranks: int, shards_dir: Path) -> None:
    """Random masks, rows without any target among them, on any cut into ranks and micro-batches."""
    cases = [
        Case("decllm", 3, micro_batch=2, mask_seed=1),
        Case("redllm", 2, micro_batch=1, mask_seed=2),
        Case("entp", 3, micro_batch=4, mask_seed=3, entp_chunk_pairs=CHUNKED),
        Case("ared", 1, micro_batch=12 // ranks, mask_seed=4),
    ]
    assert not too_large(differences(cases, shards_dir, 2, ranks), TOLERANCE)


RUN_FILES = [file.stem for file in sorted(Path("ds_configs").glob("*.json"))]


def test_every_shipped_deepspeed_file_trains_as_plain_pytorch(shards_dir: Path) -> None:
    cases = [Case(file=stem, micro_batch=3) for stem in RUN_FILES if "nvme" not in stem]
    assert len(cases) == 5
    assert not too_large(differences(cases, shards_dir, 2, 2), TOLERANCE)


# Choices that change which modules a forward pass runs through, and how often.
CHOICES = [
    Case("redllm", model=(("merged_attention", True), ("num_kv_heads", 1)), checkpointing=True),
    Case("redllm", model=(("cross_attention_first", True), ("attention_output_norm", "output"))),
    Case(
        "ared",
        model=(
            ("bridge_norm", True),
            ("bridge_next_position", True),
            ("positional_subtraction_norm", True),
            ("embedding_loss_detach", "none"),
            ("embedding_mean_norm", "after"),
        ),
    ),
    Case("decllm", model=(("positions", "learned"), ("positional_subtraction", True))),
    Case("entp", model=(("num_layers", 4), ("entp_causal_layers", 1)), entp_chunk_pairs=50),
    Case(
        "entp",
        model=(("num_layers", 3), ("entp_causal_layers", 1), ("entp_sampled_prefixes", 4)),
        entp_chunk_pairs=200,
        micro_batch=3,
    ),
]


# What is left out is drawn, and drawn again where activations are made anew.
DROPPING = [
    Case("decllm", model=(("dropout", 0.2),), micro_batch=3, checkpointing=True),
    Case("redllm", 2, model=(("dropout", 0.2),)),
]


def test_dropout_leaves_out_the_same_as_in_one_process(shards_dir: Path) -> None:
    assert not too_large(differences(DROPPING, shards_dir, 3, 2), TOLERANCE)
    kept = plain(Case("redllm"), shards_dir, 3)
    assert largest_difference(plain(DROPPING[1], shards_dir, 3), kept) > 1e-3


def test_choices_of_a_model_equal_plain_pytorch_at_stage_3(shards_dir: Path) -> None:
    assert not too_large(differences(CHOICES, shards_dir, 3, 2), TOLERANCE)
