"""Every choice that a config accepts, in any combination: what holds of all models."""

import dataclasses

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.flops import parameters
from models.registry import ARCHITECTURES, architecture


def padded(batch, extra):
    """The same batch with `extra` unscored positions at the right end of what it holds."""
    own = ("input_ids", "targets", "loss_mask", "document_ids")
    source = ("encoder_ids", "encoder_mask", "encoder_document_ids")
    fields = {name: getattr(batch, name) for name in own + source}
    if batch.encoder_ids is not None and batch.encoder_mask is None:
        fields["encoder_mask"] = torch.ones_like(batch.encoder_ids, dtype=torch.bool)
    longer = {name: F.pad(x, (0, extra)) for name, x in fields.items() if x is not None}
    return dataclasses.replace(batch, **longer)


def with_documents(batch):
    """The same batch, every row of three documents, one of which the decoder alone has."""

    def cut(ids, first, last):
        edges = torch.randint(ids.shape[1] + 1, (len(ids), 2)).sort(1).values
        documents = (torch.arange(ids.shape[1]) >= edges[:, :1]).long() + first
        return documents + (torch.arange(ids.shape[1]) >= edges[:, 1:]).long() * last

    source = batch.encoder_ids
    return dataclasses.replace(
        batch,
        document_ids=cut(batch.input_ids, 1, 1),
        encoder_document_ids=None if source is None else cut(source, 0, 1),
    )


SWITCHES = {
    "entp_causal_layers": [0, 0, 1],
    "entp_sampled_prefixes": [0, 0, 3],
    "entp_chunk_pairs": [20, 960],
    "num_kv_heads": [1, 2],
    "qkv_norm": [True, False],
    "norm": ["rmsnorm", "layernorm"],
    "bias": [True, False],
    "feed_forward": ["swiglu", "gelu"],
    "attention_output_norm": ["none", "head", "model", "output"],
    "positions": ["rotary", "learned"],
    "scale_embedding": [True, False],
    "restart_positions": [True, False],
    "activation_checkpointing": [True, False],
    "encoder_final_norm": [True, False],
    "merged_attention": [True, False],
    "cross_attention_first": [True, False],
    "num_cross_heads": [0, 1, 4],
    "num_cross_kv_heads": [0, 2],
    "positional_subtraction": [True, False],
    "positional_subtraction_norm": [True, False],
    "bridge_norm": [True, False],
    "bridge_next_position": [True, False],
    "embedding_loss": ["none", "mse", "cosine", "log_cosine"],
    "embedding_loss_detach": ["encoder", "embedding", "none"],
    "embedding_encoder_norm": [True, False],
    "embedding_mean_norm": ["before", "after", "none"],
    "embedding_loss_affine": [True, False],
}


class Gathered:
    """ZeRO-3's rule: a parameter has its values only inside the forward of the module that owns it
    (and, there being one process, at once in all modules that are running)."""

    def __init__(self, model):
        self.values = {p: p.detach().clone() for p in model.parameters()}
        for parameter in self.values:
            parameter.data = parameter.data.new_empty(0)
        self.hooks = []
        for module in model.modules():
            self.hooks.append(module.register_forward_pre_hook(self.gather))
            self.hooks.append(module.register_forward_hook(self.release))

    def gather(self, module, args):
        for parameter in module.parameters(recurse=False):
            parameter.data = self.values[parameter]

    def release(self, module, args, output):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.new_empty(0)

    def end(self):
        for hook in self.hooks:
            hook.remove()
        for parameter, value in self.values.items():
            parameter.data = value


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_choices_together(make_model, make_batch, gradients, data):
    """Any combination that the config accepts, on any batch: ZeRO-3 can run it, padding on either
    side changes nothing, every parameter has a gradient, and the table counts them."""
    arch = data.draw(st.sampled_from(list(ARCHITECTURES)))
    others = frozenset().union(*(architecture(name).fields for name in ARCHITECTURES))
    allowed = SWITCHES.keys() - (others - architecture(arch).fields)
    choices = {field: data.draw(st.sampled_from(SWITCHES[field])) for field in sorted(allowed)}
    torch.manual_seed(data.draw(st.integers(0, 999)))
    try:
        model = make_model(arch, **choices)
    except ValueError as error:
        assume("give" not in str(error))  # an impossible combination, refused with its remedy
        raise
    seq_len, source_len = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 9))
    batch = make_batch(arch, data.draw(st.integers(1, 3)), seq_len, source_len)
    if architecture(arch).has_document_mask and data.draw(st.booleans()):
        batch = with_documents(batch)
    if architecture(arch).has_prefix_mask and data.draw(st.booleans()):
        prefixes = torch.randint(seq_len + 1, (len(batch.targets),))
        batch = dataclasses.replace(batch, prefix_lengths=prefixes)
    assert parameters(model.config).total == sum(p.numel() for p in model.parameters())
    expected, nll = model(batch, 0.01).objective.detach(), model.token_nll(batch)
    gathered = Gathered(model)
    with torch.no_grad():
        torch.testing.assert_close(model(batch, 0.01).objective, expected)
        torch.testing.assert_close(model.token_nll(batch), nll)
        for _ in model.loss_chunks(batch, 0.01):
            pass
    gathered.end()
    found = {name: g.clone() for name, g in gradients(model, batch).items()}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    if not choices.get("entp_sampled_prefixes"):  # a longer row is another draw
        torch.testing.assert_close(gradients(model, padded(batch, 4)), found)
    torch.testing.assert_close(model.token_nll(padded(batch, 4))[:, :seq_len], nll)
