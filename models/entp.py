"""ENTP: next-token prediction by an encoder, arXiv 2410.01600, exactly and without waste.

Token t + 1 is predicted by a full bidirectional encoder over tokens 0..t, read at t, anew for
every t: each (token, prefix) pair has hidden states of its own. What is saved is saved because it
is equal:

* In the first layer a token's query, key and value are the same in every prefix, so they are
  computed once, and attention in all prefixes is one pass over the keys (`shared_attention`).
* Of the last layer only each prefix's last token is read. Its query, output projection and
  feed-forward run on those tokens alone; where keys and values are plain projections they are
  absorbed into query and output (u = Wkᵀq; o = Wv Σ p·x), so no pair is projected.
* Between them, the prefixes are packed without padding.
* A chunk of prefixes is back-propagated before the next one is computed, down to what all chunks
  of its rows share; the gradients of that are collected and go on from there once. The longest
  prefixes come first, so that nothing is computed twice (`models/prefix_scan.py`).
  So a step holds the activations of one chunk, and of a group of rows what its prefixes share:
  O(h·T²) numbers a row, scores of the first layer foremost.

Two variants cost less and are other models or other estimates: with `entp_causal_layers` the lower
layers are a causal decoder's, the same for every prefix (with all but one the model *is* the
decoder, and is run as one); with `entp_sampled_prefixes` a loss is estimated from some prefixes.
The parameters are a DecLLM's of the same config, name by name: the authors' comparison is one
switch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import ENCODER_FIELDS, Batch
from models.block import Block, run_block
from models.config import ModelConfig
from models.decoding import CachedDecoding
from models.entp_layers import Projected, first_layer, last_layer, middle_layer, project, scan
from models.language_model import LanguageModel
from models.layers import make_norm
from models.losses import LossTerms
from models.prefix_attention import Prefixes
from models.prefix_chunks import Chunk, by_rows, plan_chunks, spread
from models.prefix_decoding import DecoderDecoding, PrefixDecoding
from models.prefix_scan import Run
from models.rotary import Rotary, rotary_tables


class _Part(NamedTuple):
    """Some prefixes of some rows: what `ENTP.forward` computes at once."""

    source: Projected | Run
    ends: list[int]
    """The prefixes, by their last tokens."""
    weight: float
    """Of each prefix's loss: 1, more where they are a sample, 0 where nobody asked for it."""

    def scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The prefixes' targets [B, P] in `batch`, and which of them count."""
        mask = batch.loss_mask[:, self.ends]
        return batch.targets[:, self.ends], mask if self.weight else torch.zeros_like(mask)


