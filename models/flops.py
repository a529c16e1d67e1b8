"""Every FLOP of a sequence, in training and in use; from shapes alone, without torch.

One table of operations for each architecture (`operations`), and four conventions summed from it,
because papers and tools differ (1 multiply-add = 2 FLOPs; backward is twice forward):

* `6n`: 6·N·D, N non-embedding parameters, D the sequence's positions, source and target (2·N·D
  where nothing is trained). It knows no attention and no logits, counts an encoder-decoder about
  twofold (each parameter meets only its own side's tokens) and an ENTP many times too low.
* `model_causal`: matrix products, attention and logits; of attention only what its mask lets
  through, half where it is causal.
* `model_full`: the same with all attention in full, as PaLM and torch count it.
* `hardware`: what is executed: `model_full` and every recomputation, less attention between
  documents. Equals torch's FlopCounterMode with the math attention backend, run eagerly on a CPU.

Where documents are masked, that CPU attends to them one by one, and nothing across their borders
is computed. Elsewhere the counter finds more, every pair of the sequence, and `hardware` stays what
the documents need: under torch.compile; on a GPU in fp64, with heads narrower than 16 or with fewer
than 128 queries, where the mask is written out and all of it computed; and in any other run on a
GPU, where flex attention skips the blocks that nobody sees but is counted in full. A prefix mask
beside them is written out everywhere, and so counted here too (`Pass.skipped_pairs`).

Elementwise work (norms, softmax, activations, ENTP's scan over keys) counts in none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from models.config import ModelConfig
from models.operations import Operation, Pass, once
from models.parameter_counts import Parameters, embedding_parameters
from models.registry import architecture


@dataclass(frozen=True)
class Flops:
    """FLOPs by convention."""

    six_n: float
    model_causal: float
    model_full: float
    hardware: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            six_n=self.six_n + other.six_n,
            model_causal=self.model_causal + other.model_causal,
            model_full=self.model_full + other.model_full,
            hardware=self.hardware + other.hardware,
        )

    def __mul__(self, count: float) -> Flops:
        return Flops(
            six_n=self.six_n * count,
            model_causal=self.model_causal * count,
            model_full=self.model_full * count,
            hardware=self.hardware * count,
        )


def training_flops(
    config: ModelConfig,
    *,
    seq_len: int,
    source_len: int = 0,
    scored: int | None = None,
    prefix_len: int | None = None,
    documents: Iterable[int] = (),
    source_documents: Iterable[int] = (),
    rows: int = 1,
    activation_checkpointing: bool = False,
) -> Flops:
    """FLOPs of one training sequence, forward and backward.

    Args:
        seq_len: positions of the decoder, or of the only stack.
        source_len: positions of the encoder of an encoder-decoder.
        scored: how many positions, the last ones, carry loss; None for all. Logits are computed for
            these alone, and by ENTP whole prefixes.
        prefix_len: leading positions that see each other in both directions; None where a batch has
            no prefix mask.
        documents: lengths of the documents that attention stays inside; none where it does not.
        source_documents: lengths of their parts of the source, in the same order, 0 where none.
        rows: sequences of the micro-batch; of an ENTP some of whose positions carry no loss they
            decide how many chunks have nothing to do but a token.
        activation_checkpointing: count recomputation, also where the config does not ask for it.

    Raises:
        ValueError: lengths that the architecture cannot have.
    """
    step = Pass(
        tokens=seq_len,
        scored=seq_len if scored is None else scored,
        source=source_len,
        prefix=prefix_len,
        documents=tuple(documents),
        source_documents=tuple(source_documents),
        rows=rows,
    )
    return pass_flops(config, step, activation_checkpointing=activation_checkpointing)


def pass_flops(config: ModelConfig, step: Pass, *, activation_checkpointing: bool = False) -> Flops:
    """FLOPs of `step`, forward and backward; arguments as in `training_flops`.

    Raises:
        ValueError: lengths that the architecture cannot have.
    """
    table = operations(config, step)
    hardware = 3 * sum(op.forward - op.skipped for op in table)
    if activation_checkpointing or config.activation_checkpointing:
        hardware += sum(op.forward - op.skipped for op in table if op.recomputed)
    return Flops(
        six_n=6.0 * parameters(config).non_embedding * (step.tokens + step.source),
        model_causal=3.0 * _forward(table, causal=True),
        model_full=3.0 * _forward(table, causal=False),
        hardware=float(hardware),
    )


def prefill_pass(config: ModelConfig, prompt_len: int, *, bidirectional: bool = False) -> Pass:
    """All that precedes the first generated token: the prompt read, and one row of logits.

    An encoder reads the prompt of an encoder-decoder, whose decoder takes its first step.

    Args:
        bidirectional: a decoder's prompt sees itself in both directions, as `generate` has it; an
            encoder's always does.

    Raises:
        ValueError: prompt_len is below 1, or a prompt in both directions for a model without a
            prefix mask.
    """
    if prompt_len < 1:
        raise ValueError(f"prompt_len={prompt_len}: too short; give at least 1")
    described = architecture(config.arch)
    if described.encodes_prefix:
        return Pass(tokens=1, scored=1, source=prompt_len, training=False)
    if bidirectional and not described.has_prefix_mask:
        raise ValueError(f"bidirectional=True: {config.arch} has no prefix mask; give False")
    prefix = prompt_len if bidirectional else None
    return Pass(tokens=prompt_len, scored=1, prefix=prefix, training=False)


def decode_pass(config: ModelConfig, prompt_len: int, context_len: int) -> Pass:
    """One further token, with `context_len` tokens to see: the prompt's and those generated.

    Raises:
        ValueError: the context does not go beyond the prompt.
    """
    if not 1 <= prompt_len < context_len:
        raise ValueError(
            f"context_len={context_len}: does not go beyond prompt_len={prompt_len}; give more"
        )
    if architecture(config.arch).encodes_prefix:
        # The decoder starts from a token of its own and has seen `generated` of the text's.
        generated = context_len - prompt_len
        return Pass(
            tokens=1,
            scored=1,
            source=prompt_len,
            is_source_cached=True,
            cached=generated,
            training=False,
        )
    return Pass(tokens=1, scored=1, cached=context_len - 1, training=False)


def inference_flops(config: ModelConfig, step: Pass) -> Flops:
    """FLOPs of `prefill_pass` or `decode_pass`: forward alone.

    Raises:
        ValueError: lengths that the architecture cannot have.
    """
    table = operations(config, step)
    positions = step.tokens + (0 if step.is_source_cached else step.source)
    return Flops(
        six_n=2.0 * parameters(config).non_embedding * positions,
        model_causal=float(_forward(table, causal=True)),
        model_full=float(_forward(table, causal=False)),
        hardware=float(sum(operation.forward for operation in table)),
    )


def operations(config: ModelConfig, step: Pass) -> list[Operation]:
    """The table of one sequence's forward pass.

    Raises:
        ValueError: lengths that the architecture cannot have.
    """
    described = architecture(config.arch)
    if described.encodes_prefix and step.source < 1:
        raise ValueError(f"source_len={step.source}: {config.arch} has an encoder; give its length")
    if step.source and not described.encodes_prefix:
        raise ValueError(
            f"source_len={step.source}: {config.arch} has no source of its own; give 0"
        )
    if step.prefix is not None and not described.has_prefix_mask:
        raise ValueError(f"prefix_len={step.prefix}: {config.arch} has no prefix mask; give none")
    if step.documents and not described.has_document_mask:
        raise ValueError(
            f"documents={step.documents}: {config.arch} reads a row as one document; give none"
        )
    head = 2 * described.logit_positions(config, step) * config.d_model * config.vocab_size
    return [*described.operations(config, step), once("logits", head)]


def _forward(table: Iterable[Operation], *, causal: bool) -> int:
    """What the model itself needs: no masked attention where `causal`."""
    return sum(op.forward - (op.masked if causal else 0) for op in table)


def parameters(config: ModelConfig) -> Parameters:
    """Numbers of parameters of the built model."""
    body = architecture(config.arch).parameters(config)
    tokens, positions = embedding_parameters(config)
    return Parameters(
        total=tokens + positions + body.active + body.idle,
        non_embedding=body.active + body.idle,
        active=tokens + body.active,
    )
