"""ENTP against what it is defined as: a loop that encodes every prefix anew."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.batch import Batch
from models.config import ModelConfig
from models.registry import build
from tests.models.live_storages import LiveStorages
from tests.models.prefix_loop import LLAMA, STYLES, loop_gradients


def check_against_the_loop(model, batch, gradients):
    expected, expected_gradients = loop_gradients(model, batch, 0.01)
    expected_gradients = {name: g.clone() for name, g in expected_gradients.items()}
    totals = [sum(parts) for parts in zip(*model.loss_chunks(batch, 0.01), strict=True)]
    torch.testing.assert_close(totals, list(expected), rtol=1e-10, atol=1e-10)
    for name, gradient in gradients(model, batch).items():
        assert gradient is not None, name
        reference = expected_gradients[name].expand_as(gradient)
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-10, msg=name)
    by_token = model.token_nll(batch)
    assert (by_token[~batch.loss_mask] == 0).all()
    torch.testing.assert_close(by_token.double().sum(), expected.nll, rtol=1e-5, atol=1e-5)


@settings(max_examples=45, deadline=None)
@given(
    style=st.sampled_from(sorted(STYLES)),
    qkv_norm=st.booleans(),
    output_norm=st.sampled_from(["none", "none", "head", "model", "output"]),
    num_layers=st.sampled_from([1, 2, 3, 3, 4]),
    causal_layers=st.sampled_from([0, 0, 0, 1, 2, 3]),
    num_kv_heads=st.sampled_from([1, 2]),
    batch_size=st.integers(1, 4),
    seq_len=st.integers(1, 14),
    chunk_pairs=st.sampled_from([1, 7, 20, 50, 10_000]),
    scored=st.sampled_from([0.0, 0.2, 1.0, 1.0]),
    first_scored=st.sampled_from([0, 0, 0, 1, 5, 11]),
    weighted=st.booleans(),
    checkpointing=st.booleans(),
    seed=st.integers(0, 9999),
)
def test_equals_the_loop_over_prefixes(
    make_model,
    make_batch,
    gradients,
    style,
    qkv_norm,
    output_norm,
    num_layers,
    causal_layers,
    num_kv_heads,
    batch_size,
    seq_len,
    chunk_pairs,
    scored,
    first_scored,
    weighted,
    checkpointing,
    seed,
):
    """Loss and every gradient, to 1e-10 in float64: any depth, style, batch, length and mask."""
    torch.manual_seed(seed)
    model = make_model(
        "entp",
        num_layers=num_layers,
        entp_causal_layers=min(causal_layers, num_layers - 1),
        num_kv_heads=num_kv_heads,
        entp_chunk_pairs=chunk_pairs,
        activation_checkpointing=checkpointing,
        attention_output_norm=output_norm,
        max_seq_len=33,
        **(STYLES[style] | {"qkv_norm": qkv_norm}),
    )
    batch = make_batch("entp", batch_size, seq_len, scored=scored)
    batch.loss_mask[:, :first_scored] = False
    if weighted:
        batch = dataclasses.replace(batch, loss_weights=torch.rand(batch.targets.shape))
    check_against_the_loop(model, batch, gradients)


RARE = {
    "learned positions, normed heads": {"qkv_norm": True},
    "norm of each head": {"attention_output_norm": "head"},
    "norm of all heads": {"attention_output_norm": "model", "entp_causal_layers": 1},
    "norm after the output": LLAMA | {"attention_output_norm": "output"},
}


@pytest.mark.parametrize("choices", RARE.values(), ids=RARE)
def test_rarer_choices_equal_the_loop(make_model, make_batch, gradients, choices):
    """With weights, and of more tokens and chunks than the property draws often."""
    model = make_model("entp", num_layers=3, max_seq_len=33, entp_chunk_pairs=60, **choices)
    batch = make_batch("entp", batch_size=2, seq_len=33)
    batch = dataclasses.replace(batch, loss_weights=torch.rand(batch.targets.shape))
    check_against_the_loop(model, batch, gradients)


def test_reads_no_later_token_by_gradient(make_model, make_batch):
    model, batch = make_model("entp", num_layers=3), make_batch("entp", seq_len=6)
    embedded = []
    model.embedding.register_forward_hook(
        lambda module, args, output: embedded.append(output) if len(args) == 1 else None
    )
    hidden = model.hidden_states(batch)
    for t in range(6):
        (gradient,) = torch.autograd.grad(hidden[:, t].sum(), embedded[0], retain_graph=True)
        reached = gradient.abs().sum((0, 2)) > 0
        assert reached.tolist() == [s <= t for s in range(6)]


@pytest.mark.parametrize("causal_layers", [0, 1])
@pytest.mark.parametrize("style", ["gpt2", "llama"])
def test_no_chunk_reads_a_later_token_by_gradient(make_model, make_batch, style, causal_layers):
    """Of the loss as it is trained, one weighted target at a time; hybrids too."""
    hybrid = {"num_layers": 3, "entp_causal_layers": causal_layers, "entp_chunk_pairs": 10}
    model, batch = (
        make_model("entp", **hybrid, **STYLES[style]),
        make_batch("entp", 3, 6, scored=1.1),
    )
    for t in range(6):
        embedded = []

        def keep(module, args, output, embedded=embedded):
            if len(args) == 1:
                output.retain_grad()
                embedded.append(output)

        hook = model.embedding.register_forward_hook(keep)
        weights = (torch.arange(6) == t).expand(3, 6).double()
        for terms in model.loss_chunks(dataclasses.replace(batch, loss_weights=weights)):
            terms.objective.backward()
        hook.remove()
        reached = sum(F.pad(x.grad.abs().sum((0, 2)), (0, 6 - x.shape[1])) for x in embedded) > 0
        assert reached.tolist() == [s <= t for s in range(6)]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_is_the_decoder_with_one_layer_and_not_with_more(make_model, make_batch, num_layers):
    """The same weights under a causal mask, by name."""
    entp, batch = make_model("entp", num_layers=num_layers), make_batch("entp")
    fields = {f: getattr(entp.config, f) for f in ModelConfig.__dataclass_fields__}
    decoder = build(ModelConfig(**(fields | {"arch": "decllm"})))
    decoder.load_state_dict(entp.state_dict())
    difference = (entp.logits(batch) - decoder.logits(batch)).abs().amax((0, 2))
    assert difference[0] < 1e-10  # one token: no mask can matter
    assert (difference[1:] < 1e-10).all() == (num_layers == 1)
    assert (difference[1:] > 1e-3).all() == (num_layers == 2)


@pytest.mark.parametrize("causal_layers", [0, 1, 2, 3])
def test_a_hybrid_is_the_decoder_when_all_layers_but_one_are_causal(
    make_model, make_batch, gradients, causal_layers
):
    entp = make_model("entp", num_layers=4, entp_causal_layers=causal_layers)
    batch = make_batch("entp")
    fields = {f: getattr(entp.config, f) for f in ModelConfig.__dataclass_fields__}
    decoder = build(ModelConfig(**(fields | {"arch": "decllm", "entp_causal_layers": 0})))
    decoder.load_state_dict(entp.state_dict())
    difference = (entp.logits(batch) - decoder.logits(batch)).abs().amax((0, 2))
    assert (difference[1:] < 1e-10).all() == (causal_layers == 3)
    assert (difference[1:] > 1e-3).all() == (causal_layers < 3)
    if causal_layers == 3:
        torch.testing.assert_close(gradients(entp, batch), gradients(decoder, batch))


@pytest.mark.parametrize("sampled", [1, 3, 4])
@pytest.mark.parametrize("causal_layers", [0, 1])
def test_sampled_prefixes_are_unbiased(
    make_model, make_batch, gradients, monkeypatch, sampled, causal_layers
):
    """The mean over every draw there is equals the whole: of loss, z and every gradient."""
    changes = {"num_layers": 3, "entp_causal_layers": causal_layers, "entp_chunk_pairs": 20}
    model, batch = make_model("entp", **changes), make_batch("entp", seq_len=12)
    few = make_model("entp", entp_sampled_prefixes=sampled, **changes)
    few.load_state_dict(model.state_dict())
    # The scored positions are 0 … 11 as a whole: as many draws as fall between two of a sample.
    batch.loss_mask[:, [0, -1]] = True
    draws = 12 // sampled
    sums, gradient = torch.zeros(2 + 3, dtype=torch.float64), None
    for draw in range(draws):
        monkeypatch.setattr(
            torch, "rand", lambda *a, _u=(draw + 0.5) / draws, **k: torch.tensor(_u)
        )
        terms = zip(*few.loss_chunks(batch), strict=True)
        _, nll, z, row_nll = (sum(parts) for parts in terms)
        sums += torch.stack([nll, z, *row_nll])
        found = {name: g / draws for name, g in gradients(few, batch).items()}
        gradient = found if gradient is None else {n: gradient[n] + g for n, g in found.items()}
    torch.testing.assert_close(gradient, {n: g.clone() for n, g in gradients(model, batch).items()})
    whole = model(batch)
    torch.testing.assert_close(sums / draws, torch.stack([whole.nll, whole.z, *whole.row_nll]))


def test_a_sample_is_torchs_seed_and_evaluation_takes_none(make_model, make_batch):
    model = make_model("entp", num_layers=2, entp_sampled_prefixes=2)
    batch = make_batch("entp", seq_len=12, scored=1.0)

    def estimate(seed):
        torch.manual_seed(seed)
        return float(sum(terms.nll for terms in model.loss_chunks(batch)))

    assert len({estimate(seed) for seed in range(6)}) > 1
    assert estimate(3) == estimate(3)
    everything = make_model("entp", num_layers=2)
    everything.load_state_dict(model.state_dict())
    assert torch.equal(model.token_nll(batch), everything.token_nll(batch))
    torch.testing.assert_close(model(batch).nll, everything(batch).nll)


def test_a_chunk_that_was_not_back_propagated_is_told(make_model, make_batch):
    model = make_model("entp", num_layers=2, entp_chunk_pairs=10)
    *_, last = model.loss_chunks(make_batch("entp"))
    with pytest.raises(RuntimeError, match="before asking for more"):
        last.objective.backward()


def test_the_number_of_chunks_depends_on_shapes_alone(make_model, make_batch):
    for sampled in (0, 3, 50):
        model = make_model("entp", entp_chunk_pairs=30, entp_sampled_prefixes=sampled)
        counts = set()
        for scored in (0.0, 0.1, 1.0):
            batch = make_batch("entp", batch_size=4, seq_len=12, scored=scored)
            counts.add(len(list(model.loss_chunks(batch))))
        assert len(counts) == 1


def kept_bytes(model, batch):
    """The most bytes that autograd keeps for the backward pass of one chunk."""
    most = 0
    for terms in _counting(model.loss_chunks(batch)):
        kept, _ = terms
        most = max(most, kept)
    return most


def _counting(chunks):
    iterator = iter(chunks)
    while True:
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            terms = next(iterator, None)
        if terms is None:
            return
        yield sum(storages.values()), terms


def test_memory_is_bounded_by_the_chunk(make_model, make_batch):
    batch = make_batch("entp", batch_size=4, seq_len=24)
    whole = kept_bytes(make_model("entp", num_layers=3, entp_chunk_pairs=10_000), batch)
    small = kept_bytes(make_model("entp", num_layers=3, entp_chunk_pairs=60), batch)
    assert small < whole / 8


def test_live_memory_is_a_chunk_and_a_square_of_scores(make_model, make_batch):
    """Every byte that lives, the scan's state included, over T with the same chunk."""
    peaks = {}
    for seq_len in (19, 64):
        model = make_model("entp", num_layers=3, max_seq_len=64, entp_chunk_pairs=200).float()
        batch = make_batch("entp", batch_size=1, seq_len=seq_len, scored=1.1)
        with LiveStorages() as live:
            for terms in model.loss_chunks(batch):
                terms.objective.backward()
        peaks[seq_len] = live.peak
    squares = {seq_len: 2 * seq_len**2 * 4 for seq_len in peaks}  # bytes of h·T² scores
    for seq_len, peak in peaks.items():
        assert peak < 1.2 * peaks[19] + 6 * squares[seq_len], peaks


def test_prefixes_before_the_first_scored_one_cost_nothing(make_model, make_batch):
    model, batch = make_model("entp", num_layers=2), make_batch("entp", seq_len=20, scored=1.0)
    everything = kept_bytes(model, batch)
    late = Batch(batch.input_ids, batch.targets, torch.arange(20).expand(3, 20) >= 18)
    assert kept_bytes(model, late) < everything / 3


def test_dropout_falls_on_every_prefix_anew(make_model, make_batch):
    model, batch = make_model("entp", num_layers=2, dropout=0.5), make_batch("entp")
    first, second = (float(sum(t.nll for t in model.loss_chunks(batch))) for _ in range(2))
    assert first != second
    model.eval()
    first, second = (float(sum(t.nll for t in model.loss_chunks(batch))) for _ in range(2))
    assert math.isclose(first, second)
