"""The plan's memory against live tensors of real runs and of engines among pretended ranks."""

from __future__ import annotations

import pytest

from tests.tools.planning.measured import Case, Measured, measure, pretend
from tools.planning.memory import EVALUATION, SAVE_COPY, host, peak
from tools.planning.states import flat_sizes, persistent, states

pytestmark = pytest.mark.distributed
ONE_RANK = [
    Case("entp", "tiny"),
    Case("decllm", "tiny", stage=2, rows=4, model=(("activation_checkpointing", True),)),
]
TWO_RANKS = [
    Case("decllm", "tiny", rows=8),
    Case("redllm", "tiny", stage=1, seq_len=128),
    Case("ared", "tiny", optimizer="adafactor", backward_calls=2),
    Case("decllm", "tiny", stage=2, precision="bf16", rows=1, seq_len=16),
]
# An evaluation is the fullest moment of each.
EVALUATED = [
    Case("decllm", "tiny", rows=1, evaluated=40, saves=True),
    Case("redllm", "tiny", stage=1, precision="bf16", rows=1, seq_len=128, evaluated=20),
    Case("entp", "tiny", rows=1, seq_len=32, evaluated=80, model=(("entp_chunk_pairs", 20_000),)),
]
LAYOUTS = [
    Case("decllm", "8b", precision="bf16"),
    Case("ared", "tiny", optimizer="adafactor", run=(("factored", True),)),
    Case("ared", "1b", precision="bf16"),
    Case("redllm", "tiny", stage=1, precision="bf16"),
    Case("entp", "tiny", stage=2),
    Case("entp", "150m", stage=2, precision="bf16"),
    Case("decllm", "tiny", optimizer="muon"),
]


def check_peak(case: Case, ranks: int, found: Measured) -> None:
    """Within a tenth of what the plan says."""
    expected = peak(case.request(ranks))
    ratio = expected.total / found.peak
    print(
        f"{case} on {ranks}: planned {expected.total:,} ({expected.name}), "
        f"measured {found.peak:,}, {ratio:.3f}"
    )
    assert 0.9 < ratio < 1.1, (str(case), expected, found)


def check_states(case: Case, ranks: int, found: Measured) -> None:
    """To the byte, but for single numbers and Adafactor's lists of its parameters."""
    request = case.request(ranks)
    expected = states(request)
    # What stays whole is gathered by the first pass.
    held = expected.device - sum(p.numel for p in persistent(request)) * request.width
    # Adam's moments are made by the first step.
    held -= sum(8 * size for group, size in flat_sizes(request) if group.kind == "adam")
    print(f"{case} among {ranks}: planned {held:,}, measured {found.built:,}")
    assert abs(found.built - held) <= 4096, (str(case), expected, found)


def test_peaks_of_a_single_rank() -> None:
    for case, found in zip(ONE_RANK, measure(ONE_RANK, 1), strict=True):
        check_peak(case, 1, found)


def test_peaks_of_two_ranks() -> None:
    for case, found in zip(TWO_RANKS, measure(TWO_RANKS, 2), strict=True):
        check_peak(case, 2, found)


def check_evaluation(case: Case, ranks: int, found: Measured) -> None:
    """As `check_peak`, of a case whose evaluation is the fullest moment."""
    assert peak(case.request(ranks)).name.startswith(EVALUATION), str(case)
    check_peak(case, ranks, found)


def test_peaks_of_evaluations_and_of_copies_that_are_saved() -> None:
    for case, found in zip(EVALUATED, measure(EVALUATED, 2), strict=True):
        check_evaluation(case, 2, found)
    request = EVALUATED[0].request(2)
    # A CPU rank's copy is in its own memory, a GPU's in its host's.
    copy = peak(request).parts[SAVE_COPY]
    assert copy == sum(12 * p.numel for p in request.parameters) // 2
    assert not host(request)
    on_gpu = request.with_changes(on_cpu=False)
    assert host(on_gpu) == {SAVE_COPY: copy}
    assert SAVE_COPY not in peak(on_gpu).parts


@pytest.mark.parametrize("ranks", [8, 1000])
def test_states_are_deepspeeds_to_the_byte(ranks: int) -> None:
    for case, found in zip(LAYOUTS, pretend(LAYOUTS, ranks), strict=True):
        check_states(case, ranks, found)
