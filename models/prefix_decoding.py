"""ENTP's sequences that grow by a token at a time: what no further token changes is kept.

* Causal lower layers keep their keys and values; all layers do where the model is a decoder.
* Of the first bidirectional layer, queries, keys and values are the same in every prefix, and a
  key more moves what a token has read by a running sum (`GrowingAttention`): c products of a head's
  width instead of c².
* The layers above encode the new prefix; of the last one its last token alone.

Shape letters: B rows, S new tokens, M tokens so far, h heads, k head width, d model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.batch import Batch
from models.decoding import CachedDecoding, KeptBlock, causal_sight
from models.entp_layers import Projected, enter, project
from models.prefix_attention import Prefixes, scaled_scores, wide
from models.rotary import Rotary, rotary_tables

if TYPE_CHECKING:
    from models.entp import ENTP


class DecoderDecoding(CachedDecoding):
    """An ENTP all of whose layers are a decoder's."""

    model: ENTP

    def __init__(self, model: ENTP, batch: Batch, lengths: Tensor, room: int) -> None:
        super().__init__(model, batch, lengths, room)
        config = model.config
        count = config.num_layers if model.is_decoder else config.entp_causal_layers
        self._lower = [KeptBlock(block, self.room) for block in [*model.blocks][:count]]

    def states(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Of new tokens at `positions`."""
        return self.model.final_norm(self.lower_states(ids, positions)[0])

    def lower_states(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Rotary | None]:
        """New tokens [B, S] after the causal layers, [B, S, d], and their turns."""
        hidden, rotary = self.model.embed(ids, positions), None
        if self.model.config.positions == "rotary":
            rotary = rotary_tables(positions, self.model.config, hidden.dtype)
        visible = causal_sight(positions, self.longest)
        for block in self._lower:
            hidden = block(hidden, positions, visible, rotary)
        return hidden, rotary


class PrefixDecoding(DecoderDecoding):
    """An ENTP with at least two bidirectional layers."""

    def __init__(self, model: ENTP, batch: Batch, lengths: Tensor, room: int) -> None:
        super().__init__(model, batch, lengths, room)
        self._first = GrowingAttention(self.room)

    def start(self) -> Tensor:
        """Logits [B, vocab] of the token after each prompt."""
        size = self.longest
        positions = torch.arange(size, device=self.ids.device).expand(len(self.ids), -1)
        return self._next(self.ids[:, :size], positions)

    def extend(self, tokens: Tensor) -> Tensor:
        """Append `tokens` [B]; logits [B, vocab] of what comes after them."""
        positions = self.lengths.unsqueeze(1)
        self.lengths = self.lengths + 1
        return self._next(tokens.unsqueeze(1), positions)

    def _next(self, ids: Tensor, positions: Tensor) -> Tensor:
        model = self.model
        first, *_ = model.upper_layers
        projected = project(first, *self.lower_states(ids, positions))
        hidden, read = self._first.add(projected, positions, self.lengths)
        result = hidden.new_empty(len(hidden), hidden.shape[2])
        # Rows of one length together: nothing is padded.
        for length in self.lengths.unique().tolist():
            rows = (self.lengths == length).nonzero().squeeze(1)
            tokens, mixed = (x[rows, :length].transpose(0, 1) for x in (hidden, read))
            prefix = Prefixes((length,), hidden.device)
            result[rows] = model.finish(enter(first, tokens, mixed), prefix)[0]
        return model.embedding(result, "logits")


class GrowingAttention:
    """Attention without a mask among the tokens of each row, which become more.

    A key more changes what every token reads: its log-sum of scores Z grows, and the result moves
    towards the new value by exp(s − Z). Both are kept, at least in fp32.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: tuple[Tensor, ...] = ()

    def add(
        self, projected: Projected, positions: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """New tokens at `positions` [B, S]: the first time any number of them, then one.

        Args:
            lengths: [B], tokens of each row, the new ones included.
        Returns:
            Of all tokens the layer's input [B, M, d] and what they read [B, M, h, k]; M is the
            longest row, and what lies behind a row's end means nothing.

        Scores and sums are taken in at least fp32, as in training.
        """
        queries = projected.queries
        group = queries.shape[2] // projected.keys.shape[2]
        new_keys, new_values = (
            x.repeat_interleave(group, dim=2) for x in (projected.keys, projected.values)
        )
        is_first = not self._kept
        if is_first:
            results = wide(queries)
            log_sums = results.new_zeros(*queries.shape[:3], 1)
            shapes = projected.hidden, queries, new_keys, new_values, results, log_sums
            self._kept = tuple(x.new_zeros(len(x), self._room, *x.shape[2:]) for x in shapes)
        size = int(lengths.max())
        rows = torch.arange(len(queries), device=queries.device).unsqueeze(1)
        for kept, new in zip(
            self._kept, (projected.hidden, queries, new_keys, new_values), strict=False
        ):
            kept[rows, positions] = new
        hidden, all_queries, keys, values, results, log_sums = (x[:, :size] for x in self._kept)
        if not is_first:
            self._move(all_queries, new_keys, new_values, results, log_sums)
        behind = torch.arange(size, device=queries.device) >= lengths.view(-1, 1, 1, 1)
        scores = scaled_scores(queries, keys)
        scores = scores.masked_fill(behind, -torch.inf)  # [B, h, S, M]
        sums = scores.logsumexp(-1, keepdim=True)
        read = (scores - sums).exp() @ wide(values).transpose(1, 2)
        results[rows, positions] = read.transpose(1, 2)
        log_sums[rows, positions] = sums.transpose(1, 2)
        return hidden, results.to(hidden.dtype)

    @staticmethod
    def _move(
        queries: Tensor, new_keys: Tensor, new_values: Tensor, results: Tensor, log_sums: Tensor
    ) -> None:
        """Let all tokens but those of the longest rows' ends read one key more.

        A shorter row's newest token is among them; its own pass over the keys follows.
        """
        old = queries.shape[1] - 1
        scores = scaled_scores(queries[:, :old], new_keys).transpose(1, 2)  # [B, old, h, 1]
        log_sums[:, :old] = torch.logaddexp(log_sums[:, :old], scores)
        share = (scores - log_sums[:, :old]).exp()
        results[:, :old] = results[:, :old].lerp(new_values.to(results.dtype), share)
