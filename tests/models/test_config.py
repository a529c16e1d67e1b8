"""Named shapes against the papers' tables, and parameter counts against built models."""

import math
import subprocess
import sys

import pytest
import torch

from models.config import ModelConfig, named
from models.config_checks import PARTICULAR
from models.flops import parameters
from models.registry import ARCHITECTURES, architecture, build
from models.shapes import SIZES, sizes_of

# arXiv 2510.26622, table 2(a); millions of parameters without embeddings and norm gains, and in
# total with a vocabulary of 32,768.
PAPER = {
    "150m": (1024, 4096, 8, 8, 3, 134.2, 167.8, 113.2, 146.8),
    "1b": (2048, 8192, 16, 16, 7, 1073.7, 1140.9, 1057.0, 1124.1),
    "2b": (2560, 10240, 20, 20, 9, 2097.2, 2181.0, 2123.4, 2207.3),
    "4b": (3072, 12288, 24, 24, 10, 3623.9, 3724.5, 3397.4, 3498.0),
    "8b": (4096, 16384, 32, 32, 14, 8589.9, 8724.2, 8455.7, 8589.9),
}
EVERY = [(arch, size) for arch in ARCHITECTURES for size in sizes_of(arch)]


@pytest.mark.parametrize("size", PAPER)
def test_paper_shapes_and_counts(size):
    d_model, d_ffn, heads, layers, paired, dec, dec_total, red, red_total = PAPER[size]
    for arch, depth, encoder, body, total in (
        ("decllm", layers, 0, dec, dec_total),
        ("redllm", paired, paired, red, red_total),
    ):
        config = named(arch, size, 32_768)
        assert (config.d_model, config.d_ffn, config.num_heads) == (d_model, d_ffn, heads)
        assert (config.head_dim, config.num_layers, config.num_encoder_layers) == (
            128,
            depth,
            encoder,
        )
        norms = 2 * depth + 1 + (3 * paired + 1 if encoder else 0)
        count = parameters(config)
        assert (count.non_embedding - norms * d_model) / 1e6 == pytest.approx(body, abs=0.1)
        assert (count.total - norms * d_model) / 1e6 == pytest.approx(total, abs=0.1)


