"""Generation: the same logits with caches as without, and the choice of tokens by its own rules."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from models.batch import Batch
from models.decoding import Decoding
from models.entp_layers import Projected
from models.generation import Sampling, choose, generate, probabilities, prompt_batch
from models.prefix_decoding import GrowingAttention
from tests.models import prefix_loop

BOS = 1
PROMPTS = [[5, 6, 7, 8, 9], [4], [11, 12, 13]]
LLAMA = {**prefix_loop.LLAMA, "num_kv_heads": 1}
VARIANTS = {
    "decllm": ("decllm", {}),
    "decllm gpt-2": (
        "decllm",
        {"positions": "learned", "norm": "layernorm", "bias": True, "qkv_norm": False},
    ),
    "decllm grouped": ("decllm", {"num_kv_heads": 1, "num_layers": 3}),
    "decllm subtraction": ("decllm", {"positions": "learned", "positional_subtraction": True}),
    "redllm": ("redllm", {"num_layers": 2, "num_encoder_layers": 3}),
    "redllm cross first": ("redllm", {"cross_attention_first": True, "num_kv_heads": 1}),
    "redllm fewer heads in cross-attention": ("redllm", {"num_cross_heads": 1}),
    "redllm more heads in cross-attention": ("redllm", {"num_cross_heads": 4, "num_kv_heads": 1}),
    "redllm merged": ("redllm", {"merged_attention": True, "num_layers": 2}),
    "ared": ("ared", {"num_layers": 2, "num_encoder_layers": 2}),
    "ared other": (
        "ared",
        {"bridge_next_position": True, "bridge_norm": True, "cross_attention_first": True},
    ),
    "ared rotary": ("ared", {"positions": "rotary", "positional_subtraction": False}),
    **{
        f"entp {k} of 4 causal": ("entp", {"num_layers": 4, "entp_causal_layers": k})
        for k in range(4)
    },
    "entp one layer": ("entp", {"num_layers": 1}),
    **{
        f"entp llama {k} of 3 causal": ("entp", {**LLAMA, "num_layers": 3, "entp_causal_layers": k})
        for k in range(3)
    },
    "entp grouped": ("entp", {"num_layers": 3, "num_kv_heads": 1}),
}


def last_logits(model, prompt, written):
    """Of one row by itself, without padding or cache, from the model's training forward."""
    if model.config.arch == "redllm":
        ids, source = torch.tensor([[BOS, *written]]), torch.tensor([prompt])
    else:
        ids, source = torch.tensor([[BOS, *prompt, *written]]), None
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    return model.logits(Batch(ids, ids, nothing, encoder_ids=source))[0, -1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_steps_logits_are_those_of_the_sequence_run_anew(make_model, variant):
    arch, changes = VARIANTS[variant]
    model = make_model(arch, dropout=0.3, **changes).eval()
    batch, lengths = prompt_batch(model, PROMPTS, BOS)
    decoding = model.decoding(batch, lengths, int(lengths.max()) + 8)
    plain = Decoding(model, batch, lengths, int(lengths.max()) + 8)
    written = [[] for _ in PROMPTS]
    with torch.no_grad():
        found, other = decoding.start(), plain.start()
        for _ in range(8):
            expected = torch.stack(
                [last_logits(model, *row) for row in zip(PROMPTS, written, strict=True)]
            )
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(other, expected, rtol=1e-10, atol=1e-10)
            tokens = torch.randint(40, (3,))
            for row, token in zip(written, tokens.tolist(), strict=True):
                row.append(token)
            found, other = decoding.extend(tokens), plain.extend(tokens)


def test_a_prefix_that_sees_itself_keeps_its_cache(make_model):
    model = make_model("decllm", num_layers=3).eval()
    ids, lengths = torch.randint(40, (2, 6)), torch.tensor([6, 4])
    nothing = torch.zeros_like(ids, dtype=torch.bool)
    batch = Batch(ids, ids, nothing, prefix_lengths=torch.tensor([5, 2]))
    decoding = model.decoding(batch, lengths, 9)
    with torch.no_grad():
        decoding.start()
        for number in range(3):
            found = decoding.extend(torch.tensor([number, 7]))
            for row, prefix in enumerate((5, 2)):
                own = decoding.ids.new_tensor(
                    [*ids[row, : lengths[row]], *([0, 1, 2] if not row else [7] * 3)]
                )
                own = own[None, : lengths[row] + number + 1]
                alone = Batch(own, own, own < 0, prefix_lengths=torch.tensor([prefix]))
                torch.testing.assert_close(found[row], model.logits(alone)[0, -1])


def test_no_architecture_needs_room_for_the_last_token(make_model, arch):
    is_limited = arch in ("decllm", "entp", "ared")  # by its table of 24 positions
    positions = {"positions": "learned"} if is_limited else {}
    model, most = make_model(arch, **positions), 23 if is_limited else 24
    rows = generate(model, [[1]], BOS, Sampling(max_tokens=most, temperature=0.0))
    assert len(rows[0]) == most


def test_a_prompt_in_both_directions_is_read_as_in_training(make_model):
    """Greedily, against the training forward with prefix_lengths, run anew for each token."""
    model = make_model("decllm", num_layers=3).eval()
    found = generate(
        model, PROMPTS, BOS, Sampling(max_tokens=6, temperature=0.0), bidirectional=True
    )
    differs = False
    for prompt, row in zip(PROMPTS, found, strict=True):
        prefix = torch.tensor([len(prompt) + 1])  # [BOS] too, as the objectives have it
        for t, token in enumerate(row):
            ids = torch.tensor([[BOS, *prompt, *row[:t]]])
            batch = Batch(ids, ids, ids < 0, prefix_lengths=prefix)
            logits = model.logits(batch)[0, -1]
            assert token == int(logits.argmax())
            differs |= not torch.allclose(logits, last_logits(model, prompt, row[:t]))
    assert differs


def test_greedy_is_the_likeliest_token_and_stops_at_the_end(make_model, arch):
    model = make_model(arch).train()
    rows = generate(model, PROMPTS, BOS, Sampling(max_tokens=6, temperature=0.0))
    assert model.training
    model.eval()
    for prompt, row in zip(PROMPTS, rows, strict=True):
        written = []
        for _ in range(6):
            written.append(int(last_logits(model, prompt, written).argmax()))
        assert row == written
    end = rows[0][2]
    stopped = generate(model, PROMPTS, BOS, Sampling(max_tokens=6, temperature=0.0, end=end))
    for row, whole in zip(stopped, rows, strict=True):
        assert row == (whole[: whole.index(end)] if end in whole else whole)


def test_the_seed_decides_the_text(make_model):
    model = make_model("decllm", spread=0.05)
    first, again, other = (
        generate(model, PROMPTS, BOS, Sampling(max_tokens=12, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]]).expand(40_000, -1)
    generator = torch.Generator().manual_seed(0)
    for sampling, weights in (
        (Sampling(), [2.0, 1.0, 0.0, -1.0, -2.0]),
        (Sampling(temperature=0.5), [4.0, 2.0, 0.0, -2.0, -4.0]),
        (Sampling(top_k=2), [2.0, 1.0]),
        # The likeliest token has 0.64: it and the next, which crosses 0.7.
        (Sampling(top_p=0.7), [2.0, 1.0]),
        (Sampling(top_p=0.6), [2.0]),
        (Sampling(top_k=1), [2.0]),
    ):
        expected = torch.zeros(5, dtype=torch.float64)
        expected[: len(weights)] = torch.tensor(weights, dtype=torch.float64).softmax(0)
        torch.testing.assert_close(probabilities(logits[:1].double(), sampling)[0], expected)
        counts = choose(logits, sampling, generator).bincount(minlength=5)
        assert (counts / 40_000 - expected).abs().max() < 0.01


def test_of_equals_top_k_keeps_no_more_than_k():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    for k in (1, 2, 3):
        found = probabilities(logits, Sampling(top_k=k))
        assert (found > 0).sum() == k
        assert found.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324])
