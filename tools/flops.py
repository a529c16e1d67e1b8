"""`isoflop flops`: what a model of a named size holds and costs, before anything is run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from models.config import SIZES, STYLES, ModelConfig, named
from models.flops import Flops, Operation, Parameters, operations, parameters, training_flops
from pipeline.options import UserError, option


@dataclass(frozen=True)
class Options:
    """Parameters and training FLOPs of an architecture and named size, in four conventions.

    six_n: 6·N·D with N non-embedding parameters and D all positions. model_causal: matrix products,
    logits, and attention under a causal mask by half. model_full: the same with attention in full.
    hardware: model_full and every recomputation. All are for forward and backward.
    """

    arch: str = option(f"architecture: {', '.join(STYLES)}", metavar="ARCH")
    size: str = option(f"named size: {', '.join(SIZES)}", metavar="SIZE")
    seq_len: int = option("tokens of a sequence; a RedLLM's encoder reads the first of them", 2048)
    prefix_len: int | None = option(
        "RedLLM: tokens that the encoder reads; half of seq_len when absent", None
    )
    scored: int | None = option("positions with loss, the last ones; all when absent", None)
    vocab_size: int = option("rows of the tied embedding", 32_768, minimum=1)
    activation_checkpointing: bool = option("recompute blocks in the backward pass", False)
    json: bool = option("print one JSON object instead of a table", False)

    def problems(self) -> Iterator[str]:
        """What single fields cannot say."""
        if self.seq_len < 1:
            yield f"seq_len={self.seq_len}: too small; give at least 1"
            return
        if self.prefix_len is not None and self.arch != "redllm":
            yield f"prefix_len={self.prefix_len}: {self.arch} has no encoder to read it; leave out"
        elif not 0 <= self.source_len < self.seq_len:
            yield f"prefix_len={self.prefix_len}: give less than seq_len={self.seq_len}"
        else:
            try:
                self.flops()
            except ValueError as error:
                yield str(error)

    @property
    def source_len(self) -> int:
        """Positions of the encoder."""
        if self.arch != "redllm":
            return 0
        return self.seq_len // 2 if self.prefix_len is None else self.prefix_len

    def model(self) -> ModelConfig:
        """The model asked about. Raises ValueError."""
        return named(
            self.arch,
            self.size,
            self.vocab_size,
            max_seq_len=self.seq_len,
            activation_checkpointing=self.activation_checkpointing,
        )

    def flops(self) -> Flops:
        """Of one sequence, by convention. Raises ValueError."""
        target_len = self.seq_len - self.source_len
        return training_flops(
            self.model(), seq_len=target_len, source_len=self.source_len, scored=self.scored
        )

    def table(self) -> list[Operation]:
        """Its operations. Raises ValueError."""
        target_len = self.seq_len - self.source_len
        return operations(
            self.model(), seq_len=target_len, source_len=self.source_len, scored=self.scored
        )


@dataclass(frozen=True)
class Report:
    """Everything the command says."""

    model: ModelConfig
    parameters: Parameters
    flops_per_sequence: Flops
    flops_per_token: Flops
    operations: dict[str, int]
    """Forward FLOPs of a sequence by operation, attention in full, repetitions left out."""


def report(options: Options) -> Report:
    """What there is to say about `options`.

    Raises:
        UserError: the model or its lengths are impossible.
    """
    try:
        model = options.model()
        per_sequence = options.flops()
        table = options.table()
    except ValueError as error:
        raise UserError(str(error)) from error
    tokens = options.seq_len
    per_token = Flops(*(value / tokens for value in dataclasses.astuple(per_sequence)))
    return Report(model, parameters(model), per_sequence, per_token, _by_name(table))


def _by_name(table: list[Operation]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for operation in table:
        if not operation.repeat:
            totals[operation.name] = totals.get(operation.name, 0) + operation.forward
    return totals


def text(options: Options, found: Report) -> str:
    """The report for a terminal."""
    model, count = found.model, found.parameters
    depth = f"{model.num_layers} layers"
    if model.num_encoder_layers:
        depth = f"{model.num_encoder_layers} encoder and {model.num_layers} decoder layers"
    lengths = f"{options.seq_len} tokens"
    if options.source_len:
        lengths += f" ({options.source_len} source, {options.seq_len - options.source_len} target)"
    lines = [
        f"{options.arch} {options.size}: d_model {model.d_model}, d_ffn {model.d_ffn}, "
        f"{model.num_heads} heads of {model.head_dim}, {depth}, vocabulary {model.vocab_size:,}",
        "",
        f"{'parameters':<28}{count.total:>22,}",
        f"{'  without embeddings':<28}{count.non_embedding:>22,}",
        f"{'  active for a target':<28}{count.active:>22,}",
        "",
        f"training FLOPs of {lengths}, forward and backward",
        f"{'convention':<28}{'a sequence':>22}{'a token':>22}",
    ]
    for field in dataclasses.fields(Flops):
        sequence = getattr(found.flops_per_sequence, field.name)
        token = getattr(found.flops_per_token, field.name)
        lines.append(f"{field.name:<28}{sequence:>22,.0f}{token:>22,.0f}")
    total = sum(found.operations.values())
    lines += ["", f"{'forward operation':<36}{'FLOPs':>22}{'share':>9}"]
    for name, flops in found.operations.items():
        share = flops / total if total else 0.0
        lines.append(f"{name:<36}{flops:>22,}{share:>9.1%}")
    return "\n".join(lines)


def run(options: Options) -> None:
    """Print the report."""
    found = report(options)
    print(json.dumps(dataclasses.asdict(found)) if options.json else text(options, found))
