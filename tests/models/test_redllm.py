"""RedLLM against an implementation of a few lines: loops over heads and rows, complex rotation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import models.redllm
from models.batch import Batch
from models.rotary import rotary_tables

EPS = 1e-6


def rms(x, gain=None):
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    return x if gain is None else x * gain.weight


def turned(x, positions):
    """[tokens, k] turned by its positions."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    pairs = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones(()), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def attend(module, x, y, x_positions, y_positions, *, causal=False):
    """One row: x [t, d] attends to y [s, d]; both normed already."""
    heads, k, where = module.num_heads, module.head_dim, module.output_norm
    q, key, v = x @ module.query.weight.T, y @ module.key.weight.T, y @ module.value.weight.T
    results = []
    for h in range(heads):
        part = slice(h * k, (h + 1) * k)
        shared = h // (heads // module.num_kv_heads)  # the key and value that this head reads
        kv = slice(shared * k, (shared + 1) * k)
        scores = turned(rms(q[:, part]), x_positions) @ turned(rms(key[:, kv]), y_positions).T
        scores = scores / k**0.5
        if causal:
            scores = scores.masked_fill(x_positions[:, None] < y_positions, -torch.inf)
        results.append(scores.softmax(-1) @ rms(v[:, kv]))
    # RedLLM's norm of the result
    results = [rms(result) if where == "head" else result for result in results]
    joined = torch.cat(results, -1)
    joined = (rms(joined) if where == "model" else joined) @ module.output.weight.T
    return rms(joined) if where == "output" else joined


def feed_forward(block, x):
    y, part = rms(x, block.feed_forward_norm), block.feed_forward
    return x + (F.silu(y @ part.gate.weight.T) * (y @ part.up.weight.T)) @ part.down.weight.T


def encode_row(model, ids):
    x = model.embedding.weight[ids] * 4.0  # √16
    positions = torch.arange(len(ids)).double()
    for block in model.encoder:
        y = rms(x, block.attention_norm)
        x = x + attend(block.attention, y, y, positions, positions)
        x = feed_forward(block, x)
    return rms(x, model.encoder_norm) if model.config.encoder_final_norm else x


def decode_row(model, ids, source, shift=0.0):
    x = model.embedding.weight[ids] * 4.0
    source_positions = shift + torch.arange(len(source)).double()
    positions = shift + len(source) + torch.arange(len(ids)).double()
    for block in model.decoder:

        def itself(x, block=block):
            y = rms(x, block.attention_norm)
            return x + attend(block.attention, y, y, positions, positions, causal=True)

        def crossed(x, block=block):
            y = rms(x, block.cross_attention_norm)
            return x + attend(block.cross_attention, y, source, positions, source_positions)

        if model.config.merged_attention:
            y = rms(x, block.attention_norm)
            both, all_positions = torch.cat([source, y]), torch.cat([source_positions, positions])
            x = x + attend(block.attention, y, both, positions, all_positions, causal=True)
        elif model.config.cross_attention_first:
            x = itself(crossed(x))
        else:
            x = crossed(itself(x))
        x = feed_forward(block, x)
    return rms(x, model.final_norm)


CHOICES = {
    "as published": {},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
    "grouped otherwise in cross-attention": {"num_kv_heads": 1, "num_cross_kv_heads": 2},
    "one head in cross-attention": {"num_cross_heads": 1},
    "more heads in cross-attention": {"num_cross_heads": 4, "num_kv_heads": 1},
    "cross-attention first": {"cross_attention_first": True},
    "merged": {"merged_attention": True},
    "merged and grouped": {"merged_attention": True, "num_kv_heads": 1},
    "norm of all heads": {"attention_output_norm": "model"},
    "norm after the output": {"attention_output_norm": "output"},
    "no norm of the result": {"attention_output_norm": "none", "encoder_final_norm": False},
}


@pytest.fixture(params=list(CHOICES))
def case(make_model, make_batch, request):
    model = make_model("redllm", num_layers=2, num_encoder_layers=3, **CHOICES[request.param])
    return model, make_batch("redllm")


def test_encoder_equals_a_few_lines(case):
    model, batch = case
    source = model.encode(batch.encoder_ids, batch.encoder_mask)
    for row, length in enumerate(source.lengths.tolist()):
        expected = encode_row(model, batch.encoder_ids[row, :length])
        torch.testing.assert_close(source.hidden[row, :length], expected)