def test_the_smallest_temperature_is_all_but_greedy(temperature):
    logits = torch.tensor([[3.0, 2.0, 3.0, -1e4], [-5.0, 2.0, 1.0, 0.0]]).float()
    expected = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 1.0, 0.0, 0.0]]).float()
    torch.testing.assert_close(probabilities(logits, Sampling(temperature=temperature)), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_impossible_choices_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**changes)


def test_what_cannot_be_read_is_refused(make_model):
    with pytest.raises(ValueError, match="nothing to go on from"):
        generate(make_model("decllm"), [], BOS, Sampling())
    with pytest.raises(ValueError, match="nothing to read"):
        generate(make_model("redllm"), [[1], []], BOS, Sampling())
    # Of 2 + 23 tokens the last is written and not read.
    with pytest.raises(ValueError, match="has learned 24"):
        generate(make_model("entp"), [[1]], BOS, Sampling(max_tokens=24))
    assert len(generate(make_model("entp"), [[1]], BOS, Sampling(max_tokens=23))[0]) == 23
    with pytest.raises(ValueError, match="bidirectional=True: ared"):
        generate(make_model("ared"), [[1]], BOS, Sampling(), bidirectional=True)
    batch, lengths = prompt_batch(make_model("ared"), PROMPTS, BOS)
    packed = dataclasses.replace(batch, document_ids=torch.zeros_like(batch.input_ids))
    with pytest.raises(ValueError, match="document_ids"):
        make_model("ared").decoding(packed, lengths, 9)
    batch, lengths = prompt_batch(make_model("redllm"), PROMPTS, BOS)
    packed = dataclasses.replace(batch, encoder_document_ids=torch.zeros_like(batch.encoder_ids))
    with pytest.raises(ValueError, match="encoder_document_ids"):
        make_model("redllm").decoding(packed, lengths, 9)


