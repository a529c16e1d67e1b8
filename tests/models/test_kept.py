"""The torch-free tables of parameters, of what is kept, and of what is held where nothing is kept,
against built models, autograd and live tensors."""

from __future__ import annotations

import math

import pytest
import torch

from models import activations
from models.batch import Batch
from models.config import ModelConfig, named
from models.head_rows import nll_bytes
from models.operations import Pass
from models.parameter_shapes import embedding_shapes
from models.registry import architecture, build
from tests.models.live_storages import LiveStorages

ROWS, TOKENS, VOCAB_SIZE = 3, 48, 97
SWITCHES: dict[str, list[dict]] = {
    "decllm": [
        {},
        {"norm": "layernorm", "bias": True, "feed_forward": "gelu", "positions": "learned"},
        {"num_kv_heads": 1, "attention_output_norm": "model"},
        {"qkv_norm": False, "positions": "learned", "positional_subtraction": True,
         "positional_subtraction_norm": True},
    ],
    "redllm": [
        {},
        {"num_cross_heads": 4, "encoder_final_norm": False, "attention_output_norm": "output"},
        {"merged_attention": True},
    ],
    "entp": [{}, {"entp_causal_layers": 1}, {"qkv_norm": True, "positions": "rotary"}],
    "ared": [{}, {"embedding_loss": "none", "bridge_norm": True}, {"bias": True}],
}  # fmt: skip
CASES = [(arch, switch) for arch, switches in SWITCHES.items() for switch in switches]


def listed(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    shapes = architecture(config.arch).shapes
    assert shapes is not None
    return [*embedding_shapes(config), *shapes(config)]


def model_of(arch: str, switch: dict, **more: int) -> ModelConfig:
    return named(arch, "nano", VOCAB_SIZE, **({"max_seq_len": TOKENS} | switch | more))


@pytest.mark.parametrize(("arch", "switch"), CASES)
def test_parameters_are_the_models_in_its_order(arch: str, switch: dict) -> None:
    config = model_of(arch, switch, num_layers=3)
    with torch.device("meta"):
        model = build(config)
    assert listed(config) == [(n, tuple(p.shape)) for n, p in model.named_parameters()]


def saved_bytes(model: torch.nn.Module, batch: Batch) -> int:
    """The most that a backward call finds saved: storages of numbers, each once, no parameter."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor
        return tensor

    most = 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for terms in model.loss_chunks(batch, 1e-4):
            most = max(most, sum(t.untyped_storage().nbytes() for t in kept.values()))
            terms.objective.backward()
            if not hasattr(model, "read"):
                kept.clear()
                continue
            # What ENTP's chunks share stays.
            shared = {p for p, t in kept.items() if t.dim() in (3, 4) and t.shape[1] == TOKENS}
            kept = {p: t for p, t in kept.items() if p in shared}
    return most


@pytest.mark.parametrize(("arch", "switch"), CASES)
def test_what_is_kept_is_what_autograd_saves(arch: str, switch: dict) -> None:
    config = model_of(arch, switch, num_layers=4, entp_chunk_pairs=400)
    torch.manual_seed(0)
    model = build(config).float()
    ids = torch.randint(VOCAB_SIZE, (ROWS, TOKENS))
    source = TOKENS // 2 if architecture(arch).encodes_prefix else 0
    target = ids[:, source:]
    scored = torch.ones_like(target, dtype=torch.bool)
    batch = Batch(target, target.clone(), scored, encoder_ids=ids[:, :source] if source else None)
    measured = saved_bytes(model, batch)
    step = Pass(tokens=TOKENS - source, scored=TOKENS - source, source=source)
    described = architecture(arch).kept
    assert described is not None
    rounds = list(described(config, ROWS, step))
    own = max(sum(s.kept.bytes(4, on_cpu=True) for s in run.segments) for run in rounds)
    beside = max(run.beside.bytes(4, on_cpu=True) for run in rounds)
    if arch == "entp":
        # Of what its chunks share, gradients and copies are no saved tensors.
        assert 0.95 * own < measured < own + beside, (own, beside, measured)
    else:
        assert math.isclose(own + beside, measured, rel_tol=0.02), (own + beside) / measured


def scored_peak(model: torch.nn.Module, batch: Batch) -> int:
    """Most bytes of the tensors that `token_nll` makes."""
    there = [*model.parameters(), *vars(batch).values()]
    with LiveStorages() as live:
        # Views of them would be counted as new.
        seen = [x.view_as(x) for x in there if isinstance(x, torch.Tensor)]
        live.peak = before = live.bytes
        model.token_nll(batch)  # type: ignore[operator]
        del seen
    return live.peak - before


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("arch", "switch"), CASES)
def test_what_an_evaluation_holds_is_what_is_alive(
    arch: str, switch: dict, precision: torch.dtype
) -> None:
    rows, tokens, width = 8, 128, precision.itemsize
    config = model_of(arch, switch | {"max_seq_len": tokens}, num_layers=4, entp_chunk_pairs=4_000)
    torch.manual_seed(0)
    model = build(config).to(precision).eval()
    ids = torch.randint(VOCAB_SIZE, (rows, tokens))
    source = tokens // 2 if architecture(arch).encodes_prefix else 0
    target = ids[:, source:]
    scored = torch.ones_like(target, dtype=torch.bool)
    scored[:, : tokens // 2 - source] = False
    batch = Batch(target, target.clone(), scored, encoder_ids=ids[:, :source] if source else None)
    measured = scored_peak(model, batch)
    # Of a CPU's own kernel for GELU, three pieces whatever the size of the model.
    scratch = 3 * 4 * activations._BLOCK if config.feed_forward == "gelu" and width == 4 else 0
    step = Pass(tokens=tokens - source, scored=tokens // 2, source=source, training=False)
    described = architecture(arch).kept
    assert described is not None
    said = []
    for run in described(config, rows, step):
        passing = max(s.passing.bytes(width, on_cpu=True) for s in run.segments)
        said.append(passing + run.carried.bytes(width, on_cpu=True))
        counts = {"states": run.states, "scored": run.scored}
        said.append(nll_bytes(VOCAB_SIZE, config.d_model, **counts, width=width, on_cpu=True))
    assert 0.92 * (measured - scratch) < max(said) < 1.08 * measured, (max(said), measured)


def test_every_architecture_of_ours_can_be_planned() -> None:
    for arch in ("decllm", "redllm", "entp", "ared"):
        assert architecture(arch).shapes is not None
        assert architecture(arch).kept is not None
