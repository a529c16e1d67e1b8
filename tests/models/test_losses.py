"""The chunked loss against the formula it stands for, and what it must never hold or compute."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models import head_rows, losses
from models.losses import linear_cross_entropy, linear_token_nll
from tests.models.live_storages import LiveStorages


def plain(hidden, weight, targets, mask, z_loss, weights=None):
    """The formula, with all logits."""
    logits = (hidden @ weight.T)[mask]
    nll = F.cross_entropy(logits, targets[mask], reduction="none")
    z = logits.logsumexp(-1).square()
    factors = 1 if weights is None else weights[mask]
    everywhere = F.cross_entropy((hidden @ weight.T).transpose(1, 2), targets, reduction="none")
    row_nll = (everywhere * mask).sum(1)
    return (factors * (nll + z_loss * z)).sum(), nll.sum(), z.sum(), row_nll


def inputs(batch, seq, width, vocab, scored, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, seq, width, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(vocab, (batch, seq), generator=generator)
    mask = torch.rand(batch, seq, generator=generator) < scored
    return hidden, weight, targets, mask


def cut_small(patch):
    """Chunks of 16 rows, and the vocabulary in blocks of 20."""
    patch.setattr(head_rows, "CPU_ROWS", 16)
    patch.setattr(head_rows, "CPU_ELEMENTS", 1)
    patch.setattr(head_rows, "CPU_VOCABULARY", 20)


@pytest.mark.parametrize("wrong", [-100, -1, 7, 9000])
def test_a_scored_target_that_is_no_token_is_refused(wrong):
    hidden, weight, targets, mask = inputs(2, 3, 4, 7, 1.0, 0)
    targets[1, 2] = wrong
    for loss in (linear_cross_entropy, linear_token_nll):
        with pytest.raises(ValueError, match=f"targets={wrong}: .*vocab_size=7"):
            loss(hidden, weight, targets, mask)
    mask[1, 2] = False
    assert torch.isfinite(linear_cross_entropy(hidden, weight, targets, mask).objective)
    assert linear_token_nll(hidden, weight, targets, mask)[1, 2] == 0


def test_on_a_device_that_nobody_waits_for_the_device_itself_asserts(monkeypatch):
    """No value is read back: a meta tensor has none."""
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", asserted.append)
    losses._check_targets(torch.zeros(3, dtype=torch.int64, device="meta"), 7)
    assert [tuple(x.shape) for x in asserted] == [()]


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    seq=st.integers(1, 30),
    width=st.integers(1, 9),
    vocab=st.integers(1, 50),
    scored=st.sampled_from([0.0, 0.3, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.5]),
    weighted=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_value_and_gradient_equal_the_formula(
    batch, seq, width, vocab, scored, z_loss, weighted, seed
):
    with pytest.MonkeyPatch.context() as patch:
        cut_small(patch)
        hidden, weight, targets, mask = inputs(batch, seq, width, vocab, scored, seed)
        weights = torch.rand(batch, seq, dtype=torch.float64) * 2 if weighted else None
        terms = linear_cross_entropy(hidden, weight, targets, mask, z_loss, weights)
        found = torch.autograd.grad(3 * terms.objective, (hidden, weight))
        objective, nll, z, row_nll = plain(hidden, weight, targets, mask, z_loss, weights)
        expected = torch.autograd.grad(3 * objective, (hidden, weight))
        torch.testing.assert_close(tuple(terms), (objective, nll, z, row_nll))
        torch.testing.assert_close(found, expected)
        assert not terms.nll.requires_grad
        assert not terms.z.requires_grad
        assert not terms.row_nll.requires_grad
        by_token = linear_token_nll(hidden, weight, targets, mask)
        assert by_token.dtype == torch.float32
        assert (by_token[~mask] == 0).all()
        torch.testing.assert_close(by_token.double().sum(), nll, rtol=1e-5, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return result


def test_never_holds_the_logits(monkeypatch):
    cut_small(monkeypatch)
    hidden, weight, targets, mask = inputs(2, 100, 4, 300, 1.0, 0)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, weight, targets, mask, 1e-4).objective.backward()
    assert seen.elements <= 300 * 4  # the weight; 16 rows at once, where all logits are 60,000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_one_part_of_the_logits_lives_at_a_time(monkeypatch, dtype, needs_grad):
    """In fp32, and in bf16 with the product they are made of, however many parts there are."""
    monkeypatch.setattr(head_rows, "CPU_ROWS", 64)
    monkeypatch.setattr(head_rows, "CPU_ELEMENTS", 1)
    hidden, weight, targets, mask = inputs(2, 160, 2, 2000, 1.0, 0, dtype)
    with torch.set_grad_enabled(needs_grad), LiveStorages() as live:
        linear_cross_entropy(hidden, weight, targets, mask)
        if not needs_grad:
            linear_token_nll(hidden, weight, targets, mask)
    of_logit = 4 if dtype == torch.float32 else 6
    assert live.peak < 1.2 * 64 * 2000 * of_logit


def test_float32_is_within_1e_5_of_the_formula_in_float64(monkeypatch):
    """Loss, and each gradient as a whole, in parts and blocks; with weights and z-loss."""
    cut_small(monkeypatch)
    hidden, weight, targets, mask = inputs(3, 40, 16, 90, 0.7, 0, torch.float32)
    weights = torch.rand(3, 40)
    terms = linear_cross_entropy(hidden, weight, targets, mask, 0.01, weights)
    found = torch.autograd.grad(terms.objective, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    sums = plain(*exact, targets, mask, 0.01, weights.double())
    for ours, expected in zip(terms, sums, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-6, atol=0)
    for ours, expected in zip(found, torch.autograd.grad(sums[0], exact), strict=True):
        assert (ours.double() - expected).norm() < 1e-5 * expected.norm()


def test_one_loss_is_not_back_propagated_twice():
    hidden, weight, targets, mask = inputs(1, 4, 2, 8, 1.0, 0)
    objective = linear_cross_entropy(hidden, weight, targets, mask).objective
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="back-propagated before"):
        objective.backward()


def test_one_side_may_be_frozen():
    hidden, weight, targets, mask = inputs(2, 5, 4, 9, 0.7, 0)
    both = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets, mask).objective, (hidden, weight)
    )
    for side, expected in zip((0, 1), both, strict=True):
        parts = [part if i == side else part.detach() for i, part in enumerate((hidden, weight))]
        objective = linear_cross_entropy(*parts, targets, mask).objective
        torch.testing.assert_close(torch.autograd.grad(objective, parts[side])[0], expected)


def test_unscored_rows_cost_nothing():
    hidden, weight, targets, mask = inputs(2, 50, 8, 64, 0.2, 0)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets, mask).objective.backward()
    assert counter.get_total_flops() == 3 * 2 * int(mask.sum()) * 8 * 64


def test_no_gradient_is_computed_when_none_is_wanted():
    hidden, weight, targets, mask = inputs(1, 20, 8, 64, 1.0, 0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets, mask)
    assert counter.get_total_flops() == 2 * 20 * 8 * 64


def test_bfloat16_sums_in_float32():
    hidden, weight, targets, mask = inputs(2, 64, 16, 128, 1.0, 0, torch.bfloat16)
    terms = linear_cross_entropy(hidden, weight, targets, mask, 1e-2)
    terms.objective.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    objective, *_ = plain(*exact, targets, mask, 1e-2)
    objective.backward()
    assert terms.nll.dtype == torch.float32
    torch.testing.assert_close(terms.objective.double(), objective, rtol=1e-2, atol=0)
    for ours, theirs in zip((hidden.grad, weight.grad), (x.grad for x in exact), strict=True):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_large_logits_do_not_overflow():
    hidden = torch.full((1, 2, 1), 1e4, dtype=torch.float32, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], dtype=torch.float32, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    terms = linear_cross_entropy(hidden, weight, torch.tensor([[0, 1]]), mask)
    terms.objective.backward()
    assert terms.nll.item() == pytest.approx(2e4)
    assert torch.isfinite(hidden.grad).all()
