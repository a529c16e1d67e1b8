"""DecLLM against transformers' Llama, and against what its masks promise."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models.batch import Batch
from models.config import named
from models.registry import build
from models.rotary import rotary_tables


def rotary_in_float64(base, width):
    """transformers' rotary tables, which it computes in float32 whatever the dtype."""

    def tables(hidden, position_ids):
        turns = position_ids.double().unsqueeze(-1) * base ** (-torch.arange(0, width, 2) / width)
        angles = torch.cat([turns, turns], -1)
        return angles.cos(), angles.sin()

    return tables


def norm_in_float64(self, x):
    """transformers' RMSNorm, which also casts to float32."""
    return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def test_equals_llama_with_its_norms_switched_off(monkeypatch):
    """Same weights, same logits, same gradients: rotary, SwiGLU, GQA, RMSNorm and the tied head."""
    transformers = pytest.importorskip("transformers")
    ours = build(
        named(
            "decllm",
            "nano",
            60,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            qkv_norm=False,
            scale_embedding=False,
        )
    )
    config = ours.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=60,
            hidden_size=config.d_model,
            intermediate_size=config.d_ffn,
            num_hidden_layers=config.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=True,
            attention_bias=False,
            mlp_bias=False,
        )
    ).to(torch.float64)
    monkeypatch.setattr(llama.model.rotary_emb, "forward", rotary_in_float64(config.rope_base, 8))
    monkeypatch.setattr(type(llama.model.norm), "forward", norm_in_float64)
    names = {"model.embed_tokens": ours.embedding, "model.norm": ours.final_norm}
    for i, block in enumerate(ours.blocks):
        prefix = f"model.layers.{i}"
        names |= {
            f"{prefix}.self_attn.q_proj": block.attention.query,
            f"{prefix}.self_attn.k_proj": block.attention.key,
            f"{prefix}.self_attn.v_proj": block.attention.value,
            f"{prefix}.self_attn.o_proj": block.attention.output,
            f"{prefix}.mlp.gate_proj": block.feed_forward.gate,
            f"{prefix}.mlp.up_proj": block.feed_forward.up,
            f"{prefix}.mlp.down_proj": block.feed_forward.down,
            f"{prefix}.input_layernorm": block.attention_norm,
            f"{prefix}.post_attention_layernorm": block.feed_forward_norm,
        }
    theirs = dict(llama.named_parameters())
    assert set(theirs) == {f"{name}.weight" for name in names}
    with torch.no_grad():
        for name, module in names.items():
            torch.nn.init.normal_(module.weight, std=0.3)
            theirs[f"{name}.weight"].copy_(module.weight)
    ids = torch.randint(60, (3, 12))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(3, 11, dtype=torch.bool))
    logits = llama(ids[:, :-1]).logits
    torch.testing.assert_close(ours.logits(batch), logits, rtol=1e-10, atol=1e-10)
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    ours(batch).objective.backward()
    for name, module in names.items():
        expected = theirs[f"{name}.weight"].grad
        torch.testing.assert_close(module.weight.grad, expected, rtol=1e-10, atol=1e-10)


def test_attention_equals_its_formula(make_model):
    """softmax(LN(Q) LN(K)ᵀ / √k) LN(V), LN the parameter-free RMSNorm over each head; rotated."""
    model = make_model("decllm", num_kv_heads=1)
    attention, config = model.blocks[0].attention, model.config
    hidden = torch.randn(1, 5, 16)

    def heads(module, count):
        x = (hidden[0] @ module.weight.T).view(5, count, 8)
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()

    def turned(x):
        angles = torch.arange(5.0)[:, None] * config.rope_base ** (-torch.arange(4.0) / 4)
        turn = torch.polar(torch.ones(5, 4), angles).unsqueeze(1)
        pairs = torch.complex(x[..., :4], x[..., 4:]) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    q, k, v = heads(attention.query, 2), heads(attention.key, 1), heads(attention.value, 1)
    scores = torch.einsum("thk,sk->hts", turned(q), turned(k)[:, 0]) / 8**0.5
    assert scores.abs().max() <= 8**0.5 + 1e-9  # the bound the norm is for
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    attended = torch.einsum("hts,sk->thk", scores.softmax(-1), v[:, 0])
    expected = attended.reshape(5, 16) @ attention.output.weight.T
    rotary = rotary_tables(torch.arange(5), config, hidden.dtype)
    torch.testing.assert_close(attention(hidden, is_causal=True, rotary=rotary)[0], expected)


def seen_positions(model, batch):
    """[targets, inputs] bool: which input positions reach the hidden state of each position."""
    embedded = []
    hook = model.embedding.register_forward_hook(
        lambda module, args, output: (
            embedded.append(output.requires_grad_()) if output.dim() == 3 else None
        )
    )
    hidden = model.hidden_states(batch)
    hook.remove()
    rows = [
        torch.autograd.grad(hidden[0, t].sum(), embedded[0], retain_graph=True)[0][0].abs().sum(-1)
        for t in range(hidden.shape[1])
    ]
    return torch.stack(rows) != 0


def test_causal_by_gradient(make_model, make_batch):
    model, batch = make_model("decllm"), make_batch("decllm", batch_size=1, seq_len=6)
    assert torch.equal(seen_positions(model, batch), torch.ones(6, 6).tril().bool())


