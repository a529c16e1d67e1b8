"""The hand-written activations against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from models import activations
from models.activations import gelu, swiglu


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gelu_is_the_tanh_form(block, dtype, monkeypatch):
    monkeypatch.setattr(activations, "_BLOCK", block)
    x = torch.cat([3 * torch.randn(50), torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4])]).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(55, dtype=dtype)
    found, expected = gelu(ours), F.gelu(theirs, approximate="tanh")
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gelu_of_a_transposed_tensor():
    x = torch.randn(5, 7).T
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"))


def test_swiglu():
    gate, up = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
