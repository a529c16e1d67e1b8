"""The table of operations against torch's counter, and each convention against a closed form."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.batch import Batch
from models.config import named
from models.flops import operations, parameters, training_flops
from models.operations import Pass
from models.registry import build
from tests.models.prefix_loop import LLAMA

# Lengths at which some products are large enough for oneDNN.
LARGER = {"decllm": 48, "redllm": 48, "entp": 16, "ared": 48}


@st.composite
def parts(draw, count, total):
    """`total` cut into `count` lengths, some of which may be 0."""
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=count - 1, max_size=count - 1)))
    return tuple(b - a for a, b in itertools.pairwise([0, *cuts, total]))


@settings(max_examples=45, deadline=None)
@given(data=st.data())
def test_hardware_equals_the_counter_to_the_last_flop(data):
    """Random shapes, depths, masks, recomputation and ENTP variants."""
    draw = data.draw
    arch = draw(st.sampled_from(["decllm", "redllm", "entp", "ared"]))
    sampled = 0
    heads, head_dim = draw(st.sampled_from([(2, 4), (4, 2), (3, 6)]))
    changes = {
        "d_model": draw(st.integers(2, 20)),
        "d_ffn": draw(st.integers(1, 30)),
        "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([1, heads])),
        "head_dim": head_dim,
        "num_layers": draw(st.integers(1, 3)),
        "max_seq_len": 16,
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "activation_checkpointing": draw(st.booleans()),
        "entp_chunk_pairs": draw(st.sampled_from([10, 30, 1000])),
    }
    if arch in ("redllm", "ared"):
        changes["num_encoder_layers"] = draw(st.integers(1, 2))
        changes["cross_attention_first"] = draw(st.booleans())
    if arch == "redllm" and not changes["cross_attention_first"]:
        changes["merged_attention"] = draw(st.booleans())
    if arch in ("redllm", "ared") and not changes.get("merged_attention"):
        # As self-attention's or its own: one head as wide as all of those, or as many; grouped.
        own = [(0, 0), (0, 1), (1, 1), (heads, 0), (heads, heads)]
        changes["num_cross_heads"], changes["num_cross_kv_heads"] = draw(st.sampled_from(own))
    if arch == "ared":
        changes |= {"bridge_norm": draw(st.booleans()), "bridge_next_position": draw(st.booleans())}
    changes["attention_output_norm"] = draw(st.sampled_from(["none", "head", "model", "output"]))
    if arch == "entp":
        changes["entp_causal_layers"] = draw(st.integers(0, changes["num_layers"] - 1))
        if draw(st.booleans()):
            changes |= LLAMA
        # A sample of at least all scored positions is these: no draw decides what it costs.
        sampled = draw(st.sampled_from([0, 3, 6]))
        changes["entp_sampled_prefixes"] = sampled
    config = named(arch, "nano", draw(st.integers(1, 70)), **changes)
    seq_len, batch_size = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    source_len = draw(st.integers(1, 9)) if arch == "redllm" else 0
    scored = draw(st.integers(0, min(seq_len, sampled or seq_len)))
    ids = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    mask = (torch.arange(seq_len) >= seq_len - scored).expand(batch_size, -1)
    prefix = documents = source_documents = None
    lengths, source_lengths = (), ()
    if arch == "decllm" and draw(st.booleans()):
        prefix = torch.full((batch_size,), draw(st.integers(0, seq_len)))
    if arch != "entp" and draw(st.booleans()):
        lengths, source_lengths = (draw(parts(3, size)) for size in (seq_len, source_len))
        documents, source_documents = (
            torch.arange(3).repeat_interleave(torch.tensor(part)).expand(batch_size, -1)
            for part in (lengths, source_lengths)
        )
    source = ids.new_zeros(batch_size, source_len) if source_len else None
    batch = Batch(
        ids,
        ids,
        mask,
        encoder_ids=source,
        prefix_lengths=prefix,
        document_ids=documents,
        encoder_document_ids=source_documents if source_len else None,
    )
    model = build(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for terms in model.loss_chunks(batch):
            terms.objective.backward()
    found = training_flops(
        config,
        seq_len=seq_len,
        source_len=source_len,
        scored=scored,
        prefix_len=None if prefix is None else int(prefix[0]),
        documents=lengths,
        source_documents=source_lengths,
        rows=batch_size,
    )
    assert batch_size * found.hardware == counter.get_total_flops()
    if not config.activation_checkpointing and not lengths:
        assert found.model_full == found.hardware


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("arch", "seq_len"), LARGER.items())
def test_hardware_of_a_larger_model_in_fp32(arch, seq_len, checkpointing):
    """Where an AMD CPU's linear layers go through oneDNN, whose products torch's counter has to be
    told of."""
    torch.set_default_dtype(torch.float32)
    config = named(
        arch,
        "small",
        2048,
        max_seq_len=seq_len,
        num_layers=2,
        activation_checkpointing=checkpointing,
    )
    ids = torch.zeros(2, seq_len, dtype=torch.int64)
    source = ids if arch == "redllm" else None
    model = build(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for terms in model.loss_chunks(Batch(ids, ids, ids >= 0, encoder_ids=source)):
            terms.objective.backward()
    source_len = seq_len if arch == "redllm" else 0
    found = training_flops(config, seq_len=seq_len, source_len=source_len, rows=2)
    assert 2 * found.hardware == counter.get_total_flops()


@pytest.mark.parametrize("prefix", [None, 0, 3])
def test_documents_are_skipped_but_under_a_prefix_mask_of_any_length(prefix):
    """Which is written out, also where it lets nothing more through."""
    config = named("decllm", "nano", 30, d_model=8)
    ids, documents = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    lengths = None if prefix is None else torch.tensor([prefix])
    batch = Batch(ids, ids, ids >= 0, prefix_lengths=lengths, document_ids=documents)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        build(config)(batch).objective.backward()
    found = training_flops(config, seq_len=8, documents=(3, 5), prefix_len=prefix)
    assert found.hardware == counter.get_total_flops()
    assert (found.hardware < found.model_full) == (prefix is None)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_sampled_prefixes_cost_what_the_mean_over_their_draws_is(data):
    """Where the sample divides the scored positions, all draws can be run; to the rounding of the
    mean in each row of the table."""
    draw = data.draw
    changes = {
        "d_model": draw(st.integers(2, 20)),
        "num_layers": draw(st.integers(1, 3)),
        "max_seq_len": 15,
        "activation_checkpointing": draw(st.booleans()),
        "entp_chunk_pairs": draw(st.sampled_from([10, 30, 1000])),
    }
    if draw(st.booleans()):
        changes |= LLAMA
    sampled, draws = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    changes["entp_causal_layers"] = draw(st.integers(0, changes["num_layers"] - 1))
    config = named("entp", "nano", 30, entp_sampled_prefixes=sampled, **changes)
    seq_len = sampled * draws + draw(st.integers(0, 3))
    ids = torch.zeros(1, seq_len, dtype=torch.int64)
    mask = torch.arange(seq_len).unsqueeze(0) >= seq_len - sampled * draws
    model, counted = build(config), 0
    for number in range(draws):
        offset = torch.tensor((number + 0.5) / draws)
        with (
            pytest.MonkeyPatch.context() as patch,
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            patch.setattr(torch, "rand", lambda *a, _offset=offset, **k: _offset)
            for terms in model.loss_chunks(Batch(ids, ids, mask)):
                terms.objective.backward()
        counted += counter.get_total_flops()
    found = training_flops(config, seq_len=seq_len, scored=sampled * draws)
    rows = len(operations(config, Pass(seq_len, sampled * draws)))
    assert abs(draws * found.hardware - counted) <= 2 * draws * rows * (draws > 1)


DIMS = {
    "width": st.integers(1, 64),
    "ffn": st.integers(1, 64),
    "heads": st.integers(1, 8),
    "vocab": st.integers(1, 500),
    "layers": st.integers(1, 6),
    "seq": st.integers(1, 300),
}


@settings(max_examples=100, deadline=None)
@given(**DIMS, scored=st.integers(0, 300))
def test_decoder_closed_forms(width, ffn, heads, vocab, layers, seq, scored):
    """Per layer 2·S·(4·d·hk + 3·d·f) and attention 4·S²·hk, half of it causal; logits 2·S·d·V."""
    scored = min(scored, seq)
    config = named(
        "decllm",
        "nano",
        vocab,
        d_model=width,
        d_ffn=ffn,
        num_heads=heads,
        head_dim=2,
        num_layers=layers,
    )
    found = training_flops(config, seq_len=seq, scored=scored)
    linear = 2 * seq * layers * (4 * width * 2 * heads + 3 * width * ffn)
    attention, logits = layers * 4 * seq**2 * 2 * heads, 2 * scored * width * vocab
    assert found.model_full == 3 * (linear + attention + logits)
    assert found.model_causal == 3 * (linear + attention / 2 + logits)
    body = layers * (8 * width * heads + 3 * width * ffn + 2 * width) + width
    assert found.six_n == 6 * body * seq
    recomputed = training_flops(config, seq_len=seq, scored=scored, activation_checkpointing=True)
    again = linear + attention - layers * 2 * seq * width * ffn
    assert recomputed.hardware == found.model_full + again
    assert recomputed.model_full == found.model_full


@settings(max_examples=100, deadline=None)
@given(**DIMS, encoder_layers=st.integers(1, 6), source=st.integers(1, 300))
def test_encoder_decoder_closed_forms(
    width, ffn, heads, vocab, layers, seq, encoder_layers, source
):
    """S_s·L_e·2(4hkd + 3df) + 4·L_e·hk·S_s² + S_t·L_d·2(6hkd + 3df) + S_s·L_d·2(2hkd)
    + 4·L_d·hk·(S_t² + S_t·S_s) + 2·S_t·d·V, times 3; S_t² by half where causal."""
    config = named(
        "redllm",
        "nano",
        vocab,
        d_model=width,
        d_ffn=ffn,
        num_heads=heads,
        head_dim=2,
        num_layers=layers,
        num_encoder_layers=encoder_layers,
    )
    hk = 2 * heads
    rest = (
        source * encoder_layers * 2 * (4 * hk * width + 3 * width * ffn)
        + 4 * encoder_layers * hk * source**2
        + seq * layers * 2 * (6 * hk * width + 3 * width * ffn)
        + source * layers * 2 * 2 * hk * width
        + 4 * layers * hk * seq * source
        + 2 * seq * width * vocab
    )
    found = training_flops(config, seq_len=seq, source_len=source)
    assert found.model_full == 3 * (rest + 4 * layers * hk * seq**2)
    assert found.model_causal == 3 * (rest + 2 * layers * hk * seq**2)
    assert found.six_n == 6 * parameters(config).non_embedding * (seq + source)


@settings(max_examples=50, deadline=None)
@given(width=st.integers(1, 64), heads=st.integers(1, 8), seq=st.integers(1, 120))
def test_entp_closed_form(width, heads, seq):
    """Three layers, f = 4·d, N pairs and Q = Σ t²; every saving of the scheme in its place."""
    config = named(
        "entp",
        "nano",
        11,
        d_model=width,
        d_ffn=4 * width,
        num_heads=heads,
        head_dim=2,
        num_layers=3,
        entp_chunk_pairs=10**9,
    )
    hk, pairs, squares = 2 * heads, seq * (seq + 1) // 2, seq * (seq + 1) * (2 * seq + 1) // 6
    first = 6 * width * hk * seq + 4 * hk * seq**2 + (2 * hk * width + 16 * width**2) * pairs
    middle = (8 * hk * width + 16 * width**2) * pairs + 4 * hk * squares
    last = (8 * hk * width + 16 * width**2) * seq + 4 * heads * width * pairs
    found = training_flops(config, seq_len=seq)
    assert found.model_full == 3 * (first + middle + last + 2 * seq * width * 11)
    assert found.model_causal == found.model_full == found.hardware


@pytest.mark.parametrize("checkpointing", [False, True])
def test_entp_chunks_cost_nothing(checkpointing):
    """But where some have nothing to score: a token each, in a row's two layers and above."""
    whole, cut = (
        named(
            "entp",
            "micro",
            100,
            max_seq_len=128,
            entp_chunk_pairs=pairs,
            activation_checkpointing=checkpointing,
        )
        for pairs in (10_000, 500)
    )
    assert training_flops(whole, seq_len=128) == training_flops(cut, seq_len=128)
    few = training_flops(whole, seq_len=128, scored=8).hardware
    assert few < training_flops(cut, seq_len=128, scored=8).hardware < 1.05 * few