@pytest.mark.parametrize(("arch", "size"), EVERY)
def test_counts_equal_the_built_model(arch, size):
    config = named(arch, size, 1000, max_seq_len=64)
    with torch.device("meta"):
        model = build(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    body = {name: n for name, n in sizes.items() if "embedding.weight" not in name}
    count = parameters(config)
    assert count.total == sum(sizes.values())
    assert count.non_embedding == sum(body.values())


PAIRS, LEARNED = ("redllm", "ared"), {"positions": "learned", "positional_subtraction": True}
CHANGES = [
    (tuple(ARCHITECTURES), {"num_kv_heads": 1}),
    (tuple(ARCHITECTURES), {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}),
    (tuple(ARCHITECTURES), {"bias": True, "norm": "layernorm"}),
    (tuple(ARCHITECTURES), {"bias": True, "norm": "rmsnorm", "feed_forward": "gelu"}),
    (PAIRS, {"num_encoder_layers": 4}),
    (PAIRS, {"num_heads": 4, "head_dim": 8, "num_cross_heads": 4, "num_cross_kv_heads": 2}),
    (("redllm",), {"encoder_final_norm": False}),
    (("redllm",), {"merged_attention": True}),
    (("redllm",), {"merged_attention": True, "num_kv_heads": 1, "bias": True}),
    (("decllm", "ared"), LEARNED),
    (("decllm", "ared"), LEARNED | {"positional_subtraction_norm": True}),
    (("ared",), {"bridge_norm": True, "bridge_next_position": True, "bias": True}),
    (("ared",), {"positional_subtraction": False, "bridge_next_position": True}),
    (("ared",), {"embedding_loss_affine": False}),
    (("ared",), {"embedding_encoder_norm": False}),
    (("ared",), {"embedding_mean_norm": "none"}),
    (("ared",), {"embedding_mean_norm": "after"}),
]


@pytest.mark.parametrize(
    ("arch", "change"), [(arch, change) for archs, change in CHANGES for arch in archs]
)
def test_counts_follow_the_choices(arch, change):
    config = named(arch, "nano", 50, max_seq_len=8, **change)
    with torch.device("meta"):
        model = build(config)
    assert parameters(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("arch", "change", "heads", "kv_heads", "width"),
    [
        ("redllm", {}, 4, 2, 16),
        ("redllm", {"num_cross_kv_heads": 1}, 4, 1, 8),
        ("ared", {}, 8, 4, 16),  # twice the heads of half the width: keys as wide
        ("ared", {"num_cross_kv_heads": 8}, 8, 8, 32),
    ],
)
def test_cross_attention_shares_keys_as_self_attention_does(arch, change, heads, kv_heads, width):
    config = named(arch, "nano", 50, num_heads=4, num_kv_heads=2, head_dim=8, **change)
    assert (config.cross_heads, config.cross_kv_heads) == (heads, kv_heads)
    crossed = build(config).decoder[0].cross_attention
    assert crossed.key.out_features == crossed.value.out_features == width


@pytest.mark.parametrize(
    ("arch", "size", "published"),
    [
        ("ared", "ared-15m", 15_763_500),
        ("decllm", "ared-baseline", 16_036_800),
        ("decllm", "ared-baseline-small", 15_441_192),
    ],
)
def test_published_counts_of_the_auto_regressive_encoder_decoder(arch, size, published):
    """The publication leaves the table of positions out of its counts."""
    with torch.device("meta"):
        model = build(named(arch, size, 50_257, max_seq_len=200))
    counted = {
        name: p.numel()
        for name, p in model.named_parameters()
        if not name.startswith("position_embedding")
    }
    assert sum(counted.values()) == published


def test_the_ladder_grows():
    ladder = list(SIZES)[: list(SIZES).index("8b") + 1]
    assert ladder[:8] == ["nano", "micro", "mini", "tiny", "small", "base", "medium", "100m"]
    for arch in ARCHITECTURES:
        counts = [parameters(named(arch, size, 100)).non_embedding for size in ladder]
        assert counts == sorted(counts)


@pytest.mark.parametrize("size", list(SIZES)[:8])
def test_the_ladder_compares_like_with_like(size):
    """RedLLM and ARED have about the parameters of the decoder of their own style."""
    for two_stacks, decoder in (("redllm", "decllm"), ("ared", "entp")):
        pair, single = (
            parameters(named(arch, size, 100, max_seq_len=8)).non_embedding
            for arch in (two_stacks, decoder)
        )
        assert 0.85 < pair / single < 1.25


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: named("bert", "1b", 10), ("arch='bert'", "decllm")),
        (lambda: named("decllm", "3b", 10), ("size='3b'", "150m")),
        (lambda: named("ared", "entp-small", 10), ("size='entp-small'", "ared-15m")),
        (lambda: named("decllm", "1b", 10, depth=3), ("depth=3", "num_layers")),
        (lambda: named("decllm", "1b", 10, norm="batch"), ("norm='batch'", "rmsnorm")),
        (lambda: named("decllm", "1b", 0), ("vocab_size=0", "at least 1")),
        (lambda: named("decllm", "nano", 10, num_layers=True), ("num_layers=True", "an int")),
        (lambda: named("decllm", "nano", 10, d_ffn=2.5), ("d_ffn=2.5", "an int")),
        (lambda: named("decllm", "nano", 10, d_model="8"), ("d_model='8'", "an int")),
        (lambda: named("decllm", "nano", 10, rope_base=0), ("rope_base=0", "more than 0")),
        (lambda: named("decllm", "nano", 10, rope_base=math.inf), ("rope_base=inf",)),
        (lambda: named("decllm", "nano", 10, norm_eps=-1.0), ("norm_eps=-1.0", "at least 0")),
        (lambda: named("decllm", "nano", 10, norm_eps=math.nan), ("norm_eps=nan",)),
        (lambda: named("decllm", "nano", 10, norm_eps="1e-6"), ("norm_eps='1e-6'", "a number")),
        (lambda: named("decllm", "nano", 10, init_std=-1), ("init_std=-1", "at least 0")),
        (
            lambda: named("ared", "nano", 10, embedding_loss_coefficient=-1),
            ("embedding_loss_coefficient=-1", "at least 0"),
        ),
        (lambda: named("decllm", "nano", 10, dropout=math.nan), ("dropout=nan",)),
        (lambda: named("decllm", "1b", 10, num_kv_heads=3), ("num_kv_heads=3", "divisor")),
        (lambda: named("decllm", "1b", 10, head_dim=3), ("head_dim=3", "even")),
        (lambda: named("redllm", "1b", 10, num_encoder_layers=0), ("num_encoder_layers=0",)),
        (lambda: named("ared", "nano", 10, num_cross_heads=5), ("num_cross_heads=5", "divisor")),
        (lambda: named("decllm", "1b", 10, dropout=1.0), ("dropout=1.0", "0 ≤")),
        (lambda: named("redllm", "nano", 10, positions="learned"), ("positions=",)),
        (lambda: named("ared", "nano", 10, positions="rotary"), ("positional_subtraction",)),
        (
            lambda: named("redllm", "nano", 10, num_cross_kv_heads=3),
            ("num_cross_kv_heads=3", "divisor"),
        ),
        (
            lambda: named("redllm", "nano", 10, num_heads=4, num_kv_heads=1, num_cross_heads=2),
            ("num_cross_kv_heads=0", "divisor"),
        ),
        (
            lambda: named("redllm", "nano", 10, head_dim=2, num_cross_heads=4),
            ("num_cross_heads=1", "even"),
        ),
        (lambda: named("entp", "nano", 10, merged_attention=True), ("merged_attention", "redllm")),
        (
            lambda: named("decllm", "nano", 10, positional_subtraction_norm=True),
            ("positional_subtraction_norm", "too"),
        ),
    ],
)
def test_mistakes_name_field_value_and_remedy(call, words):
    with pytest.raises(ValueError, match="give") as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="arch='x'"):
        ModelConfig("x", 1, 1, 1, 1, 1, 2, 1)


def test_shapes_need_no_torch():
    code = (
        "import sys, models.config, models.flops, models.registry; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_particular_fields_are_those_that_some_architecture_claims():
    claimed = {field for name in ARCHITECTURES for field in architecture(name).fields}
    assert claimed == set(PARTICULAR)
