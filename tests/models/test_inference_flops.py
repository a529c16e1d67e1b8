"""FLOPs of a prompt and of a generated token: torch's counter, and closed forms."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.batch import Batch
from models.config import named
from models.flops import (
    decode_pass,
    inference_flops,
    operations,
    parameters,
    prefill_pass,
    training_flops,
)
from models.generation import prompt_batch
from models.masks import decoder_mask
from models.registry import ARCHITECTURES, build

VOCAB = 30
LENGTHS = st.integers(1, 40)


def config_of(arch, width=12, ffn=20, heads=2, layers=3, encoder_layers=2, **changes):
    """A small model with heads of width 4."""
    if arch in ("redllm", "ared"):
        changes["num_encoder_layers"] = encoder_layers
    return named(
        arch,
        "nano",
        VOCAB,
        d_model=width,
        d_ffn=ffn,
        num_heads=heads,
        head_dim=4,
        num_layers=layers,
        max_seq_len=100,
        **changes,
    )


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_prefill_equals_the_counter(arch, num_kv_heads, layers):
    """The prompt's pass, with the logits of its last position alone."""
    config = config_of(arch, num_kv_heads=num_kv_heads, layers=layers)
    ids = torch.zeros(1, 9, dtype=torch.int64)
    mask = torch.arange(9).unsqueeze(0) == 8
    batch = Batch(ids, ids, mask)
    if arch == "redllm":
        one = ids[:, :1]
        batch = Batch(one, one, torch.ones_like(one, dtype=torch.bool), encoder_ids=ids)
    model = build(config)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model.token_nll(batch)
    found = inference_flops(config, prefill_pass(config, 9))
    assert found.hardware == found.model_full == counter.get_total_flops()
    assert found.six_n == 2 * parameters(config).non_embedding * (10 if arch == "redllm" else 9)


GENERATING = {
    "decllm": ("decllm", {}),
    "redllm": ("redllm", {"num_kv_heads": 1}),
    "redllm merged": ("redllm", {"merged_attention": True}),
    "ared": ("ared", {}),
    **{f"entp {k} of 4 causal": ("entp", {"layers": 4, "entp_causal_layers": k}) for k in range(4)},
    "entp llama": (
        "entp",
        {"positions": "rotary", "qkv_norm": True, "num_kv_heads": 1, "feed_forward": "swiglu"},
    ),
}


def test_a_prompt_in_both_directions_equals_the_counter():
    config = config_of("decllm", num_kv_heads=1)
    model = build(config).eval()
    batch, lengths = prompt_batch(model, [[*range(9)]], bos=1, bidirectional=True)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model.decoding(batch, lengths, 30).start()
    found = inference_flops(config, prefill_pass(config, 10, bidirectional=True))
    assert found.model_causal == found.hardware == counter.get_total_flops()


@pytest.mark.parametrize("variant", GENERATING)
def test_what_generation_runs_equals_the_counter(variant):
    """A prompt of 9 tokens and three more, each counted as it is made with room to spare."""
    arch, changes = GENERATING[variant]
    config = config_of(arch, **changes)
    model = build(config).eval()
    batch, lengths = prompt_batch(model, [[*range(9)]], bos=1)
    prompt = 9 if arch == "redllm" else 10  # the others read [BOS] with it

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            decoding = model.decoding(batch, lengths, 30)
            decoding.start()
        expected = inference_flops(config, prefill_pass(config, prompt))
        assert expected.hardware == expected.model_full == counter.get_total_flops()
        for number in range(1, 4):
            with FlopCounterMode(display=False) as counter:
                decoding.extend(torch.tensor([number]))
            expected = inference_flops(config, decode_pass(config, prompt, prompt + number))
            assert expected.hardware == expected.model_full == counter.get_total_flops()


@settings(max_examples=60, deadline=None)
@given(prompt=LENGTHS, heads=st.integers(1, 4))
def test_a_prompt_that_sees_itself_in_both_directions(prompt, heads):
    """L·(2·P·(4·d·hk + 3·d·f) + 4·P²·hk) + 2·d·V, nothing of it masked, where a causal prompt's
    attention is halved; a prompt of one token, too, has nothing to hide."""
    config, hk = config_of("decllm", 12, 20, heads), 4 * heads
    both = inference_flops(config, prefill_pass(config, prompt, bidirectional=True))
    products = 3 * 2 * prompt * (4 * 12 * hk + 3 * 12 * 20) + 2 * 12 * VOCAB
    attention = 3 * 4 * prompt**2 * hk
    assert both.model_causal == both.model_full == both.hardware == products + attention
    causal = inference_flops(config, prefill_pass(config, prompt))
    assert causal.model_full == both.model_full
    if prompt > 1:
        assert causal.model_causal == products + attention / 2


