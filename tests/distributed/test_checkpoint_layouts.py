"""One state, any layout: saved on some number of ranks at some ZeRO stage, the same on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import run_ranks

pytestmark = pytest.mark.distributed
SEQUENCE, BATCH, VOCABULARY = 16, 6, 97
# Fields of the run by the name that the tests use.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {"optimizer": "adafactor"},
    "adafactor_with_momentum": {"optimizer": "adafactor", "beta1": 0.9},
    "factored": {
        **{"optimizer": "adafactor", "factored": True, "min_dim_size_to_factor": 32},
        **{"beta1": 0.9, "weight_decay": 0.1},
    },
    "muon": {"optimizer": "muon"},
}


def engine_at(stage: int, optimizer: str, precision: str, seed: int, **settings: Any) -> Any:
    """The engine of a nano DecLLM, its weights drawn from `seed`; `settings` are DeepSpeed's."""
    import torch

    from models.config import named
    from models.registry import build
    from pipeline.config import RunConfig
    from pipeline.engine import build_engine
    from pipeline.optim.build import bind_optimizer, build_optimizer
    from pipeline.options import load

    config = load(
        RunConfig,
        {
            **dict.fromkeys(("run_dir", "data", "ds_config"), "none"),
            **{"arch": "decllm", "size": "nano", "steps": 9, "global_batch": BATCH},
            **OPTIMIZERS[optimizer],
            "precision": precision,
        },
    )
    zero: dict[str, Any] = {"stage": stage, **settings.pop("zero", {})}
    if stage:
        zero["reduce_bucket_size"] = 20_000
    if stage == 3:
        zero |= {"sub_group_size": 20_000, "stage3_param_persistence_threshold": 100}
    torch.manual_seed(seed)
    engine = build_engine(
        lambda: build(named("decllm", "nano", VOCABULARY, max_seq_len=SEQUENCE)),
        lambda model: build_optimizer(model, config),
        config,
        {"zero_optimization": zero, **settings},
    )
    bind_optimizer(engine)
    return engine


def train(engine: Any, steps: range) -> list[float]:
    """Losses of these steps; the global batch of a step is the same for any number of ranks."""
    import torch
    import torch.distributed as dist

    from pipeline.engine import backward, step
    from pipeline.objectives import causal

    found = []
    rank, world = dist.get_rank(), dist.get_world_size()
    each = BATCH // world
    for number in steps:
        drawn = torch.Generator().manual_seed(number)
        ids = torch.randint(3, VOCABULARY, (BATCH, SEQUENCE), generator=drawn)
        mine = ids[rank * each : (rank + 1) * each]
        terms = engine.module(causal(mine, torch.full((each,), SEQUENCE), 1))
        backward(engine, terms.objective / mine.numel())
        step(engine)
        total = terms.nll.double()
        dist.all_reduce(total)
        found.append(float(total) / ids.numel())
    return found


def first_leg(target: Path, stage: int, optimizer: str, precision: str) -> list[float]:
    """On this rank: train three steps, save, train three more."""
    from pipeline import checkpoint, distributed

    world = distributed.start(timeout_seconds=60, threads=1)
    engine = engine_at(stage, optimizer, precision, seed=0)
    losses = train(engine, range(3))
    checkpoint.save(engine, target, world, {"step": 3})
    return losses + train(engine, range(3, 6))


def other_legs(
    legs: list[tuple[Path, Path, int]], optimizer: str, precision: str
) -> list[list[float]]:
    """On this rank: load each source at a stage, save it at once, then train on."""
    from pipeline import checkpoint, distributed

    world = distributed.start(timeout_seconds=60, threads=1)
    found = []
    for number, (source, target, stage) in enumerate(legs):
        engine = engine_at(stage, optimizer, precision, seed=number + 1)
        state = checkpoint.load(engine, source / "step_3", world)
        assert state["step"] == 3
        checkpoint.save(engine, target, world, {"step": 3})
        found.append(train(engine, range(3, 6)))
        engine.destroy()
    return found


def check_every_layout(
    folder: Path, worlds: dict[int, tuple[int, ...]], optimizer: str, precision: str, rel: float
) -> None:
    """From stage 3 on 2 ranks through the stages of each world size, one leg from another, back."""
    from pipeline.checkpointing.folder import digest, read_state

    origin = folder / "origin"
    whole = run_ranks(first_leg, 2, origin, 3, optimizer, precision)[0]
    expected, scalars = digest(origin / "step_3"), read_state(origin / "step_3")["optimizer"]
    assert any(key.startswith("optimizer/") for key in expected)
    source = origin
    for world_size, stages in worlds.items():
        legs = []
        for stage in stages:
            legs.append((source, folder / f"{world_size}-{stage}", stage))
            source = legs[-1][1]
        found = run_ranks(other_legs, world_size, legs, optimizer, precision, timeout=240)[0]
        for (_, target, _), losses in zip(legs, found, strict=True):
            assert digest(target / "step_3") == expected
            assert read_state(target / "step_3")["optimizer"] == scalars
            assert losses == pytest.approx(whole[3:], rel=rel)
    # Back at the first layout, after every other, bit for bit.
    back = [(source, folder / "back", 3)]
    assert run_ranks(other_legs, 2, back, optimizer, precision)[0][0] == whole[3:]


