"""ARED against an implementation of a few lines, and each published switch."""

import pytest
import torch
import torch.nn.functional as F


def normed(module, x):
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-5)


def attend(module, x, y):
    """Causal attention of x [t, d] to y [t, d], a loop over heads."""
    k = module.head_dim
    later = torch.ones(len(x), len(y)).triu(1).bool()
    results = []
    for h in range(module.num_heads):
        part = slice(h * k, (h + 1) * k)
        q, key, v = (
            z @ m.weight[part].T for z, m in ((x, module.query), (y, module.key), (y, module.value))
        )
        scores = (q @ key.T / k**0.5).masked_fill(later, -torch.inf)
        results.append(scores.softmax(-1) @ v)
    return torch.cat(results, -1) @ module.output.weight.T


def feed_forward(block, x):
    y = normed(block.feed_forward_norm, x) @ block.feed_forward.up.weight.T
    return x + F.gelu(y, approximate="tanh") @ block.feed_forward.down.weight.T


def states(model, ids):
    """Embedded input, encoder output and final state of one row."""
    positions = model.position_embedding.weight
    embedded = model.embedding.weight[ids] + positions[: len(ids)]
    x = embedded
    for block in model.encoder:
        y = normed(block.attention_norm, x)
        x = feed_forward(block, x + attend(block.attention, y, y))
    encoded, x = x, x @ model.bridge.weight.T
    for block in model.decoder:
        y = normed(block.attention_norm, x)
        x = x + attend(block.attention, y, y)
        source = normed(block.source_norm, encoded)
        y = normed(block.cross_attention_norm, x)
        x = feed_forward(block, x + attend(block.cross_attention, y, source))
    x = normed(model.final_norm, x)
    if model.config.positional_subtraction:
        x = x - positions[1 : len(ids) + 1]
    return embedded, encoded, x


@pytest.mark.parametrize("subtraction", [True, False])
def test_equals_a_few_lines(make_model, make_batch, subtraction):
    model = make_model("ared", num_encoder_layers=2, positional_subtraction=subtraction)
    assert model.config.cross_heads == 4
    batch = make_batch("ared")
    hidden = model.hidden_states(batch)
    for row, ids in enumerate(batch.input_ids):
        torch.testing.assert_close(hidden[row], states(model, ids)[2])


@pytest.mark.parametrize("kind", ["mse", "cosine", "log_cosine"])
@pytest.mark.parametrize("affine", [True, False])
def test_embedding_loss_equals_its_formula(make_model, make_batch, kind, affine):
    """Coefficient times the mean over scored positions, in the scale of a sum over targets."""
    switches = {"embedding_loss": kind, "embedding_loss_affine": affine}
    model = make_model("ared", **switches, embedding_loss_coefficient=5.0)
    batch = make_batch("ared")
    expected = torch.zeros(())
    for row, ids in enumerate(batch.input_ids):
        embedded, encoded, _ = states(model, ids)
        for t in range(len(ids)):
            if not batch.loss_mask[row, t]:
                continue
            a, b = (
                normed(model.encoded_norm, encoded[t]),
                normed(model.mean_norm, embedded[: t + 1]),
            )
            b = b.mean(0)
            cosine = (F.cosine_similarity(a, b, dim=0) + 1) / 2
            formulas = {"mse": (a - b).square().mean(), "cosine": 1 - cosine}
            expected = expected + 5 * (formulas | {"log_cosine": -cosine.log()})[kind]
    terms = model(batch, 0.01)
    torch.testing.assert_close(terms.objective - terms.nll - 0.01 * terms.z, expected)
    sums = model.token_nll(batch).double().sum()
    torch.testing.assert_close(sums, terms.nll, rtol=1e-5, atol=1e-5)


def test_embedding_loss_leaves_the_encoder_alone(make_model, make_batch):
    model, batch = make_model("ared"), make_batch("ared")
    embedded, encoded, _ = model._states(batch.input_ids)
    loss = model.embedding_loss(embedded, encoded).sum()
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    reached = {name for name, gradient in zip(names, found, strict=True) if gradient is not None}
    norms = {
        f"{norm}.{part}" for norm in ("mean_norm", "encoded_norm") for part in ("weight", "bias")
    }
    assert reached == {"embedding.weight", "position_embedding.weight"} | norms


def test_causal_by_gradient(make_model, make_batch):
    model, batch = make_model("ared"), make_batch("ared", batch_size=2, seq_len=6)
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    hidden = model.hidden_states(batch)
    for t in range(6):
        (gradient,) = torch.autograd.grad(hidden[:, t].sum(), embedded[0], retain_graph=True)
        assert (gradient.abs().sum((0, 2)) > 0).tolist() == [s <= t for s in range(6)]


def test_subtraction_needs_a_row_past_the_last_position(make_model, make_batch):
    model = make_model("ared", max_seq_len=9)
    assert model.position_embedding.weight.shape == (10, 16)
    assert torch.isfinite(model(make_batch("ared", seq_len=9)).objective)
    with pytest.raises(ValueError, match="max_seq_len=9"):
        model(make_batch("ared", seq_len=10))