def test_prompts_in_both_directions_are_a_prefix_mask_s():
    config = config_of("redllm")
    assert prefill_pass(config, 9, bidirectional=True) == prefill_pass(config, 9)
    for arch in ("entp", "ared"):
        with pytest.raises(ValueError, match="bidirectional=True"):
            prefill_pass(config_of(arch), 9, bidirectional=True)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 30), ffn=st.integers(1, 30), heads=st.integers(1, 4), context=LENGTHS)
def test_a_generated_token_of_a_decoder(width, ffn, heads, context):
    """L·(2·(4·d·hk + 3·d·f) + 4·c·hk) + 2·d·V; nothing of it is masked."""
    config, hk = config_of("decllm", width, ffn, heads), 4 * heads
    found = inference_flops(config, decode_pass(config, 1, context + 1))
    layer = 2 * (4 * width * hk + 3 * width * ffn) + 4 * (context + 1) * hk
    assert found.model_causal == found.model_full == found.hardware
    assert found.hardware == 3 * layer + 2 * width * VOCAB
    assert found.six_n == 2 * parameters(config).non_embedding


@settings(max_examples=60, deadline=None)
@given(prompt=LENGTHS, generated=LENGTHS, heads=st.integers(1, 4))
def test_a_generated_token_of_an_encoder_decoder(prompt, generated, heads):
    """The prompt's keys and values stay; [BOS] and what was generated are the decoder's context."""
    config, hk = config_of("redllm", 12, 20, heads), 4 * heads
    found = inference_flops(config, decode_pass(config, prompt, prompt + generated))
    layer = 2 * (6 * 12 * hk + 3 * 12 * 20) + 4 * hk * (prompt + generated + 1)
    assert found.hardware == 3 * layer + 2 * 12 * VOCAB


@settings(max_examples=60, deadline=None)
@given(context=LENGTHS, heads=st.integers(1, 4))
def test_a_generated_token_of_the_other_two(context, heads):
    """ARED runs both stacks and the bridge from caches; ENTP reads its prefix anew, but
    for what the first layer has of earlier tokens: projections, and what they read but one key."""
    config, hk = config_of("ared", 12, 20, heads), 4 * heads
    found = inference_flops(config, decode_pass(config, 1, context + 1))
    encoder = 2 * (4 * 12 * hk + 2 * 12 * 20) + 4 * hk * (context + 1)
    decoder = 2 * (8 * 12 * hk + 2 * 12 * 20) + 8 * hk * (context + 1)
    assert found.hardware == 2 * encoder + 2 * 12**2 + 3 * decoder + 2 * 12 * VOCAB
    entp = config_of("entp", 12, 20, heads)
    again = inference_flops(entp, prefill_pass(entp, context + 1))
    told = inference_flops(entp, decode_pass(entp, 1, context + 1))
    projected = 2 * 3 * 12 * hk * context
    attended = 4 * hk * (context + 1) ** 2 - hk * (4 * (context + 1) + 2 * context)
    assert told.hardware == again.hardware - projected - attended


