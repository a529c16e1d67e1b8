"""The plan's memory against live tensors of real runs and of engines among pretended ranks."""

from __future__ import annotations

import pytest

from tests.tools.planning.measured import Case, Measured, measure, pretend
from tools.planning.memory import peak
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
LAYOUTS = [
    Case("decllm", "nano", precision="bf16"),
    Case("ared", "tiny", optimizer="adafactor", run=(("factored", True),)),
    Case("redllm", "tiny", stage=1, precision="bf16"),
    Case("entp", "tiny", stage=2),
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


@pytest.mark.parametrize("ranks", [8, 1000])
def test_states_are_deepspeeds_to_the_byte(ranks: int) -> None:
    for case, found in zip(LAYOUTS, pretend(LAYOUTS, ranks), strict=True):
        check_states(case, ranks, found)