@pytest.mark.parametrize("length", [0, 1, 4, 6])
def test_a_prefix_is_bidirectional_by_gradient(make_model, make_batch, length):
    model, batch = make_model("decllm"), make_batch("decllm", batch_size=1, seq_len=6)
    batch = Batch(
        batch.input_ids, batch.targets, batch.loss_mask, prefix_lengths=torch.tensor([length])
    )
    expected = torch.ones(6, 6).tril().bool()
    expected[:length, :length] = True
    assert torch.equal(seen_positions(model, batch), expected)


def test_prefixes_differ_by_row_and_stay_in_their_document(make_model, make_batch):
    model, batch = make_model("decllm"), make_batch("decllm", batch_size=2, seq_len=6)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1], [3, 3, 5, 5, 5, 5]])
    prefixes = torch.tensor([2, 4])
    both = dataclasses.replace(batch, prefix_lengths=prefixes, document_ids=documents)
    for row in range(2):
        expected = torch.ones(6, 6).tril().bool()
        expected[: prefixes[row], : prefixes[row]] = True
        expected &= documents[row, :, None] == documents[row]
        assert torch.equal(seen_positions(model, both.rows(row, row + 1)), expected)
    alone = torch.cat([model.hidden_states(both.rows(row, row + 1)) for row in range(2)])
    torch.testing.assert_close(model.hidden_states(both), alone)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    kv_heads=st.sampled_from([1, 2]),
    positions=st.sampled_from(["rotary", "learned"]),
    restart=st.booleans(),
    seed=st.integers(0, 999),
)
def test_documents_in_a_row_equal_each_alone(
    make_model, make_batch, gradients, lengths, kv_heads, positions, restart, seed
):
    """Loss and gradients. Rotary attention knows differences of positions alone, so that restarting
    them changes nothing; learned ones must restart."""
    torch.manual_seed(seed)
    choices = {"num_kv_heads": kv_heads, "positions": positions, "restart_positions": restart}
    choices["positional_subtraction"] = positions == "learned"
    model = make_model("decllm", **choices)
    batch = make_batch("decllm", batch_size=1, seq_len=sum(lengths), scored=1.1)
    documents = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    together = dataclasses.replace(batch, document_ids=documents)
    fields = ("input_ids", "targets", "loss_mask")
    parts = zip(*(getattr(batch, field).split(lengths, dim=1) for field in fields), strict=True)
    alone = [Batch(*part) for part in parts]
    nll, expected = model.token_nll(together), torch.cat([model.token_nll(b) for b in alone], 1)
    if positions == "learned" and not restart and len(lengths) > 1:
        differs = (nll - expected).abs()[0] > 1e-3
        assert not differs[: lengths[0]].any()
        assert differs[lengths[0] :].any()
        return
    torch.testing.assert_close(nll, expected)
    found = {name: gradient.clone() for name, gradient in gradients(model, together).items()}
    summed = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in alone:
        for name, gradient in gradients(model, part).items():
            summed[name] += gradient
    torch.testing.assert_close(found, summed)


@pytest.mark.parametrize("normed", [False, True])
def test_positional_subtraction_equals_its_formula(make_model, make_batch, normed):
    """The final state less the embedding of the next position, scaled as where it was added."""
    choices = {"positions": "learned", "norm": "layernorm", "positional_subtraction_norm": normed}
    model = make_model("decllm", positional_subtraction=True, max_seq_len=9, **choices)
    assert model.position_embedding.weight.shape == (10, 16)
    plain = make_model("decllm", max_seq_len=10, positions="learned", norm="layernorm")
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("subtraction")}
    )
    batch = make_batch("decllm")
    hidden = plain.hidden_states(batch) - 4.0 * model.position_embedding.weight[1:10]  # √16
    if normed:
        norm = model.subtraction_norm
        hidden = F.layer_norm(hidden, (16,), norm.weight, None, model.config.norm_eps)
    torch.testing.assert_close(model.hidden_states(batch), hidden)


def test_gpt2_style_equals_its_formula(make_model, make_batch):
    """Learned positions, LayerNorm and GELU with biases, written out."""
    style = {"positions": "learned", "norm": "layernorm", "bias": True, "feed_forward": "gelu"}
    model = make_model("decllm", **style, qkv_norm=False, num_layers=1, scale_embedding=False)
    batch = make_batch("decllm", batch_size=1, seq_len=5)
    block, eps = model.blocks[0], model.config.norm_eps
    x = model.embedding.weight[batch.input_ids[0]] + model.position_embedding.weight[:5]

    def normed(module, x):
        return F.layer_norm(x, (16,), module.weight, module.bias, eps)

    y = normed(block.attention_norm, x)
    parts = (block.attention.query, block.attention.key, block.attention.value)
    q, k, v = (F.linear(y, m.weight, m.bias).view(5, 2, 8).transpose(0, 1) for m in parts)
    scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(
        torch.ones(5, 5).triu(1).bool(), -torch.inf
    )
    attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(5, 16)
    x = x + F.linear(attended, block.attention.output.weight, block.attention.output.bias)
    y = normed(block.feed_forward_norm, x)
    up, down = block.feed_forward.up, block.feed_forward.down
    inner = F.gelu(F.linear(y, up.weight, up.bias), approximate="tanh")
    x = x + F.linear(inner, down.weight, down.bias)
    expected = normed(model.final_norm, x) @ model.embedding.weight.T
    torch.testing.assert_close(model.logits(batch)[0], expected)


def test_learned_positions_end(make_model, make_batch):
    model = make_model("decllm", positions="learned", max_seq_len=4)
    with pytest.raises(ValueError, match="max_seq_len=4"):
        model(make_batch("decllm", seq_len=5))