@settings(max_examples=60, deadline=None)
@given(seq=st.integers(1, 60), data=st.data())
def test_attention_that_a_mask_lets_through(seq, data):
    """Half of S² where causal; a prefix p adds its own other half; documents add up their own."""
    config = config_of("decllm")
    each, whole = 3 * 3 * 4 * 8, training_flops(config, seq_len=seq)
    rest = whole.model_full - each * seq**2
    prefix = data.draw(st.integers(0, seq))
    seen = training_flops(config, seq_len=seq, prefix_len=prefix)
    assert whole.model_causal == rest + each * seq**2 / 2
    assert seen.model_causal == rest + each * (seq**2 + prefix**2) / 2
    assert seen.hardware == seen.model_full == whole.model_full
    cut = data.draw(st.integers(0, seq))
    apart = training_flops(config, seq_len=seq, documents=(cut, seq - cut))
    assert apart.model_causal == rest + each * (cut**2 + (seq - cut) ** 2) / 2
    assert apart.model_full == whole.model_full
    both = training_flops(config, seq_len=seq, prefix_len=prefix, documents=(cut, seq - cut))
    document = torch.arange(2).repeat_interleave(torch.tensor([cut, seq - cut]))
    batch = Batch(*[torch.zeros(1, seq, dtype=torch.int64)] * 3)
    mask = decoder_mask(
        dataclasses.replace(
            batch, prefix_lengths=torch.tensor([prefix]), document_ids=document[None]
        )
    )
    # The formula's half counts the diagonal by half; the mask shows it whole.
    pairs = int(mask.dense.sum()) - (seq - prefix) / 2
    assert both.model_causal == rest + each * pairs


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parameters_equal_the_built_model(data):
    """In total and without embeddings."""
    draw = data.draw
    arch = draw(st.sampled_from(list(ARCHITECTURES)))
    heads = draw(st.sampled_from([2, 4]))
    changes = {
        "width": draw(st.integers(1, 20)),
        "ffn": draw(st.integers(1, 20)),
        "heads": heads,
        "layers": draw(st.integers(1, 4)),
        "encoder_layers": draw(st.integers(1, 4)),
        "num_kv_heads": draw(st.sampled_from([1, 2, heads])),
        "bias": draw(st.booleans()),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "feed_forward": draw(st.sampled_from(["swiglu", "gelu"])),
    }
    if arch == "redllm":
        changes["encoder_final_norm"] = draw(st.booleans())
        changes["merged_attention"] = draw(st.booleans())
        if not changes["merged_attention"]:
            changes["num_cross_kv_heads"] = draw(st.sampled_from([0, 1, heads]))
    if arch == "ared":
        changes["bridge_norm"] = draw(st.booleans())
        changes["bridge_next_position"] = draw(st.booleans())
        changes["positional_subtraction_norm"] = draw(st.booleans())
        changes["embedding_loss_affine"] = draw(st.booleans())
        changes["embedding_mean_norm"] = draw(st.sampled_from(["before", "after", "none"]))
    elif arch == "decllm" and draw(st.booleans()):
        changes |= {"positions": "learned", "positional_subtraction": draw(st.booleans())}
    config = config_of(arch, **changes)
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in build(config).named_parameters()}
    body = {name: n for name, n in sizes.items() if "embedding.weight" not in name}
    found = parameters(config)
    assert found.total == sum(sizes.values())
    assert found.non_embedding == sum(body.values())


def reached(tensor):
    """The parameters that `tensor` was computed from, in autograd's own record."""
    found, nodes, seen = {}, [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        nodes += [following for following, _ in node.next_functions]
    return set(found)


SWITCHES = {
    "ared switches": (
        "ared",
        {
            "bias": True,
            "bridge_norm": True,
            "positional_subtraction_norm": True,
            "num_cross_heads": 4,
            "num_cross_kv_heads": 1,
            "cross_attention_first": True,
        },
    ),
    "redllm bias": ("redllm", {"bias": True, "norm": "layernorm", "num_cross_kv_heads": 1}),
    "redllm merged bias": ("redllm", {"bias": True, "merged_attention": True, "num_kv_heads": 1}),
    "decllm bias": ("decllm", {"bias": True, "feed_forward": "gelu"}),
}


@pytest.mark.parametrize("variant", [*GENERATING, *SWITCHES])
def test_active_parameters_are_those_that_a_generated_token_meets(variant):
    """Its logits are computed from them, and the products of its pass (twice its matrices, less
    attention's scores) are their matrices."""
    arch, changes = (GENERATING | SWITCHES)[variant]
    config = config_of(arch, **changes)
    model = build(config).eval()
    batch, lengths = prompt_batch(model, [[*range(9)]], bos=1)
    if arch == "entp":  # which reads its prefix anew for each token
        ids = batch.input_ids
        for terms in model.loss_chunks(Batch(ids, ids, ids >= 0)):
            terms.objective.backward()
        met = {id(p) for p in model.parameters() if p.grad is not None}
    else:
        decoding = model.decoding(batch, lengths, 30)
        with torch.no_grad():
            decoding.start()
        met = reached(decoding.extend(torch.tensor([1])))
    active = {
        name: p
        for name, p in model.named_parameters()
        if id(p) in met and name != "position_embedding.weight"  # looked up
    }
    assert parameters(config).active == sum(p.numel() for p in active.values())
    if arch != "entp":
        scores = ("self-attention", "cross-attention", "merged attention")
        table = operations(config, decode_pass(config, 9, 10))
        products = sum(row.forward for row in table if row.name not in scores)
        assert products == 2 * sum(p.numel() for p in active.values() if p.dim() == 2)


@pytest.mark.parametrize(
    ("arch", "size", "matrices", "norms"),
    [("ared", "ared-15m", 15_751_050, 79), ("redllm", "150m", 108_086_272, 10)],
)
def test_active_parameters_of_named_sizes(arch, size, matrices, norms):
    """Matrices, and the gains of norms."""
    config = named(arch, size, 50_257, max_seq_len=300)
    assert parameters(config).active == matrices + norms * config.d_model
