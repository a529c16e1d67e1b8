"""What a model is given: one batch of sequences."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Token ids and what is to be predicted. Padding is always at the right end.

    `targets[:, t]` is predicted at `input_ids[:, t]`; inputs are the targets shifted right with
    [BOS] in front, which the objective does and not the model.
    """

    input_ids: Tensor
    """[batch, seq] int64: what the decoder, or the only stack, reads."""
    targets: Tensor
    """[batch, seq] int64."""
    loss_mask: Tensor
    """[batch, seq] bool: the targets that count."""
    encoder_ids: Tensor | None = None
    """[batch, source] int64: what the encoder reads."""
    encoder_mask: Tensor | None = None
    """[batch, source] bool: True for a real token; None when every one is."""
    prefix_lengths: Tensor | None = None
    """[batch] int64: leading positions of input_ids that see each other in both directions."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        values = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return Batch(**values)
