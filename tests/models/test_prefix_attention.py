"""Attention in all prefixes at once against attention in each."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from models.prefix_attention import (
    Prefixes,
    at_pairs,
    full_attention,
    scaled_scores,
)
from models.prefix_scan import Scan


def shared_attention(scores, values, first, weights=None, cuts=()):
    """All prefixes from the one that ends at token `first`, a run between each two of the `cuts`;
    with `weights`, each run's sum under them is back-propagated in its turn."""
    scan = Scan(values.flatten(2), scores, values, first)
    parts = [range(*pair) for pair in itertools.pairwise([first, *cuts, values.shape[1]])]
    found, high = [], sum(t + 1 for part in parts for t in part)
    for run in scan.runs(parts):
        found.append(run.at_pairs(None)[1])
        if weights is not None:
            low = high - len(found[-1])
            (found[-1] * weights[low:high]).sum().backward()
            high = low
    return torch.cat(found[::-1])


@pytest.mark.parametrize("cuts", [(), (4,), (3, 5, 6, 7, 8)])
@pytest.mark.parametrize("size", [10.0, 300.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pass_over_keys_survives_any_scores(size, dtype, cuts):
    """Late keys that outweigh early ones by e^3000 neither overflow nor erase early prefixes."""
    scores = (size * torch.randn(2, 3, 9, 9, dtype=torch.float64)).requires_grad_()
    values = torch.randn(2, 9, 3, 4, dtype=torch.float64, requires_grad=True)
    prefixes = Prefixes(tuple(range(3, 10)), scores.device)
    weights = torch.randn(len(prefixes.tokens), 2, 3, 4, dtype=torch.float64)
    parts = [
        (scores[:, :, :n, :n].softmax(-1) @ values[:, :n].transpose(1, 2)).permute(2, 0, 1, 3)
        for n in range(3, 10)
    ]
    expected = torch.cat(parts)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (scores, values))
    ours = [x.detach().to(dtype).requires_grad_() for x in (scores, values)]
    found = shared_attention(*ours, 2, weights.to(dtype), cuts)
    gradient = [x.grad for x in ours]
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    # float32 rounds the scores themselves, by up to size·4 / 2²⁴.
    tolerance *= max(1.0, size / 10 if dtype == torch.float32 else size / 1000)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(gradient, expected_gradients, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=10 * tolerance)


def test_packed_attention_is_attention_in_each_prefix():
    prefixes = Prefixes((2, 3, 4), torch.device("cpu"))
    q, k, v = (torch.randn(9, 2, 3, 4) for _ in range(3))
    found = full_attention(q, k, v, prefixes)
    for low, high in ((0, 2), (2, 5), (5, 9)):
        scores = torch.einsum("tbhk,sbhk->bhts", q[low:high], k[low:high]) / 2
        expected = torch.einsum("bhts,sbhk->tbhk", scores.softmax(-1), v[low:high])
        torch.testing.assert_close(found[low:high], expected)


def test_bfloat16_does_not_err_more_the_longer_a_prefix_is():
    """256 keys; no worse than torch's attention in each prefix, gradients included."""
    prefixes = Prefixes(tuple(range(1, 257)), torch.device("cpu"))
    inputs = [torch.randn(1, 256, 2, 8).bfloat16() for _ in range(3)]
    weights = torch.randn(len(prefixes.tokens), 1, 2, 8).bfloat16()

    def results(dtype, attention):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        out = attention(q, k, v)
        return [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), (q, k, v))]

    def ours(q, k, v):
        return shared_attention(scaled_scores(q, k), v, 0)

    def each(q, k, v):
        parts = [[x[:, :n].transpose(1, 2) for x in (q, k, v)] for n in prefixes.lengths]
        attended = [F.scaled_dot_product_attention(*part).permute(2, 0, 1, 3) for part in parts]
        return torch.cat(attended)

    exact = results(torch.float64, each)
    found, plain = results(torch.bfloat16, ours), results(torch.bfloat16, each)
    for one, other, truth in zip(found, plain, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - truth).norm() < 1.1 * (other.double() - truth).norm()
        assert (one.double() - truth).norm() < 4e-3 * truth.norm()


@pytest.mark.parametrize("lengths", [(1, 2, 3, 4), (2, 5)])
def test_tokens_at_pairs_are_an_index(lengths):
    prefixes = Prefixes(lengths, torch.device("cpu"))
    tokens = torch.randn(lengths[-1], 2, 3, requires_grad=True)
    assert torch.equal(at_pairs(tokens, prefixes), tokens[prefixes.tokens])
    assert torch.autograd.gradcheck(lambda x: at_pairs(x, prefixes), tokens)


def test_a_tokens_gradient_in_bfloat16_counts_every_prefix():
    """1 + 1 + … stops at 256 where each sum is rounded."""
    prefixes = Prefixes(tuple(range(1, 401)), torch.device("cpu"))
    tokens = torch.randn(400, 1, dtype=torch.bfloat16, requires_grad=True)
    at_pairs(tokens, prefixes).sum().backward()
    assert tokens.grad[0] == 400


def test_what_inference_mode_has_cached_serves_a_backward_pass():
    lengths = (3, 4, 5, 6, 7)  # no other test's: nothing of them is cached
    with torch.inference_mode():
        inside = Prefixes(lengths, torch.device("cpu"))
        assert not inside.tokens.is_inference()
        assert not inside.ends.is_inference()
    again = Prefixes(lengths, torch.device("cpu"))
    x = torch.randn(25, 2, requires_grad=True)
    x[again.ends].sum().backward()
    assert x.grad.sum() == 10
