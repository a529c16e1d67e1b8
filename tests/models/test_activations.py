"""The hand-written activations against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from models import activations
from models.activations import gated_linear, gelu_linear, swiglu


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gelu_linear_is_the_tanh_form(block, with_bias, dtype, monkeypatch):
    monkeypatch.setattr(activations, "_BLOCK", block)
    x = torch.cat([3 * torch.randn(49), torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4])])
    ours = [x.view(3, 3, 6), torch.randn(4, 6), torch.randn(4) if with_bias else None]
    ours = [None if x is None else x.to(dtype).requires_grad_() for x in ours]
    theirs = [None if x is None else x.detach().clone().requires_grad_() for x in ours]
    weights = torch.randn(3, 3, 4, dtype=dtype)
    found = gelu_linear(*ours)
    expected = F.linear(F.gelu(theirs[0], approximate="tanh"), *theirs[1:])
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_gelu_linear_of_a_transposed_tensor_and_a_frozen_weight():
    x, weight = torch.randn(5, 7, requires_grad=True), torch.randn(3, 5)
    expected = F.linear(F.gelu(x.T, approximate="tanh"), weight)
    torch.testing.assert_close(gelu_linear(x.T, weight, None), expected)
    assert torch.autograd.gradcheck(lambda x: gelu_linear(x.T, weight, None), x)


def test_gelu_linear_keeps_its_input_alone():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gelu_linear(torch.randn(8, 6, requires_grad=True), torch.randn(3, 6), None)
    assert sorted(x.numel() for x in kept) == [18, 48]


def test_swiglu():
    gate, up = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gated_linear(with_bias):
    gate, up = (torch.randn(2, 4, 6, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 6, requires_grad=True)
    bias = torch.randn(3, requires_grad=True) if with_bias else None
    expected = F.linear(F.silu(gate) * up, weight, bias)
    torch.testing.assert_close(gated_linear(gate, up, weight, bias), expected)
    assert torch.autograd.gradcheck(gated_linear, (gate, up, weight, bias))
    # A frozen weight gets no gradient, and its input still does.
    gated_linear(gate, up, weight.detach(), None).sum().backward()
    assert weight.grad is None
    assert gate.grad is not None


def test_gated_linear_does_not_keep_the_product():
    gate, up = (torch.randn(8, 6, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_linear(gate, up, torch.randn(3, 6), None)
    assert sorted(x.numel() for x in kept) == [18, 48, 48]


def test_gelu_linear_refuses_a_second_derivative():
    x, weight = torch.randn(2, 5, requires_grad=True), torch.randn(3, 5)
    (slope,) = torch.autograd.grad(
        gelu_linear(x, weight, None).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_compiled_gelu_linear_is_torchs_two_operations():
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    x, weight = torch.randn(9, 5), torch.randn(3, 5)
    compiled = torch.compile(gelu_linear, backend=backend, fullgraph=True)
    expected = F.linear(F.gelu(x, approximate="tanh"), weight)
    torch.testing.assert_close(compiled(x, weight, None), expected)
    assert len([node for node in graphs[0].graph.nodes if node.op == "call_function"]) == 2


def test_gated_linear_of_transposed_tensors():
    gate, up = (torch.randn(6, 4, 2, requires_grad=True) for _ in range(2))
    weight = torch.randn(3, 6, requires_grad=True)
    turned = gate.transpose(0, 2), up.transpose(0, 2)
    expected = F.linear(F.silu(turned[0]) * turned[1], weight)
    torch.testing.assert_close(gated_linear(*turned, weight, None), expected)
    assert torch.autograd.gradcheck(
        lambda g, u, w: gated_linear(g.transpose(0, 2), u.transpose(0, 2), w, None),
        (gate, up, weight),
    )
