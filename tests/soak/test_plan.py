"""The plan's memory over the whole grid: every named size of every architecture among up to 1024
ranks, and real steps and evaluations of every architecture, stage and optimizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings

from models.registry import ARCHITECTURES
from models.shapes import sizes_of
from tests.tools.planning.measured import Case, measure, pretend
from tests.tools.planning.test_choose import QUESTIONS, check_smallest
from tests.tools.planning.test_memory import check_evaluation, check_peak, check_states

pytestmark = [pytest.mark.distributed, pytest.mark.soak]
VOCAB_SIZE = 32_768
RANKS = (8, 64, 1024)
SIZES = [(arch, size) for arch in ARCHITECTURES for size in sizes_of(arch)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_states_of_every_named_size(precision: str, ranks: int) -> None:
    cases = [Case(*named, precision=precision, vocab_size=VOCAB_SIZE) for named in SIZES]
    for case, found in zip(cases, pretend(cases, ranks), strict=True):
        check_states(case, ranks, found)


@pytest.mark.parametrize("ranks", RANKS)
def test_states_of_other_stages_and_optimizers(ranks: int) -> None:
    cases = [
        Case(arch, "small", stage=stage, precision=precision, optimizer=optimizer, run=run)
        for arch, run in (("redllm", ()), ("ared", (("factored", True),)))
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
        for optimizer in (("adafactor",) if run else ("adamw", "adafactor"))
    ]
    for case, found in zip(cases, pretend(cases, ranks), strict=True):
        check_states(case, ranks, found)


ONE_RANK = [
    Case("entp", "tiny", seq_len=32, rows=4, model=(("entp_chunk_pairs", 4_000),)),
    Case("entp", "tiny", seq_len=96, model=(("entp_causal_layers", 2),)),
    Case("entp", "tiny", seq_len=96, model=(("activation_checkpointing", True),)),
    Case("entp", "tiny", seq_len=96, model=(("qkv_norm", True), ("positions", "rotary"))),
    Case("entp", "tiny", seq_len=96, model=(("entp_sampled_prefixes", 8),)),
    Case("ared", "tiny", rows=8, seq_len=128, model=(("activation_checkpointing", True),)),
    Case("decllm", "entp-xsmall", rows=8, seq_len=128),
    Case("redllm", "tiny", rows=8, seq_len=128, model=(("merged_attention", True),)),
    Case("decllm", "tiny", stage=0, rows=4),
    Case("decllm", "tiny", vocab_size=16_000, rows=8, seq_len=128),
]
TWO_RANKS = [
    Case("decllm", "tiny", optimizer="muon"),
    Case("entp", "tiny", stage=2),
    Case("decllm", "tiny", backward_calls=3, stage=1, rows=4),
    Case("redllm", "tiny", optimizer="adafactor", run=(("factored", True),)),
    Case("ared", "tiny", stage=2, precision="bf16", rows=1, seq_len=16),
    Case("redllm", "tiny", stage=3, precision="bf16", rows=1, seq_len=16),
]


def test_peaks_of_a_single_rank() -> None:
    for case, found in zip(ONE_RANK, measure(ONE_RANK, 1, timeout=290), strict=True):
        check_peak(case, 1, found)


def test_peaks_of_two_ranks() -> None:
    for case, found in zip(TWO_RANKS, measure(TWO_RANKS, 2, timeout=290), strict=True):
        check_peak(case, 2, found)


EVALUATED = [
    Case("ared", "tiny", stage=1, rows=1, evaluated=64, saves=True, optimizer="muon"),
    Case("ared", "tiny", stage=2, rows=1, evaluated=64, precision="bf16", optimizer="muon"),
    Case("ared", "tiny", rows=1, seq_len=16, precision="bf16", evaluated=64),
    Case("redllm", "tiny", stage=2, rows=1, evaluated=64, model=(("merged_attention", True),)),
    Case("redllm", "tiny", rows=1, evaluated=64, saves=True),
    Case("entp", "tiny", rows=1, seq_len=64, evaluated=48, model=(("entp_sampled_prefixes", 4),)),
    Case("decllm", "tiny", vocab_size=16_000, rows=1, evaluated=96, precision="bf16"),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_peaks_of_evaluations(ranks: int) -> None:
    for case, found in zip(EVALUATED, measure(EVALUATED, ranks, timeout=290), strict=True):
        check_evaluation(case, ranks, found)


@given(QUESTIONS)
@settings(max_examples=150, deadline=None)
def test_the_cluster_that_is_named_is_accepted_and_none_below_it(question: dict[str, Any]) -> None:
    assume(question["global_batch"] % question.get("micro_batch", 1) == 0)
    check_smallest(question)