def test_other_ranks_and_stages_hold_the_same_state_and_go_on_alike(tmp_path: Path) -> None:
    check_every_layout(tmp_path, {3: (2, 0)}, "adamw", "fp32", 1e-5)


@pytest.mark.parametrize(
    ("optimizer", "worlds"),
    [
        ("factored", {1: (1,)}),
        ("muon", {3: (2, 1)}),
    ],
)
def test_so_do_other_optimizers(
    optimizer: str, worlds: dict[int, tuple[int, ...]], tmp_path: Path
) -> None:
    check_every_layout(tmp_path, worlds, optimizer, "fp32", 1e-5)


def two_legs_of_one_layout(
    target: Path, stage: int, optimizer: str, precision: str, zero: dict[str, Any]
) -> list[list[float]]:
    """On this rank: three steps, a save, three more; those again, and then without what `zero` says
    of where states are."""
    from pipeline import checkpoint, distributed

    world = distributed.start(timeout_seconds=60, threads=1)
    engine = engine_at(stage, optimizer, precision, 0, zero=dict(zero))
    train(engine, range(3))
    checkpoint.save(engine, target, world, {"step": 3})
    found = [train(engine, range(3, 6))]
    for seed, changes in enumerate((zero, {}), start=1):
        engine = engine_at(stage, optimizer, precision, seed, zero=dict(changes))
        checkpoint.load(engine, target / "step_3", world)
        checkpoint.save(engine, target / f"again-{seed}", world, {"step": 3})
        found.append(train(engine, range(3, 6)))
    return found


def check_offloaded(
    folder: Path, stage: int, optimizer: str, precision: str, zero: dict[str, Any], rel: float
) -> None:
    """What was saved from CPU memory is loaded into it, and out of it, as it was."""
    from pipeline.checkpointing.folder import digest, read_state

    asked = (folder, stage, optimizer, precision, zero)
    whole, offloaded, not_offloaded = run_ranks(two_legs_of_one_layout, 2, *asked)[0]
    assert offloaded == whole
    assert not_offloaded == pytest.approx(whole, rel=rel)
    saved = folder / "step_3"
    assert any(key.startswith("optimizer/") for key in digest(saved))
    for seed in (1, 2):
        again = folder / f"again-{seed}" / "step_3"
        assert digest(again) == digest(saved)
        assert read_state(again)["optimizer"] == read_state(saved)["optimizer"]


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def test_states_in_cpu_memory_are_saved_and_loaded_alike(tmp_path: Path) -> None:
    check_offloaded(tmp_path, 3, "factored", "fp32", OFFLOAD, 1e-5)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("optimizer", "stage"),
    [("adamw", 1), ("factored", 2), ("adafactor", 3), ("muon", 2), ("muon", 3)],
)
def test_so_are_masters_of_bf16_in_cpu_memory(optimizer: str, stage: int, tmp_path: Path) -> None:
    """At stage 3 with the parameters there too."""
    zero = OFFLOAD | ({"offload_param": {"device": "cpu"}} if stage == 3 else {})
    check_offloaded(tmp_path, stage, optimizer, "bf16", zero, 2e-2)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("stage", "optimizer", "precision"),
    [
        (0, "adamw", "fp32"),
        (0, "factored", "fp32"),
        (1, "muon", "fp32"),
        (1, "factored", "bf16"),
        (2, "adafactor_with_momentum", "fp32"),
        (2, "muon", "bf16"),
    ],
)
def test_the_same_layout_goes_on_bit_for_bit_at_every_stage(
    stage: int, optimizer: str, precision: str, tmp_path: Path
) -> None:
    check_offloaded(tmp_path, stage, optimizer, precision, {}, 0)


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_ranks_and_stages(optimizer: str, tmp_path: Path) -> None:
    worlds = {1: (0, 2), 2: (1, 2), 3: (3, 1)}
    check_every_layout(tmp_path, worlds, optimizer, "fp32", 1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_do_masters_of_bf16(optimizer: str, tmp_path: Path) -> None:
    check_every_layout(tmp_path, {1: (3,), 3: (1, 2)}, optimizer, "bf16", 2e-2)