@pytest.mark.parametrize("number", [0, 1])
def test_cross_attention_alone_equals_its_formula(make_model, number):
    """Every head by one einsum, outside of any block: queries behind, keys of a source of another
    length, turned by their own positions; nothing is masked."""
    model = make_model("redllm", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
    attention, config = model.decoder[number].cross_attention, model.config
    x, source = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    places = torch.arange(5.0) + 7, torch.arange(7.0)

    def heads(module, y, count):
        return rms((y @ module.weight.T).unflatten(-1, (count, 4)))

    def turn(y, positions):
        angles = positions[:, None, None] * torch.tensor([1.0, 10_000.0**-0.5])
        a, b = y.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    q = turn(heads(attention.query, x, 4), places[0])
    k = turn(heads(attention.key, source, 2), places[1]).repeat_interleave(2, 2)
    v = heads(attention.value, source, 2).repeat_interleave(2, 2)
    shares = (torch.einsum("bthk,bshk->bhts", q, k) / 2).softmax(-1)
    mixed = rms(torch.einsum("bhts,bshk->bthk", shares, v))  # RedLLM's norm of the result
    expected = mixed.flatten(2) @ attention.output.weight.T
    tables = [rotary_tables(p.long(), config, x.dtype) for p in places]
    found = attention(x, source, rotary=tables[0], source_rotary=tables[1])
    torch.testing.assert_close(found, expected)


def test_decoder_and_cross_attention_equal_a_few_lines(case):
    model, batch = case
    hidden = model.hidden_states(batch)
    for row, length in enumerate(batch.encoder_mask.sum(1).tolist()):
        source = encode_row(model, batch.encoder_ids[row, :length])
        expected = decode_row(model, batch.input_ids[row], source)
        torch.testing.assert_close(hidden[row], expected)


def test_gradients_equal_those_of_a_few_lines(case, gradients):
    model, batch = case
    found = gradients(model, batch, 0.0)
    loss = torch.zeros(())
    for row, length in enumerate(batch.encoder_mask.sum(1).tolist()):
        source = encode_row(model, batch.encoder_ids[row, :length])
        logits = decode_row(model, batch.input_ids[row], source) @ model.embedding.weight.T
        nll = F.cross_entropy(logits, batch.targets[row], reduction="none")
        loss = loss + (nll * batch.loss_mask[row]).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(tuple(found.values()), expected)


def test_an_unmasked_encoder_is_one_whose_tokens_are_all_real(case):
    model, batch = case
    full = dataclasses.replace(batch, encoder_mask=torch.ones_like(batch.encoder_mask))
    none = dataclasses.replace(batch, encoder_mask=None)
    torch.testing.assert_close(model.hidden_states(full), model.hidden_states(none))


def test_positions_are_relative_and_continuous(case, monkeypatch):
    """Shifting every position changes nothing; shifting the decoder's alone does."""
    model, batch = case
    expected = model.hidden_states(batch)

    def shifted(by_encoder, by_decoder):
        def tables(positions, config, dtype, head_dim=None):
            # Only the decoder's own positions differ from row to row.
            shift = by_encoder if positions.dim() == 1 else by_decoder
            return rotary_tables(positions + shift, config, dtype, head_dim)

        monkeypatch.setattr(models.redllm, "rotary_tables", tables)
        return model.hidden_states(batch)

    torch.testing.assert_close(shifted(100, 100), expected)
    assert (shifted(0, 1) - expected).abs().max() > 1e-3


def test_encoder_padding_is_never_read(case):
    model, batch = case
    expected = model.token_nll(batch)
    ids = torch.where(batch.encoder_mask, batch.encoder_ids, 39)
    longer = Batch(
        batch.input_ids,
        batch.targets,
        batch.loss_mask,
        F.pad(ids, (0, 4), value=3),
        F.pad(batch.encoder_mask, (0, 4)),
    )
    torch.testing.assert_close(model.token_nll(longer), expected)


def test_an_empty_source_is_read_as_nothing_whatever_its_padding(case, gradients):
    model, batch = case
    empty = dataclasses.replace(batch, encoder_mask=torch.zeros_like(batch.encoder_mask))
    other = dataclasses.replace(empty, encoder_ids=(batch.encoder_ids + 1) % 40)
    torch.testing.assert_close(model.token_nll(empty), model.token_nll(other))
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, empty).values())


