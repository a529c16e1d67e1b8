"""RunConfig: impossible runs are refused before any work, all mistakes at once."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import RunConfig
from pipeline.config_checks import batch_problems, fit_micro_batch
from pipeline.config_file import load_with_file
from pipeline.optim.recipe import deepspeed_problems
from pipeline.optim.schedule import Schedule
from pipeline.options import UserError

BASE = {
    "run_dir": "r",
    "data": "d",
    "arch": "decllm",
    "size": "nano",
    "steps": 10,
    "global_batch": 12,
    "ds_config": "ds_configs/cpu.json",
}


def load_flags(**changes: object) -> RunConfig:
    argv = [f"--{key}={value}" for key, value in {**BASE, **changes}.items()]
    return load_with_file(RunConfig, argv, "pretrain.py")


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**BASE, "lr": 0.5, "model": {"dropout": 0.1, "num_layers": 3}}))
    argv = ["--config", str(file), "--lr=1e-3", "--model.num_layers=5", "--local_rank=1"]
    config = load_with_file(RunConfig, argv, "pretrain.py")
    assert config.lr == 1e-3
    assert config.model == {"dropout": 0.1, "num_layers": "5"}


def test_yaml_that_reads_a_number_as_text(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    lines = [f"{key}: {value}" for key, value in BASE.items()]
    file.write_text("\n".join([*lines, "lr: 1e-3", "weights: {c4: 1e-1}", "shuffle_window: 4"]))
    config = load_with_file(RunConfig, ["--config", str(file)], "pretrain.py")
    assert (config.lr, config.weights, config.shuffle_window) == (1e-3, {"c4": 0.1}, 4)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"arch": "gpt"}, "arch='gpt': not one of the choices"),
        ({"size": "giant"}, "size='giant'"),
        ({"prefix_len": 64, "seq_len": 64}, "prefix_len=64: leaves no prefix or no target"),
        ({"arch": "redllm", "objective": "causal"}, "objective='causal': redllm needs a prefix"),
        ({"arch": "entp", "objective": "prefix"}, "objective='prefix': entp reads causally"),
        ({"arch": "ared", "objective": "denoise"}, "objective='denoise': ared reads causally"),
        ({"denoisers": "R=1"}, "denoisers={'R': 1.0}: only for objective=denoise"),
        ({"objective": "denoise", "denoisers": "Q=1"}, "denoisers.Q=1.0: no denoiser"),
        ({"objective": "denoise", "denoisers": "R=0"}, "denoisers={'R': 0.0}: not shares"),
        ({"warmup_steps": 11}, "warmup_steps=11: longer than the run"),
        ({"beta2": 1}, "beta2=1.0: not a decay"),
        ({"factored": "true"}, "factored=True: adamw has none; give optimizer=adafactor"),
        ({"optimizer": "adafactor", "beta2": 0.9}, "beta2=0.9: adafactor has none"),
        ({"optimizer": "lion"}, "optimizer='lion': not one of the choices"),
        ({"decay_steps": 2}, "decay_steps=2: schedule=cosine has none; give schedule=wsd"),
        (
            {"schedule": "wsd", "decay_steps": 10},
            "decay_steps=10: with warmup_steps=0 and a step at the peak longer than the run; give "
            "at most 9",
        ),
        ({"schedule": "wsd", "warmup_steps": 8, "decay_steps": 2}, "give at most 1"),
        ({"schedule": "wsd", "warmup_steps": 9}, "leaves no step at the peak and one of decay"),
        ({"schedule": "wsd", "steps": 1}, "warmup_steps=0 of steps=1 leaves no step"),
        (
            {"schedule": "constant", "final_lr_fraction": 0.5},
            "final_lr_fraction=0.5: schedule=constant has none; give schedule=cosine, linear or",
        ),
        ({"schedule": "inverse_sqrt", "final_lr_fraction": 0}, "schedule=inverse_sqrt has none"),
        ({"schedule": "linear", "decay_shape": "sqrt"}, "decay_shape='sqrt': schedule=linear has"),
        ({"shuffle_window": "some"}, "shuffle_window='some': not a window"),
        ({"weight_stages.x": "a=1"}, "weight_stages.x: not a sample number"),
        ({"weight_stages.9": "a=0"}, "weight_stages.9={'a': 0.0}: give none below zero"),
        ({"arch": "entp", "document_masks": "true"}, "document_masks=True: entp has no mask"),
        (
            {"document_masks": "true", "objective": "random_prefix"},
            "objective=random_prefix cuts samples",
        ),
        ({"bidirectional_inputs": "true"}, "bidirectional_inputs=True: only for finetuning"),
        ({"steps": 0}, "steps='0': too small"),
        ({"learning_rate": 1}, "learning_rate='1': not an option"),
        ({"micro_batch": 0}, "micro_batch='0': too small; give at least 1"),
        ({"run_dir": ""}, "run_dir='': empty; give a path"),
        ({"config": "nowhere.yaml"}, "config='nowhere.yaml': No such file"),
    ],
)
def test_a_mistake_is_one_line_with_the_field(changes: dict[str, object], part: str) -> None:
    with pytest.raises(UserError) as caught:
        load_flags(**changes)
    assert part in str(caught.value)


def test_a_wsd_run_may_be_a_warm_up_a_step_at_the_peak_and_a_decay() -> None:
    rates = Schedule.of(load_flags(schedule="wsd", warmup_steps=7, decay_steps=2, lr=1))
    assert [rates(step) for step in (6, 7, 8, 9)] == pytest.approx([7 / 8, 1, 0.55, 0.1])


@given(st.integers(1, 512), st.integers(1, 16), st.integers(1, 16))
def test_a_batch_is_refused_exactly_when_it_does_not_divide(
    batch: int, world_size: int, micro_batch: int
) -> None:
    told = dataclasses.replace(load_flags(), global_batch=batch, micro_batch=micro_batch)

    def refused(ranks: int = world_size, **changes: int) -> list[str]:
        return list(batch_problems(dataclasses.replace(told, **changes), ranks))

    problems = refused()
    assert bool(problems) == bool(batch % (world_size * micro_batch))
    if not problems:
        return
    (text,) = problems
    # Each remedy would be accepted, and it is the nearest.
    for proposed in named_numbers(r"global_batch (\d+)(?: or (\d+))?", text):
        assert abs(proposed - batch) < world_size * micro_batch
        assert not refused(global_batch=proposed)
    smaller = named_numbers(r"give micro_batch (\d+)", text)
    assert bool(smaller) == (batch % world_size == 0)
    for size in smaller:
        assert not refused(micro_batch=size)
        assert all(refused(micro_batch=other) for other in range(size + 1, micro_batch))
    counts = named_numbers(r"such as (\d+)(?: or (\d+))?", text)
    assert bool(counts) == (batch % world_size != 0)
    for count in counts:
        between = range(min(count, world_size) + 1, max(count, world_size))
        assert not refused(count, micro_batch=1)
        assert all(refused(other, micro_batch=1) for other in between)


def named_numbers(pattern: str, text: str) -> list[int]:
    """The numbers that `text` names where `pattern` matches."""
    found = re.search(pattern, text)
    return [int(number) for number in found.groups() if number] if found else []


@given(st.integers(1, 512), st.integers(1, 16), st.none() | st.integers(1, 16))
def test_a_run_that_has_begun_is_cut_finer_where_its_micro_batch_does_not_divide(
    batch: int, world_size: int, micro_batch: int | None
) -> None:
    told = dataclasses.replace(load_flags(), global_batch=batch, micro_batch=micro_batch)
    fitted, said = fit_micro_batch(told, world_size)
    before, after = (list(batch_problems(each, world_size)) for each in (told, fitted))
    if batch % world_size or not before:
        assert (fitted, said, after) == (told, "", before)
        return
    assert not after
    size = fitted.micro_batch
    assert micro_batch is not None
    assert size is not None
    assert size < micro_batch
    assert all(batch % (world_size * other) for other in range(size + 1, micro_batch + 1))
    assert fitted == dataclasses.replace(told, micro_batch=size)
    assert f"micro_batch={micro_batch}:" in said
    assert said.endswith(f"it goes on with {size}")


@pytest.mark.parametrize(
    ("optimizer", "lr", "beta1", "weight_decay", "grad_clip"),
    [
        ("adamw", 1e-3, 0.9, 0.1, 1.0),
        ("adafactor", 0.01, 0.0, 0.0, 1.0),
        ("muon", 0.02, 0.9, 0.1, 0.0),
    ],
)
def test_what_depends_on_the_optimizer(
    optimizer: str, lr: float, beta1: float, weight_decay: float, grad_clip: float
) -> None:
    found = load_flags(optimizer=optimizer)
    assert (found.lr, found.beta1) == (lr, beta1)
    assert (found.weight_decay, found.grad_clip) == (weight_decay, grad_clip)
    assert load_flags(optimizer=optimizer, lr=0.5, weight_decay=0.3).lr == 0.5


def test_what_muon_cannot_do_is_refused() -> None:
    settings = {"zero_optimization": {"stage": 3, "reduce_scatter": True}}
    (said,) = deepspeed_problems(load_flags(optimizer="muon"), settings)
    assert "reduce_scatter=true: muon needs whole gradients" in said
    assert not list(deepspeed_problems(load_flags(), settings))
    for stage in (0, 1, 2, 3):
        settings = {"zero_optimization": {"stage": stage}}
        assert not list(deepspeed_problems(load_flags(optimizer="muon"), settings))


def test_the_papers_recipe_is_a_line_away() -> None:
    """arXiv 2510.26622, table 2(c); what it leaves open is T5X's default."""
    found = load_flags(optimizer="adafactor", warmup_steps=2000, steps=400_000)
    assert (found.lr, found.factored, found.decay_rate, found.beta1) == (0.01, False, 0.8, 0)
    assert (found.clipping_threshold, found.multiply_by_parameter_scale) == (1.0, True)
    assert (found.schedule, found.final_lr_fraction, found.weight_decay) == ("cosine", 0.1, 0)
    assert (found.grad_clip, found.z_loss) == (1.0, 1e-4)