class ENTP(LanguageModel):
    """An encoder that predicts the next token of every prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = make_norm(config)

    @property
    def is_decoder(self) -> bool:
        """Whether a single layer is not causal: of that only a prefix's last token is read, which
        sees what a decoder's does."""
        return self.config.entp_causal_layers == self.config.num_layers - 1

    def forward(self, batch: Batch, z_loss: float = 0.0, part: _Part | None = None) -> LossTerms:
        """Loss sums over every scored prefix, held in memory at once; or over a part of them."""
        if part is None:
            return super().forward(batch, z_loss)
        hidden = self.read(part.source, part.ends)
        targets, mask = part.scored(batch)
        weights = None if batch.loss_weights is None else batch.loss_weights[:, part.ends]
        terms = self.embedding(hidden, "loss", targets, mask, z_loss, weights)
        if part.weight in (0.0, 1.0):
            return terms
        return LossTerms(*(term * part.weight for term in terms))

    def loss_chunks(self, batch: Batch, z_loss: float = 0.0) -> Iterator[LossTerms]:
        """Loss terms chunk by chunk; as many as the batch's shape and the config say.

        With sampled prefixes the sums are estimates, unbiased, that torch's global generator on the
        CPU decides. Each objective must be back-propagated before the next one is asked for: the
        last of some rows hands on what theirs have collected.

        Raises:
            RuntimeError: in the backward pass, where that was not done.
        """
        self._refuse(batch)
        if self.is_decoder:
            yield self(batch, z_loss)
            return
        sampled = self.config.entp_sampled_prefixes
        for rows, chunks in by_rows(self._plan(batch, sampled)):
            part = batch.rows(rows.start, rows.stop)
            around = rows.start, len(batch.targets) - rows.stop
            for chosen in self._parts(part, chunks, sampled):
                terms = self(part, z_loss, chosen)
                yield terms._replace(row_nll=F.pad(terms.row_nll, around))

    @torch.no_grad()
    def token_nll(self, batch: Batch) -> Tensor:
        """Nats of each target, [batch, seq] float32, 0 where loss_mask is False; none sampled."""
        self._refuse(batch)
        if self.is_decoder:
            return super().token_nll(batch)
        targets = batch.targets
        result = torch.zeros(targets.shape, device=targets.device, dtype=torch.float32)
        for rows, chunks in by_rows(self._plan(batch)):
            part = batch.rows(rows.start, rows.stop)
            for chosen in self._parts(part, chunks, 0):
                hidden = self.read(chosen.source, chosen.ends)
                nll = self.embedding(hidden, "nll", *chosen.scored(part))
                # Added, since a chunk without a prefix reads another one's, and scores it 0.
                result[rows, chosen.ends] += nll
        return result

    def _parts(self, part: Batch, chunks: Sequence[Chunk], sampled: int) -> Iterator[_Part]:
        """Each chunk's own of the prefixes of some rows, `part`; the last chunk first.

        A chunk without any reads token 0 alone: every rank calls the same modules.
        """
        reached, ends, weight = _drawn(part.loss_mask, sampled)
        projected = self.project(part.input_ids[:, :reached])
        own = [[e for e in ends[c.start : c.stop] if e is not None] for c in chunks]
        if weight > 1.0:
            leaves = Projected(*(_leaf(x) for x in projected))
            for chosen in own[:0:-1]:
                pairs = zip(leaves, projected, strict=True)
                source = Projected(*(leaf.to(x.dtype) for leaf, x in pairs))
                yield _Part(source, chosen, weight)
            final = projected if len(own) == 1 else _collecting(projected, leaves)
            yield _Part(final, own[0], weight)
            return
        parts = [range(some[0], some[-1] + 1) if some else range(0) for some in own]
        first = min((run.start for run in parts if run), default=0)
        for run in scan(projected, first).runs(parts):
            yield _Part(run, [*run.ends] or [0], 1.0 if run.ends else 0.0)

    def _refuse(self, batch: Batch) -> None:
        """Raise ValueError for what a prefix would have to ignore: it reaches back to its row's
        start, and sees all of it in both directions already."""
        batch.refuse("entp", "document_ids", "prefix_lengths", *ENCODER_FIELDS)

    def _plan(self, batch: Batch, sampled: int = 0) -> list[Chunk]:
        batch_size, seq_len = batch.input_ids.shape
        return plan_chunks(batch_size, seq_len, self.config.entp_chunk_pairs, sampled)

    def hidden_states(self, batch: Batch) -> Tensor:
        """[batch, seq, d_model], every prefix read at its end; holds all pairs at once."""
        self._refuse(batch)
        ids = batch.input_ids
        if self.is_decoder:
            hidden, _ = self.lower_layers(ids, self.config.num_layers)
            return self.final_norm(hidden)
        every = range(ids.shape[1])
        (run,) = scan(self.project(ids), 0).runs([every])
        return self.read(run, every)

    def lower_layers(self, ids: Tensor, count: int) -> tuple[Tensor, Rotary | None]:
        """`ids` [B, S] after `count` causal layers, [B, S, d], and the tables of S positions."""
        config = self.config
        hidden, rotary = self.embed(ids), None
        if config.positions == "rotary":
            positions = torch.arange(ids.shape[1], device=ids.device)
            rotary = rotary_tables(positions, config, hidden.dtype)
        for block in self.blocks[:count]:
            hidden = run_block(block, config, hidden, is_causal=True, rotary=rotary)
        return hidden, rotary

    @property
    def upper_layers(self) -> list[Block]:
        """The layers that see a prefix in both directions."""
        return [*self.blocks][self.config.entp_causal_layers :]

    def project(self, ids: Tensor) -> Projected:
        """What every prefix of `ids` [B, S] shares: up to the first bidirectional layer's heads."""
        hidden, rotary = self.lower_layers(ids, self.config.entp_causal_layers)
        first, *_ = self.upper_layers
        return project(first, hidden, rotary)

    def read(self, source: Projected | Run, ends: Sequence[int]) -> Tensor:
        """Hidden states [B, len(ends), d] of the prefixes that end at the tokens `ends`."""
        first, *_ = self.upper_layers
        prefixes = Prefixes(tuple(end + 1 for end in ends), source.hidden.device)
        pairs = run_block(first_layer, self.config, first, source, prefixes)
        return self.finish(pairs, prefixes).transpose(0, 1)

    def finish(self, pairs: Tensor, prefixes: Prefixes) -> Tensor:
        """`pairs` [pairs, B, d] after the first bidirectional layer → [P, B, d], each prefix read
        at its end."""
        config, rotary = self.config, None
        if config.positions == "rotary":
            # [pairs, 1, 1, k/2], for packed heads [pairs, B, h, k]
            positions = torch.arange(prefixes.longest, device=pairs.device)
            tables = rotary_tables(positions, config, pairs.dtype)
            cos, sin = (table[0, prefixes.tokens].unsqueeze(1) for table in tables)
            rotary = cos, sin
        _, *middle, last = self.upper_layers
        for block in middle:
            pairs = run_block(middle_layer, config, block, pairs, rotary, prefixes)
        return self.final_norm(run_block(last_layer, config, last, pairs, rotary, prefixes))

    def decoding(self, batch: Batch, lengths: Tensor, room: int) -> CachedDecoding:
        """Growing sequences: of each new prefix, what no earlier one has computed."""
        self._refuse(batch)
        kind = DecoderDecoding if self.is_decoder else PrefixDecoding
        return kind(self, batch, lengths, room)


