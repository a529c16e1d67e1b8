"""ENTP in fp32 and bf16 against itself in float64 and against the loop over prefixes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.prefix_loop import STYLES, loop_gradients


def errors(found, exact):
    """Relative errors of (loss, gradients): each gradient by itself; one that is naught but
    rounding, a key bias's, by the largest."""
    floor = 1e-3 * max(g.norm() for g in exact[1].values())
    relative = {"loss": float(abs(found[0] - exact[0]) / exact[0])}
    for name, gradient in found[1].items():
        distance = (gradient.double() - exact[1][name]).norm()
        relative[name] = float(distance / max(exact[1][name].norm(), floor))
    return relative


@settings(max_examples=12, deadline=None)
@given(
    style=st.sampled_from(sorted(STYLES)),
    num_layers=st.integers(2, 4),
    causal_layers=st.sampled_from([0, 0, 1, 2]),
    num_kv_heads=st.sampled_from([1, 2]),
    seq_len=st.sampled_from([5, 20, 64]),
    seed=st.integers(0, 999),
)
def test_float32_is_within_1e_5(
    make_model, make_batch, gradients, style, num_layers, causal_layers, num_kv_heads, seq_len, seed
):
    """Loss and gradients; where a gradient's own conditioning loses more, it is no further off than
    the plain loop's in fp32."""
    torch.manual_seed(seed)
    model = make_model(
        "entp",
        num_layers=num_layers,
        entp_causal_layers=min(causal_layers, num_layers - 1),
        num_kv_heads=num_kv_heads,
        max_seq_len=64,
        spread=0.2,
        **STYLES[style],
    )
    batch = make_batch("entp", seq_len=seq_len, scored=1.1)

    def ours():
        found = {name: g.double() for name, g in gradients(model, batch).items()}
        chunks = model.loss_chunks(batch, 0.01)
        return sum(terms.objective.detach().double() for terms in chunks), found

    exact = ours()
    model.float()
    found, loop = errors(ours(), exact), None
    assert found["loss"] <= 1e-5
    for name, error in found.items():
        if error <= 1e-5:
            continue
        if loop is None:
            terms, of_loop = loop_gradients(model, batch, 0.01)
            loop = errors((terms.objective.detach().double(), of_loop), exact)
        assert error <= 1.5 * loop[name], name


FIRST_LAYER = [f"blocks.0.attention.{name}.weight" for name in ("query", "key", "value")]


def test_bfloat16_is_as_near_as_the_loop_over_prefixes(make_model, make_batch, gradients):
    """Where one chunk holds everything and, of what is collected from chunks, where 20 do."""
    model = make_model("entp", num_layers=2, max_seq_len=96, entp_chunk_pairs=10_000).bfloat16()
    many = make_model("entp", num_layers=2, max_seq_len=96, entp_chunk_pairs=250).bfloat16()
    many.load_state_dict(model.state_dict())
    batch = make_batch("entp", batch_size=1, seq_len=96, scored=1.0)
    found = {name: g.clone() for name, g in gradients(model, batch).items()}
    loop = {name: g.clone() for name, g in loop_gradients(model, batch, 0.01)[1].items()}
    collected = gradients(many, batch)
    exact = gradients(model.double(), batch)

    def error(ours, names):
        return torch.stack([(ours[n].double() - exact[n]).norm() for n in names]).norm()

    # On a CPU torch's LayerNorm adds up the gradients of gain and bias in bf16, row after row.
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    assert error(found, matrices) < 1.2 * error(loop, matrices)
    assert error(collected, FIRST_LAYER) < 1.2 * error(loop, FIRST_LAYER)