def test_documents_closed_form():
    """Attention inside documents of 100 and 28 of 128 tokens: Σ n² of S² is computed, and half of
    that is not masked."""
    config, lengths = named("decllm", "nano", 100), (100, 28)
    apart = training_flops(config, seq_len=128, documents=lengths)
    whole = training_flops(config, seq_len=128)
    width = config.num_layers * 4 * config.num_heads * config.head_dim
    inside = sum(n**2 for n in lengths)
    assert apart.model_full == whole.model_full
    assert whole.hardware - apart.hardware == 3 * width * (128**2 - inside)
    assert whole.model_causal - apart.model_causal == 3 * width * (128**2 - inside) / 2


def test_merged_attention_costs_its_cross_attention_and_no_second_query():
    """S_t·S_s pairs move into self-attention; query and output projections are one each."""
    plain, merged = (
        named("redllm", "micro", 100, merged_attention=choice) for choice in (False, True)
    )
    less = training_flops(plain, seq_len=40, source_len=24).model_full
    less -= training_flops(merged, seq_len=40, source_len=24).model_full
    width = plain.num_heads * plain.head_dim
    assert less == 3 * plain.num_layers * 2 * 40 * 2 * width * plain.d_model


@pytest.mark.parametrize(
    ("size", "ratio"), [("150m", 2.27), ("1b", 2.02), ("2b", 1.97), ("4b", 2.12), ("8b", 2.02)]
)
def test_a_decoder_costs_about_twice_its_encoder_decoder(size, ratio):
    """arXiv 2510.26622: "approximately double the FLOPs" at about equal parameters."""
    decoder = training_flops(named("decllm", size, 32_768), seq_len=2048)
    pair = training_flops(named("redllm", size, 32_768), seq_len=1024, source_len=1024)
    assert decoder.model_causal / pair.model_causal == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(
    ("arch", "lengths", "words"),
    [
        ("decllm", {"seq_len": 4, "scored": 5}, "scored=5"),
        ("redllm", {"seq_len": 4}, "source_len=0"),
        ("entp", {"seq_len": 4, "source_len": 2}, "source_len=2"),
        ("entp", {"seq_len": 4, "documents": (1, 3)}, "documents=.*one document"),
        ("decllm", {"seq_len": 8, "documents": (10, -2)}, "documents=.*negative"),
        (
            "redllm",
            {"seq_len": 8, "source_len": 2, "documents": (4, 4), "source_documents": (-1, 3)},
            "source_documents=.*negative",
        ),
        ("redllm", {"seq_len": 8, "source_len": 2, "source_documents": (2,)}, "documents="),
    ],
)
def test_impossible_lengths_are_refused(arch, lengths, words):
    with pytest.raises(ValueError, match=words):
        training_flops(named(arch, "nano", 10), **lengths)