def _drawn(loss_mask: Tensor, sampled: int) -> tuple[int, list[int | None], float]:
    """How many tokens reach the last scored position, at least one; the end of each prefix by its
    number, None where no row scores it; and the weight of each, the inverse of its probability.

    A sample is drawn of those from the first to the last scored position.
    """
    scored = loss_mask.any(0).nonzero()
    low, high = (int(scored[0]), int(scored[-1]) + 1) if len(scored) else (0, 0)
    seq_len = loss_mask.shape[1]
    if not 0 < sampled < seq_len:
        ends = [end if low <= end < high else None for end in range(seq_len)]
        return max(1, high), ends, 1.0
    offset = float(torch.rand((), dtype=torch.float64)) if sampled < high - low else 0.0
    drawn = spread(low, high, sampled, offset)
    return max(1, high), [*drawn], max(1.0, (high - low) / sampled)


def _leaf(shared: Tensor) -> Tensor:
    """What the chunks before the last back-propagate into: `shared`, at least in fp32, so that the
    gradients of many chunks add up."""
    wide = torch.promote_types(shared.dtype, torch.float32)
    return shared.detach().to(wide).requires_grad_(shared.requires_grad)


def _collecting(projected: Projected, leaves: Projected) -> Projected:
    """`projected`, whose gradients will have those of `leaves` added to them."""

    def add(gradient: Tensor, leaf: Tensor) -> Tensor:
        if leaf.grad is None:
            raise RuntimeError("loss_chunks: back-propagate each objective before asking for more")
        return (gradient + leaf.grad).to(gradient.dtype)

    for tensor, leaf in zip(projected, leaves, strict=True):
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient, leaf=leaf: add(gradient, leaf))
    return projected
