"""Training with every optimizer gives the numbers of whole parameters in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.parity import CLIP, Case, largest_difference, too_large, trained
from tests.distributed.plain_optim import RECIPES, SLOW_ADAM, Recipe, muon
from tests.distributed.plain_training import plain

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
STEPS = 4
# Masks that make gradients of several sizes: Muon's updates feel how one step is clipped beside
# another, and would not feel that all were by as much.
UNEVEN = 4
# torch's Muon iterates in bf16 and rounds elsewhere than DeepSpeed's.
TORCH_MUON = Recipe(
    "muon", (*SLOW_ADAM, ("ns_method", "standard")), lambda m: muon(m, "torch", 0.5)
)


def test_every_optimizer_equals_whole_parameters_in_one_process(shards_dir: Path) -> None:
    whole, factored, stepped = (RECIPES[name] for name in ("adafactor", "factored", "muon"))
    groups: list[tuple[Recipe, list[Case]]] = [
        (
            whole,
            [whole.case("decllm", 1), whole.case("decllm", 3, micro_batch=2, offload="optimizer")],
        ),
        (
            factored,
            [
                factored.case("decllm", 0),
                factored.case("decllm", 2, offload="optimizer"),
                factored.case("decllm", 3),
            ],
        ),
        (
            stepped,
            [
                stepped.case("decllm", 0, mask_seed=UNEVEN),
                stepped.case("decllm", 1, mask_seed=UNEVEN),
                stepped.case("decllm", 1, mask_seed=UNEVEN, micro_batch=2, offload="optimizer"),
                stepped.case("decllm", 2, mask_seed=UNEVEN, micro_batch=2),
                stepped.case("decllm", 3, mask_seed=UNEVEN, micro_batch=2),
                stepped.case("decllm", 3, mask_seed=UNEVEN, offload="optimizer"),
            ],
        ),
        (TORCH_MUON, [TORCH_MUON.case("decllm", 3, grad_clip=0.0)]),
    ]
    cases = [case for _, mine in groups for case in mine]
    curves = iter(trained(cases, shards_dir, STEPS, 2))
    expected, found = {}, {}
    for recipe, mine in groups:
        right = plain(mine[0], shards_dir, STEPS, recipe.make)
        expected[recipe] = right
        tolerance = 10 * TOLERANCE if recipe is TORCH_MUON else TOLERANCE
        for case in mine:
            found[str(case)] = largest_difference(next(curves), right) / tolerance
    print(found)
    assert not too_large(found, 1.0)
    # The rules are not each other: what was compared could have differed.
    assert largest_difference(expected[whole], expected[factored]) > 1e-3
    assert largest_difference(expected[whole], expected[TORCH_MUON]) > 1e-3
    assert min(step["norm"] for step in expected[stepped]) > CLIP
    free = stepped.case("decllm", mask_seed=UNEVEN, grad_clip=0.0)
    unclipped = plain(free, shards_dir, STEPS, stepped.make)
    assert largest_difference(expected[stepped], unclipped) > 1e-3