def test_an_empty_prompt_starts_a_text(make_model):
    assert len(generate(make_model("decllm"), [[]], BOS, Sampling(max_tokens=3))[0]) == 3


@pytest.mark.parametrize(
    "variant", ["decllm", "redllm", "ared", "entp 3 of 4 causal", "entp one layer"]
)
def test_a_further_token_runs_one_position(make_model, variant):
    """What is kept is not computed again: no linear layer sees an earlier position."""
    arch, changes = VARIANTS[variant]
    model = make_model(arch, **changes).eval()
    batch, lengths = prompt_batch(model, PROMPTS, BOS)
    decoding = model.decoding(batch, lengths, 12)
    with torch.no_grad():
        decoding.start()
        seen = []
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
        decoding.extend(torch.tensor([1, 2, 3]))
    assert set(seen) == {1}


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_running_sums_do_not_drift(scale):
    """Attention grown key by key to 300 tokens, against attention at once; in fp32, where late keys
    may outweigh all before by far."""
    torch.manual_seed(0)
    hidden = torch.randn(2, 300, 4)
    queries, keys, values = (torch.randn(2, 300, heads, 8) for heads in (4, 2, 2))
    queries *= scale
    growing = GrowingAttention(300)
    for low, high in [(0, 3), *((n, n + 1) for n in range(3, 300))]:
        new = Projected(*(x[:, low:high] for x in (hidden, queries, keys, values)))
        positions = torch.arange(low, high).expand(2, -1)
        kept, found = growing.add(new, positions, torch.tensor([high, high]))
    exact = [x.double().transpose(1, 2) for x in (queries, keys, values)]
    expected = F.scaled_dot_product_attention(*exact, enable_gqa=True).transpose(1, 2)
    assert torch.equal(kept, hidden)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-6 * scale)


def test_running_sums_in_bfloat16_err_no_more_than_attention_at_once():
    """Grown key by key to 200 tokens; scores rounded to bf16 would err in every later sum."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 200, 4).bfloat16()
    queries, keys, values = (torch.randn(1, 200, 2, 16).bfloat16() for _ in range(3))
    queries *= 4
    growing = GrowingAttention(200)
    for low, high in [(0, 3), *((n, n + 1) for n in range(3, 200))]:
        new = Projected(*(x[:, low:high] for x in (hidden, queries, keys, values)))
        _, found = growing.add(new, torch.arange(low, high).expand(1, -1), torch.tensor([high]))
    parts = [x.transpose(1, 2) for x in (queries, keys, values)]
    at_once = F.scaled_dot_product_attention(*parts).transpose(1, 2)
    exact = F.scaled_dot_product_attention(*(x.double() for x in parts)).transpose(1, 2)
    assert (found - exact).norm() < 1.1 * (at_once - exact).norm()
