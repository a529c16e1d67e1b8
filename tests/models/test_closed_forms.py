"""`model_causal`, `model_full` and `6n` as sums written out by hand, over random models.

Letters: d width, f feed-forward, h heads of 2, hk = 2·h, kv width of the keys, x that of
cross-attention's, V vocabulary, S positions, L layers. A product of S positions by a matrix of n
elements is 2·S·n; attention of p pairs is 4·p·hk, and causally half of the pairs are seen.
"""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import named
from models.flops import parameters, training_flops

VOCAB = 50


@st.composite
def lengths(draw, count, total):
    """`total` cut into `count` lengths, some of which may be 0."""
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=count - 1, max_size=count - 1)))
    return tuple(b - a for a, b in itertools.pairwise([0, *cuts, total]))


@st.composite
def shapes(draw):
    """Sizes of a model, with grouped keys where heads allow them."""
    heads = draw(st.integers(1, 6))
    groups = [count for count in range(1, heads + 1) if heads % count == 0]
    return {
        "d_model": draw(st.integers(1, 40)),
        "d_ffn": draw(st.integers(1, 40)),
        "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from(groups)),
        "head_dim": 2,
        "num_layers": draw(st.integers(1, 6)),
    }


@settings(max_examples=100, deadline=None)
@given(shape=shapes(), depth=st.integers(1, 5), seq=st.integers(1, 200), data=st.data())
def test_ared(shape, depth, seq, data):
    """Both stacks and the bridge on every token, all three attentions causal and in documents."""
    parts = data.draw(st.one_of(st.just(()), lengths(3, seq)))
    grouped = data.draw(st.sampled_from([1, 2 * shape["num_heads"]]))
    loss = data.draw(st.sampled_from(["none", "mse"]))
    config = named(
        "ared",
        "nano",
        VOCAB,
        max_seq_len=seq,
        num_encoder_layers=depth,
        num_cross_heads=2 * shape["num_heads"],
        num_cross_kv_heads=grouped,
        embedding_loss=loss,
        **shape,
    )
    d, f, layers = shape["d_model"], shape["d_ffn"], shape["num_layers"]
    hk, kv, x = 2 * shape["num_heads"], 2 * shape["num_kv_heads"], grouped  # heads of 1
    own, crossed, fed = 2 * d * (hk + kv), 2 * d * (hk + x), 2 * d * f
    matrices = depth * (own + fed) + d * d + layers * (own + crossed + fed)
    found = training_flops(config, seq_len=seq, documents=parts)
    products = 2 * seq * (matrices + d * VOCAB)
    attention = (depth + 2 * layers) * 4 * hk
    assert found.model_full == 3 * (products + attention * seq**2)
    seen = sum(n**2 for n in parts or (seq,)) / 2
    assert found.model_causal == 3 * (products + attention * seen)
    # Norms: two a block, two more where it reads the encoder, the last; the loss's with biases.
    norms = 2 * depth + 4 * layers + 1 + 4 * (loss == "mse")
    assert found.six_n == 6 * seq * (matrices + norms * d)


@settings(max_examples=100, deadline=None)
@given(shape=shapes(), seq=st.integers(1, 60), data=st.data())
def test_entp_hybrids(shape, seq, data):
    """C causal layers on S positions; above them N = Σ t positions and Q = Σ t² pairs, the first
    layer's projections and attention once for all prefixes, the last one's results at S ends."""
    layers = shape["num_layers"]
    causal = data.draw(st.integers(0, layers - 1))
    config = named(
        "entp",
        "nano",
        VOCAB,
        max_seq_len=seq,
        entp_causal_layers=causal,
        entp_chunk_pairs=10**9,
        **shape,
    )
    d, f, heads = shape["d_model"], shape["d_ffn"], shape["num_heads"]
    hk, kv = 2 * heads, 2 * shape["num_kv_heads"]
    block = 2 * d * (hk + kv) + 2 * d * f
    pairs, squares = seq * (seq + 1) // 2, sum(t**2 for t in range(1, seq + 1))
    if causal == layers - 1:
        causal, above = layers, 0
    else:
        middle = layers - causal - 2
        above = 2 * seq * d * (hk + 2 * kv) + 4 * seq**2 * hk + 2 * pairs * (hk * d + 2 * d * f)
        above += middle * (2 * pairs * block + 4 * squares * hk)
        above += 2 * seq * (2 * d * hk + 2 * d * f)
        if kv == hk:  # queries and results absorb the keys' and values' matrices
            above += 2 * seq * 2 * d * hk + 4 * pairs * heads * d
        else:
            above += 2 * pairs * 2 * d * kv + 4 * pairs * hk
    above += causal * 2 * seq * block + 2 * seq * d * VOCAB
    found = training_flops(config, seq_len=seq)
    assert found.model_full == 3 * (above + causal * 4 * seq**2 * hk)
    assert found.model_causal == 3 * (above + causal * 2 * seq**2 * hk)
    biases = (hk + 2 * kv + d) + (f + d)
    body = layers * (block + biases + 4 * d) + 2 * d
    assert found.six_n == 6 * seq * body


@settings(max_examples=100, deadline=None)
@given(
    shape=shapes(),
    depth=st.integers(1, 5),
    seq=st.integers(1, 150),
    source=st.integers(1, 150),
    merged=st.booleans(),
    data=st.data(),
)
def test_encoder_decoders(shape, depth, seq, source, merged, data):
    """A target sees half of its own and all of its document's source, in one attention or two."""
    documents, sources = ((seq,), (source,))
    if data.draw(st.booleans()):
        documents, sources = (data.draw(lengths(3, size)) for size in (seq, source))
    config = named(
        "redllm",
        "nano",
        VOCAB,
        num_encoder_layers=depth,
        merged_attention=merged,
        **shape,
    )
    d, f, layers = shape["d_model"], shape["d_ffn"], shape["num_layers"]
    hk, kv = 2 * shape["num_heads"], 2 * shape["num_kv_heads"]
    own, crossed, fed = 2 * d * (hk + kv), 0 if merged else 2 * d * (hk + kv), 3 * d * f
    products = 2 * source * depth * (own + fed) + 2 * seq * layers * (own + fed)
    products += 2 * source * layers * 2 * d * kv + 2 * seq * d * VOCAB
    if not merged:
        products += 2 * seq * layers * 2 * d * hk
    found = training_flops(
        config,
        seq_len=seq,
        source_len=source,
        documents=documents,
        source_documents=sources,
    )
    pairs = depth * source**2 + layers * (seq**2 + seq * source)
    assert found.model_full == 3 * (products + 4 * hk * pairs)
    seen = depth * sum(m**2 for m in sources)
    seen += layers * sum(n**2 / 2 + n * m for n, m in zip(documents, sources, strict=True))
    assert found.model_causal == 3 * (products + 4 * hk * seen)
    norms = depth * 2 + 1 + layers * (2 if merged else 3) + 1
    body = depth * (own + fed) + layers * (own + crossed + fed) + norms * d
    assert (
        found.six_n
        == 6 * (seq + source) * body
        == 6 * (seq + source) * (parameters(config).non_embedding)
    )
