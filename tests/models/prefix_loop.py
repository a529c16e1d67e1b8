"""ENTP as it is defined: a loop that encodes every prefix anew."""

import torch

from models.losses import linear_cross_entropy
from models.rotary import rotary_tables

LLAMA = {
    "positions": "rotary",
    "norm": "rmsnorm",
    "bias": False,
    "feed_forward": "swiglu",
    "qkv_norm": True,
}
STYLES = {"gpt2": {}, "llama": LLAMA, "plain rotary": {"positions": "rotary"}}


def loop_hidden(model, ids):
    """The definition: every block, bidirectional (but the hybrid's lower ones, causal), on tokens
    0..t, read at t, for every t."""
    read = []
    for length in range(1, ids.shape[1] + 1):
        hidden = model.embed(ids[:, :length])
        rotary = None
        if model.config.positions == "rotary":
            rotary = rotary_tables(torch.arange(length), model.config, hidden.dtype)
        for number, block in enumerate(model.blocks):
            is_causal = number < model.config.entp_causal_layers
            hidden = block(hidden, is_causal=is_causal, rotary=rotary)
        read.append(model.final_norm(hidden)[:, -1])
    return torch.stack(read, 1)


def loop_gradients(model, batch, z_loss):
    model.zero_grad()
    hidden = loop_hidden(model, batch.input_ids)
    weight = model.embedding.weight
    weights = batch.loss_weights
    terms = linear_cross_entropy(hidden, weight, batch.targets, batch.loss_mask, z_loss, weights)
    terms.objective.backward()
    zero = torch.zeros(())
    return terms, {n: zero if p.grad is None else p.grad for n, p in model.named_parameters()}
