"""Adafactor over whole parameters and over simulated shards, against the plain one."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.optim.adafactor import Adafactor
from pipeline.optim.pieces import Factors, blocks, runs
from pipeline.optim.recipe import factored_dims
from pipeline.zero_layout import Fragment
from tests.pipeline.optim.plain_adafactor import PlainAdafactor, Rule, every_rule, two_largest

SHAPES = [(12, 9), (9, 12), (5,), (3, 12, 9), (12, 3, 9), (1, 20), (10, 10, 10), ()]
RULES = [*every_rule(min_dim_size_to_factor=9), Rule(decay_rate=0.6, clipping_threshold=2.0)]


def draw(shapes: list[tuple[int, ...]], steps: int) -> tuple[list[torch.Tensor], list]:
    """Parameters of very different sizes, and gradients for each step, in fp64."""
    generator = torch.Generator().manual_seed(1)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = [normal(shape) * 10.0 ** (i - 4) for i, shape in enumerate(shapes)]
    gradients = [[normal(s) * (2 * normal(s)).exp() for s in shapes] for _ in range(steps)]
    return params, gradients


@pytest.mark.parametrize("rule", RULES)
def test_whole_parameters_in_fp64(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pieces smaller than most parameters, so that what crosses their borders is seen.
    monkeypatch.setattr("pipeline.optim.shard.CPU_PIECE", 50)
    params, gradients = draw(SHAPES, 6)
    plain = PlainAdafactor([p.clone() for p in params], rule)
    ours = [p.clone().requires_grad_() for p in params]
    optimizer = Adafactor(ours, 0.02, **asdict(rule))
    for step in gradients:
        plain.step(0.02, step)
        for p, g in zip(ours, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for found, expected in zip(ours, plain.parameters, strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-11, atol=0)


def test_groups_keep_their_own_settings() -> None:
    params, gradients = draw(SHAPES[:4], 3)
    expected = [p.clone() for p in params]
    for part, lr, decay in ((slice(0, 2), 0.1, 0.5), (slice(2, 4), 0.01, 0.0)):
        plain = PlainAdafactor(expected[part], Rule(weight_decay=decay))
        for step in gradients:
            plain.step(lr, step[part])
    groups = [
        {"params": params[:2], "lr": 0.1, "weight_decay": 0.5},
        {"params": params[2:], "lr": 0.01},
    ]
    optimizer = Adafactor(groups)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()
    torch.testing.assert_close(params, expected, rtol=1e-11, atol=0)


def test_a_flat_tensor_is_of_one_kind() -> None:
    params, _ = draw(SHAPES, 0)
    optimizer = Adafactor(params, factored=True, min_dim_size_to_factor=9)
    kinds = [
        {factored_dims(p.shape, 9) is not None for p in g["params"]} for g in optimizer.param_groups
    ]
    assert sorted(map(list, kinds)) == [[False], [True]]
    flat = torch.zeros(113)
    mixed = [
        Fragment("a", torch.Size((12, 9)), flat, 0, 0, 108, replicated=True),
        Fragment("b", torch.Size((5,)), flat, 108, 0, 5, replicated=True),
    ]
    with pytest.raises(RuntimeError, match="mixes factored and other parameters"):
        optimizer.bind(mixed)


@given(st.lists(st.integers(1, 6), max_size=4), st.integers(1, 7))
def test_the_dimensions_factored_are_the_two_largest(shape: list[int], minimum: int) -> None:
    found = factored_dims(shape, minimum)
    expected = two_largest(shape, minimum)
    assert (found and set(found)) == (expected and set(expected))


SHAPE = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(lambda s: torch.Size(s))


@given(st.lists(SHAPE, min_size=1, max_size=6), st.integers(1, 40), st.data())
def test_runs_hold_every_element_once(shapes: list[torch.Size], most: int, data) -> None:
    offset, fragments = 0, []
    for shape in shapes:
        offset += data.draw(st.integers(0, 3))
        length = data.draw(st.integers(0, shape.numel()))
        fragments.append(Fragment("", shape, torch.empty(0), offset, 0, length))
        offset += length
    owner = torch.full((offset,), -1)
    found = list(runs(fragments, most))
    for piece in found:
        assert piece.end > piece.begin
        for index, begin, end in piece.parts:
            assert piece.begin <= begin < end <= piece.end
            assert end - begin <= most
            assert (owner[begin:end] == -1).all()
            owner[begin:end] = index
    expected = torch.full((offset,), -1)
    for index, f in enumerate(fragments):
        expected[f.offset : f.offset + f.length] = index
    assert owner.tolist() == expected.tolist()


@given(
    st.lists(st.integers(2, 7), min_size=2, max_size=4).map(lambda s: torch.Size(s)),
    st.integers(1, 60),
    st.data(),
)
def test_blocks_sum_and_scale_as_the_whole_does(shape: torch.Size, most: int, data) -> None:
    dims = factored_dims(shape, 2)
    assert dims is not None
    p, q = dims
    # Its statistics lie behind those of others.
    factors = Factors(shape, dims, 2, 3)
    cuts = sorted(data.draw(st.lists(st.integers(0, shape.numel()), max_size=3)))
    borders = [0, *cuts, shape.numel()]
    x = torch.randn(shape, dtype=torch.float64)
    row_sums, column_sums = torch.zeros(2 + factors.num_rows), torch.zeros(3 + factors.num_columns)
    row_sums, column_sums = row_sums.double(), column_sums.double()
    row, column = torch.randn_like(row_sums), torch.randn_like(column_sums)
    scaled = x.flatten().clone()
    for begin, end in pairwise(borders):
        fragment = Fragment("", shape, torch.empty(0), begin, begin, end - begin)
        for block in blocks(0, fragment, factors, most):
            assert block.end - block.begin <= max(most, shape[-1])
            block.add_sums(block.of(x.flatten()), row_sums, column_sums)
            block.scale_(block.of(scaled), row, column)
    torch.testing.assert_close(factors.rows_of(row_sums), x.sum(q))
    torch.testing.assert_close(factors.columns_of(column_sums), x.sum(p))
    assert not row_sums[:2].any()
    assert not column_sums[:3].any()
    whole = x * factors.rows_of(row).unsqueeze(q) * factors.columns_of(column).unsqueeze(p)
    torch.testing.assert_close(scaled.view(shape), whole)


def test_the_factored_state_is_at_most_a_hundredth_of_adamws() -> None:
    from models.config import named
    from models.registry import build
    from tests.pipeline.optim.memory import state_bytes

    with torch.device("meta"):
        model = build(named("decllm", "150m", vocab_size=32768))
    sizes = {}
    for name, make in {
        "adamw": lambda ps: torch.optim.AdamW(ps, foreach=False, fused=False),
        "unfactored": lambda ps: Adafactor(ps),
        "factored": lambda ps: Adafactor(ps, factored=True),
    }.items():
        sizes[name] = state_bytes(make, model.parameters())
    assert sizes["adamw"] == pytest.approx(8 * sum(p.numel() for p in model.parameters()), rel=1e-6)
    assert sizes["unfactored"] == pytest.approx(sizes["adamw"] / 2, rel=1e-6)
    assert sizes["factored"] <= 0.01 * sizes["adamw"]