@pytest.mark.parametrize("restart", [True, False])
def test_documents_equal_each_alone(case, gradients, restart):
    """Three documents lie across a row's source and target, one of them in the target alone and
    one in the source alone; every loss is that of its own document by itself."""
    model, _ = case
    model.config = dataclasses.replace(model.config, restart_positions=restart)
    ids, source = torch.randint(40, (1, 10)), torch.randint(40, (1, 9))
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 4, 4, 4]])
    source_documents = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2]])  # the last two are padding
    real = torch.tensor([[True] * 7 + [False] * 2])
    batch = Batch(
        ids,
        ids.roll(-1, 1),
        torch.ones(1, 10, dtype=torch.bool),
        source,
        real,
        document_ids=documents,
        encoder_document_ids=source_documents,
    )
    alone = []
    for document in (1, 2, 4):
        mine, theirs = documents[0] == document, (source_documents[0] == document) & real[0]
        given = theirs if theirs.any() else torch.arange(9) == 0
        rows = (batch.input_ids, batch.targets, batch.loss_mask)
        present = torch.full((1, int(given.sum())), bool(theirs.any()))
        alone.append(Batch(*(x[:, mine] for x in rows), source[:, given], present))
    if not restart:
        # Through the row, documents' encoder and decoder parts lie further apart than alone.
        far = torch.cat([model.token_nll(part) for part in alone], 1)
        assert (model.token_nll(batch) - far).abs()[0, :7].max() > 1e-3
        torch.testing.assert_close(model.token_nll(batch)[0, 7:], far[0, 7:])  # no encoder part
        return
    expected = torch.cat([model.token_nll(part) for part in alone], 1)
    torch.testing.assert_close(model.token_nll(batch), expected)
    found = {name: gradient.clone() for name, gradient in gradients(model, batch).items()}
    summed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in alone:
        for name, gradient in gradients(model, part).items():
            summed[name] += gradient
    torch.testing.assert_close(found, summed)


def test_the_decoder_is_causal_and_sees_the_whole_source(case):
    model, batch = case
    for changed, unchanged in ((0, 0), (3, 3), (8, 8)):
        ids = batch.input_ids.clone()
        ids[:, changed] = (ids[:, changed] + 1) % 40
        other = model.hidden_states(dataclasses.replace(batch, input_ids=ids))
        difference = (other - model.hidden_states(batch)).abs().sum(-1)
        assert (difference[:, :unchanged] == 0).all()
        assert (difference[:, changed:] > 0).all()
    ids = batch.encoder_ids.clone()
    ids[:, 0] = (ids[:, 0] + 1) % 40
    other = model.hidden_states(dataclasses.replace(batch, encoder_ids=ids))
    assert ((other - model.hidden_states(batch)).abs().sum(-1) > 0).all()


def test_every_encoder_position_reaches_every_encoder_state_and_every_logit(case):
    """By gradient: attention inside the encoder and on it looks both ways."""
    model, batch = case
    embedded, encoded = [], []
    model.embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    model.encoder_norm.register_forward_hook(lambda module, args, out: encoded.append(out))
    logits = model.logits(dataclasses.replace(batch, encoder_mask=None))
    read = embedded[0]  # the encoder's comes first
    assert read.shape[:2] == encoded[0].shape[:2] == batch.encoder_ids.shape
    for results in (encoded[0], logits):
        for t in range(results.shape[1]):
            direction = torch.randn_like(results[:, t])
            (gradient,) = torch.autograd.grad(results[:, t], read, direction, retain_graph=True)
            assert (gradient.abs().sum(-1) > 1e-9).all(), t


def test_needs_a_source(case, make_batch):
    with pytest.raises(ValueError, match="encoder_ids"):
        case[0](make_batch("decllm"))


@pytest.mark.parametrize(
    ("field", "words"),
    [("document_ids", "give encoder_document_ids"), ("prefix_lengths", "means nothing to redllm")],
)
def test_a_field_that_would_be_ignored_is_refused(case, field, words):
    model, batch = case
    given = dataclasses.replace(batch, **{field: torch.zeros_like(batch.input_ids)})
    with pytest.raises(ValueError, match=words):
        model(given)
