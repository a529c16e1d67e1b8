"""The plan's memory over the whole grid: every named size among up to 1024 ranks, and real steps of
every architecture, stage and optimizer."""

from __future__ import annotations

import pytest

from models.registry import ARCHITECTURES
from models.shapes import sizes_of
from tests.tools.planning.measured import Case, measure, pretend
from tests.tools.planning.test_memory import check_peak, check_states

pytestmark = [pytest.mark.distributed, pytest.mark.soak]
VOCAB_SIZE = 32_768
RANKS = (8, 64, 1024)
# bf16 takes a pass over every number of a model, which of these takes minutes.
LARGE = ("1b", "2b", "4b", "8b")


def layouts(ranks: int) -> list[Case]:
    """Every named size once, the architectures taking turns that differ by `ranks`.

    An engine takes twice its states while it is made: of the largest size an eighth would take all
    that a machine of 24 GB has, so it is cut for twice as many ranks.
    """
    archs, found = list(ARCHITECTURES), []
    for number, size in enumerate(sizes_of("decllm")):
        arch = archs[(number + RANKS.index(ranks)) % len(archs)]
        if size not in sizes_of(arch):
            arch = "decllm"
        if size == "8b" and ranks == 8:
            continue
        precision = "fp32" if size in LARGE else "bf16"
        found.append(Case(arch, size, precision=precision, vocab_size=VOCAB_SIZE))
    return found


@pytest.mark.parametrize("ranks", RANKS)
def test_states_of_every_named_size(ranks: int) -> None:
    cases = layouts(ranks)
    for case, found in zip(cases, pretend(cases, ranks, timeout=290), strict=True):
        check_states(case, ranks, found)


def test_states_of_the_largest_size_among_sixteen() -> None:
    case = Case("decllm", "8b", precision="fp32", vocab_size=VOCAB_SIZE)
    (found,) = pretend([case], 16, timeout=290)
    check_states(case, 16, found)


@pytest.mark.parametrize("ranks", RANKS)
def test_states_of_other_stages_and_optimizers(ranks: int) -> None:
    cases = [
        Case(arch, "small", stage=stage, precision=precision, optimizer=optimizer, run=run)
        for arch, run in (("redllm", ()), ("ared", (("factored", True),)))
        for stage in (1, 2, 3)
        for precision in ("fp32", "bf16")
        for optimizer in (("adafactor",) if run else ("adamw", "adafactor"))
    ]
    for case, found in zip(cases, pretend(cases, ranks, timeout=290), strict=True):
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
