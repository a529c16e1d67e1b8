"""What every architecture promises a trainer."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from models.batch import Batch
from models.config import named
from models.registry import build


def padded(batch, extra):
    """The same batch with `extra` unscored positions at the right end of what it holds."""
    own = ("input_ids", "targets", "loss_mask", "document_ids")
    source = ("encoder_ids", "encoder_mask", "encoder_document_ids")
    fields = {name: getattr(batch, name) for name in own + source}
    if batch.encoder_ids is not None and batch.encoder_mask is None:
        fields["encoder_mask"] = torch.ones_like(batch.encoder_ids, dtype=torch.bool)
    longer = {name: F.pad(x, (0, extra)) for name, x in fields.items() if x is not None}
    return dataclasses.replace(batch, **longer)


def test_chunks_sum_to_the_whole(arch, make_model, make_batch):
    model, batch = make_model(arch, entp_chunk_pairs=30), make_batch(arch)
    sums = [sum(parts) for parts in zip(*model.loss_chunks(batch, 0.01), strict=True)]
    torch.testing.assert_close(sums, list(model(batch, 0.01)))
    assert not sums[1].requires_grad
    assert not sums[2].requires_grad


def test_nll_is_the_cross_entropy_of_the_logits(arch, make_model, make_batch):
    model, batch = make_model(arch), make_batch(arch)
    logits = model.logits(batch)
    assert logits.shape == (*batch.targets.shape, model.config.vocab_size)
    nll = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    found = model.token_nll(batch)
    assert found.dtype == torch.float32
    assert (found[~batch.loss_mask] == 0).all()
    torch.testing.assert_close(
        found[batch.loss_mask], nll[batch.loss_mask].float(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(model(batch).nll, nll[batch.loss_mask].sum())
    z = logits.logsumexp(-1)[batch.loss_mask].square().sum()
    torch.testing.assert_close(model(batch).z, z)
    with_z, without = model(batch, 0.5).objective, model(batch).objective
    torch.testing.assert_close(with_z - without, 0.5 * z)


def test_padding_changes_nothing(arch, make_model, make_batch, gradients):
    model, batch = make_model(arch), make_batch(arch)
    expected = {name: g.clone() for name, g in gradients(model, batch).items()}
    torch.testing.assert_close(gradients(model, padded(batch, 5)), expected)
    by_token = model.token_nll(padded(batch, 5))
    torch.testing.assert_close(by_token[:, :9], model.token_nll(batch))


def test_rows_do_not_see_each_other(arch, make_model, make_batch):
    model, batch = make_model(arch), make_batch(arch)
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    alone = Batch(**{name: None if x is None else x[1:2] for name, x in fields.items()})
    torch.testing.assert_close(model.token_nll(alone), model.token_nll(batch)[1:2])


def test_weights_scale_each_targets_part_of_the_objective_alone(arch, make_model, make_batch):
    model, batch = make_model(arch), make_batch(arch)
    weights = torch.rand(batch.targets.shape)
    weighted = dataclasses.replace(batch, loss_weights=weights)
    parts = []
    for row, column in batch.loss_mask.nonzero().tolist():
        one = torch.zeros_like(batch.loss_mask)
        one[row, column] = True
        alone = model(dataclasses.replace(batch, loss_mask=one), 0.01).objective
        parts.append(alone * weights[row, column])
    terms, plain = model(weighted, 0.01), model(batch, 0.01)
    torch.testing.assert_close(terms.objective, sum(parts))
    torch.testing.assert_close(terms[1:], plain[1:])


@pytest.mark.parametrize("field", ["encoder_ids", "encoder_mask", "encoder_document_ids"])
@pytest.mark.parametrize("single", ["decllm", "entp", "ared"])
def test_what_is_meant_for_an_encoder_is_refused_by_a_single_stack(
    make_model, make_batch, single, field
):
    batch = make_batch(single)
    given = dataclasses.replace(batch, **{field: torch.ones_like(batch.input_ids)})
    for use in (make_model(single), make_model(single).token_nll):
        with pytest.raises(ValueError, match=f"{field}: means nothing to {single}"):
            use(given)


def test_which_modules_are_called_depends_on_shapes_alone(arch, make_model, make_batch):
    """ZeRO-3 gathers each module's parameters on all ranks together: where one rank has nothing to
    score and another everything, both must call the same modules in the same order."""
    for changes in ({}, {"entp_causal_layers": 1}, {"entp_sampled_prefixes": 2}):
        mine = changes if arch == "entp" else {}
        model = make_model(arch, num_layers=3, entp_chunk_pairs=15, **mine)
        calls: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name, calls=calls: calls.append(name))
        batch = make_batch(arch, seq_len=12, scored=1.0)
        masks = [torch.zeros_like(batch.loss_mask), batch.loss_mask, torch.rand(3, 12) < 0.2]
        masks += [torch.arange(12).expand(3, 12) >= 9, torch.arange(3)[:, None].expand(3, 12) < 1]
        found = []
        for mask in masks:
            calls.clear()
            masked = dataclasses.replace(batch, loss_mask=mask)
            model.token_nll(masked)
            for terms in model.loss_chunks(masked):
                terms.objective.backward()
            found.append([*calls])
        assert all(one == found[0] for one in found)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_runs_under_autocast(arch, make_model, make_batch, gradients, positions):
    """Loss and gradients are within what bf16 products cost."""
    changes = {"positions": positions, "positional_subtraction": False} if arch == "ared" else {}
    if arch == "entp" and positions == "rotary":
        changes = {"positions": "rotary", "qkv_norm": True, "feed_forward": "swiglu"}
    model, batch = make_model(arch, spread=0.1, entp_chunk_pairs=60, **changes), make_batch(arch)
    exact = {name: g.clone() for name, g in gradients(model, batch).items()}
    nll = model.token_nll(batch)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, batch)
        torch.testing.assert_close(model.token_nll(batch), nll, rtol=0.02, atol=0.05)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    errors = torch.stack([(found[name] - exact[name]).norm() for name in exact])
    assert errors.norm() < 0.03 * torch.stack([g.norm() for g in exact.values()]).norm()


def test_every_parameter_has_a_gradient(arch, make_model, make_batch, gradients):
    for scored in (0.0, 0.7):
        batch = make_batch(arch, scored=scored)
        for name, gradient in gradients(make_model(arch, bias=True), batch).items():
            assert gradient is not None, name
            # A key's bias moves all of a query's scores together, which no softmax sees; and a
            # norm of the embedding loss sees the encoder's output only.
            if scored and not name.endswith("key.bias"):
                assert gradient.abs().sum() > 0, name


def test_the_tied_matrix_learns_as_input_and_as_output(arch, make_model, make_batch, gradients):
    model, batch = make_model(arch, embedding_loss="none"), make_batch(arch)
    found = gradients(model, batch, 0.0)["embedding.weight"]
    tied = model.embedding.weight
    step = 1e-6 * torch.randn_like(tied)
    with torch.no_grad():
        tied += step
        up = model(batch).objective
        tied -= 2 * step
        down = model(batch).objective
    torch.testing.assert_close((up - down) / 2, (found * step).sum(), rtol=1e-5, atol=1e-12)
    assert sum(p.numel() == tied.numel() for p in model.parameters()) == 1


def test_recomputation_changes_no_gradient(arch, make_model, make_batch, gradients):
    model, batch = make_model(arch, dropout=0.2), make_batch(arch)
    again = make_model(arch, dropout=0.2, activation_checkpointing=True)
    again.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    expected = gradients(model, batch)
    torch.manual_seed(1)
    torch.testing.assert_close(gradients(again, batch), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_lower_precision_is_near_float64(arch, make_model, make_batch, gradients, dtype, tolerance):
    """The loss and each gradient by itself; one that is naught but rounding, a key bias's, by the
    largest."""
    model, batch = make_model(arch, spread=0.1, num_kv_heads=1), make_batch(arch)
    sums, exact = [x.detach() for x in model(batch, 0.01)[:3]], gradients(model, batch)
    exact = {name: g.clone() for name, g in exact.items()}
    floor = 1e-3 * max(g.norm() for g in exact.values())
    found = gradients(model.to(dtype), batch)
    low = model(batch, 0.01)
    assert low.nll.dtype == torch.float32
    low_sums = [x.double() for x in low[:3]]
    torch.testing.assert_close(low_sums, sums, rtol=tolerance, atol=0)
    for name, gradient in found.items():
        error = (gradient.double() - exact[name]).norm()
        assert error <= tolerance * max(exact[name].norm(), floor), name


def test_same_seed_same_model_and_no_other_randomness(arch):
    first, second = [], []
    for into in (first, second):
        torch.manual_seed(3)
        into += [p.detach().clone() for p in build(named(arch, "nano", 50)).parameters()]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_first_logits_are_of_unit_scale_whatever_the_width(arch, make_batch):
    for size in ("nano", "small"):
        model = build(named(arch, size, 40, max_seq_len=16))
        logits = model.logits(make_batch(arch))
        assert 0.5 < float(logits.detach().std()) < 2.5


def test_a_step_against_the_gradient_lowers_the_loss(arch, make_batch, gradients):
    model, batch = build(named(arch, "nano", 40, max_seq_len=16)), make_batch(arch)
    before = sum(float(t.objective.detach()) for t in model.loss_chunks(batch, 0.01))
    found = gradients(model, batch)
    norm = sum(float(g.square().sum()) for g in found.values()) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.01 / norm * found[name]
    after = sum(float(t.objective.detach()) for t in model.loss_chunks(batch, 0.01))
    assert after - before == pytest.approx(-0.01 * norm, rel=0.1)


def test_a_batch_moves_between_devices(arch, make_batch):
    batch = make_batch(arch)
    moved = batch.to("meta")
    for field in dataclasses.fields(batch):
        original, copy = getattr(batch, field.name), getattr(moved, field.name)
        assert (original is None) == (copy is None)
        assert copy is None or copy.device.type == "meta"
