"""Stage 3 builds a model in slices: never whole on a rank, and with the values of a whole one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.partitioned import build_as_one_of

pytestmark = pytest.mark.distributed
ARCHITECTURES = ("decllm", "redllm", "entp", "ared")


def differing_parameters(precision: str) -> dict[str, list[str]]:
    """By architecture, parameters whose first values depend on how the model was made."""
    import deepspeed
    import torch

    from models.config import named
    from models.registry import build
    from pipeline import distributed, engine
    from tests.distributed.parity import Case, run_config

    distributed.start(timeout_seconds=60, threads=1)
    found = {}
    for arch in ARCHITECTURES:
        case = Case(arch, 3, micro_batch=1, precision=precision)

        def make(arch: str = arch) -> torch.nn.Module:
            torch.manual_seed(3)
            return build(named(arch, "nano", vocab_size=515))

        whole = dict(make().named_parameters())
        config = run_config(case, Path(), 2)
        sliced = engine.build_model(make, config, case.deepspeed_file())
        assert all(p.numel() == 0 for p in sliced.parameters())
        found[arch] = []
        for name, parameter in sliced.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if not torch.equal(parameter, whole[name].to(parameter.dtype)):
                    found[arch].append(name)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_slices_hold_the_values_of_a_model_made_whole(precision: str) -> None:
    for found in run_ranks(differing_parameters, 3, precision):
        assert found == {arch: [] for arch in ARCHITECTURES}


def test_a_rank_of_64_holds_a_64th_and_never_a_whole_model() -> None:
    built = build_as_one_of(64, "decllm", "tiny", precision="fp32", draw=True)
    assert built.slices == built.expected
    assert built.whole / 64 <= built.slices < built.whole / 60
    # In fp32 the master is as large as the parameter's own slice.
    assert built.masters == built.expected


@pytest.mark.soak
@pytest.mark.parametrize(("ranks", "share"), [(1, 0.000714), (64, 0.0424), (1024, 0.678)])
def test_row_and_column_means_are_whole_on_every_rank(ranks: int, share: float) -> None:
    """Against AdamW's moments, of which a rank holds a slice, they are more the more ranks."""
    built = build_as_one_of(
        *(ranks, "decllm", "150m"),
        **{"precision": "fp32", "draw": False, "optimizer": "adafactor", "factored": True},
        beta1=0.0,
    )
    found = built.states / (2 * built.slices)
    print(f"{ranks} ranks: {built.states:,} bytes, {found:.4%} of AdamW's {2 * built.slices:,}")
    assert found == pytest.approx(share, rel=0.01)


@pytest.mark.soak
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_8b_builds_in_slices(arch: str) -> None:
    # In fp32, where a parameter's slice and its master are of one size.
    built = build_as_one_of(64, arch, "8b", precision="fp32", draw=False)
    assert built.whole > 26e9
    assert built.slices == built.masters == built.expected
    # Slices, their gradients, buckets, and a few parameters whole while they are made.
    assert built.peak < 2 * built.slices + 3 * built.largest + 300e6
    assert built.peak < built.whole / 8
    print(f"{arch} 8b: {built.slices:,} bytes of {built.whole:,}, peak {built.peak:,}")
