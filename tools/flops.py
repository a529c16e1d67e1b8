"""`isoflop flops`: what a model of a named size holds and costs, before anything is run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from models.config import ModelConfig, named
from models.flops import (
    Flops,
    decode_pass,
    inference_flops,
    operations,
    parameters,
    prefill_pass,
    training_flops,
)
from models.operations import Operation, Pass
from models.parameter_counts import Parameters
from models.registry import ARCHITECTURES, architecture
from models.shapes import SIZES
from pipeline.model_overrides import convert_overrides
from pipeline.options import UserError, option


@dataclass(frozen=True)
class Options:
    """Parameters of an architecture and named size, and its FLOPs in training and in use.

    6n: 6·N·D with N non-embedding parameters and D all positions, 2·N·D where nothing is trained.
    model_causal: matrix products, logits, and of attention what its mask lets through, half where
    it is causal. model_full: the same with attention in full. hardware: model_full and every
    recomputation. Training is forward and backward. Prefill is all that precedes the first
    generated token, decode each further one, from caches where the architecture allows them.
    """

    arch: str = option(f"architecture: {', '.join(ARCHITECTURES)}", metavar="ARCH")
    size: str = option(f"named size: {', '.join(SIZES)}", metavar="SIZE")
    seq_len: int = option(
        "training: tokens of a sequence; an encoder-decoder's encoder reads the first of them", 2048
    )
    prefix_len: int | None = option(
        "training: tokens that an encoder reads (half of seq_len when absent), or that a decllm "
        "sees in both directions (none when absent)",
        None,
    )
    documents: tuple[int, ...] = option(
        "training: lengths of the documents that attention stays inside, as 512,1536 (one document "
        "when absent)",
        (),
    )
    scored: int | None = option(
        "training: positions with loss, the last ones (all when absent)", None
    )
    prompt_len: int | None = option(
        "prefill: tokens of the prompt (default: half of seq_len)", None
    )
    context_len: int | None = option(
        "decode: tokens seen, those of the prompt included (seq_len when absent)", None
    )
    bidirectional: bool = option(
        "prefill: a decllm's prompt sees itself in both directions, as one finetuned so has it",
        False,
    )
    vocab_size: int = option("rows of the tied embedding", 32_768, minimum=1)
    model: dict[str, Any] = option(
        "overrides of the model's own fields, as --model.num_kv_heads=4", default_factory=dict
    )
    activation_checkpointing: bool = option("recompute blocks in the backward pass", False)
    json: bool = option("print one JSON object instead of a table", False)

    def problems(self) -> Iterator[str]:
        """What single fields cannot say."""
        if self.seq_len < 1:
            yield f"seq_len={self.seq_len}: too small; give at least 1"
            return
        if self.prefix_len is not None and not 0 <= self.prefix_len < self.seq_len:
            yield f"prefix_len={self.prefix_len}: give less than seq_len={self.seq_len}"
            return
        try:
            report(self)
        except ValueError as error:
            yield str(error)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return max(1, self.seq_len // 2) if self.prompt_len is None else self.prompt_len

    @property
    def context(self) -> int:
        """Tokens that the generated one sees."""
        return max(self.prompt + 1, self.seq_len) if self.context_len is None else self.context_len

    def inference_passes(self, model: ModelConfig) -> tuple[Pass, Pass]:
        """Prefill and decode. Raises ValueError."""
        prefill = prefill_pass(model, self.prompt, bidirectional=self.bidirectional)
        return prefill, decode_pass(model, self.prompt, self.context)

    def model_config(self) -> ModelConfig:
        """The model asked about. Raises ValueError, and UserError for a field it does not have."""
        for name in ("activation_checkpointing", "vocab_size"):
            if name in self.model:
                value = self.model[name]
                raise UserError(f"model.{name}={value}: give --{name} instead")
        settings = {
            "max_seq_len": max(self.seq_len, self.context),
            "activation_checkpointing": self.activation_checkpointing,
        }
        overrides = convert_overrides(self.model)
        return named(self.arch, self.size, self.vocab_size, **(settings | overrides))

    def training_lengths(self) -> dict[str, Any]:
        """The keywords of `training_flops`. Raises ValueError."""
        if not architecture(self.arch).encodes_prefix:
            return {
                "seq_len": self.seq_len,
                "prefix_len": self.prefix_len,
                "documents": self.documents,
                "scored": self.scored,
            }
        source = self.seq_len // 2 if self.prefix_len is None else self.prefix_len
        if self.documents and sum(self.documents) != self.seq_len:
            raise ValueError(
                f"documents={self.documents}: add up to {sum(self.documents)} of seq_len="
                f"{self.seq_len} tokens; give the lengths of all"
            )
        # Each document's part of the source, which may cut one in two.
        read, left = [], source
        for length in self.documents:
            read.append(min(length, left))
            left -= read[-1]
        return {
            "seq_len": self.seq_len - source,
            "source_len": source,
            "documents": [n - first for n, first in zip(self.documents, read, strict=True)],
            "source_documents": read,
            "scored": self.scored,
        }


@dataclass(frozen=True)
class Activity:
    """One thing that a model does with one sequence."""

    what: str
    flops: Flops
    operations: dict[str, int]
    """Forward FLOPs by operation, attention in full, repetitions left out."""


@dataclass(frozen=True)
class Report:
    """Everything the command says."""

    model: ModelConfig
    parameters: Parameters
    tokens: int
    """Of a training sequence, source and target."""
    training: Activity
    prefill: Activity
    decode: Activity


def report(options: Options) -> Report:
    """What there is to say about `options`.

    Raises:
        ValueError: the model or its lengths are impossible.
    """
    model, lengths = options.model_config(), options.training_lengths()
    trained = training_flops(model, **lengths)
    source, target = lengths.get("source_len", 0), lengths["seq_len"]
    scored = target if options.scored is None else options.scored
    parts = f" ({source} source, {target} target)" if source else ""
    prefill, decode = options.inference_passes(model)
    return Report(
        model=model,
        parameters=parameters(model),
        tokens=options.seq_len,
        training=Activity(
            f"training on {options.seq_len} tokens{parts}, forward and backward",
            trained,
            by_name(operations(model, Pass(tokens=target, scored=scored, source=source))),
        ),
        prefill=Activity(
            f"prefill: a prompt of {options.prompt} tokens, to the first logits",
            inference_flops(model, prefill),
            by_name(operations(model, prefill)),
        ),
        decode=Activity(
            f"decode: one token that sees {options.context}",
            inference_flops(model, decode),
            by_name(operations(model, decode)),
        ),
    )


def by_name(table: Iterable[Operation]) -> dict[str, int]:
    """FLOPs of a table's operations, equal names added up."""
    totals: dict[str, int] = {}
    for operation in table:
        totals[operation.name] = totals.get(operation.name, 0) + operation.forward
    return totals


def by_convention(flops: Flops) -> dict[str, float]:
    """FLOPs under the conventions' own names."""
    return {"6n": flops.six_n, **{k: v for k, v in vars(flops).items() if k != "six_n"}}


def as_json(found: Report) -> dict[str, Any]:
    """The report for a machine."""
    document: dict[str, Any] = {
        "model": dataclasses.asdict(found.model),
        "parameters": dataclasses.asdict(found.parameters),
    }
    for name in ("training", "prefill", "decode"):
        activity: Activity = getattr(found, name)
        document[name] = {
            "what": activity.what,
            "flops": by_convention(activity.flops),
            "operations": activity.operations,
        }
    flops = document["training"]["flops"].items()
    document["training"]["flops_per_token"] = {k: v / found.tokens for k, v in flops}
    return document


def text(options: Options, found: Report) -> str:
    """The report for a terminal."""
    model, count = found.model, found.parameters
    depth = f"{model.num_layers} layers"
    if model.num_encoder_layers:
        depth = f"{model.num_encoder_layers} encoder and {model.num_layers} decoder layers"
    lines = [
        f"{options.arch} {options.size}: d_model {model.d_model}, d_ffn {model.d_ffn}, "
        f"{model.num_heads} heads of {model.head_dim}, {depth}, vocabulary {model.vocab_size:,}",
        "",
        f"{'parameters':<30}{count.total:>21,}",
        f"{'  without embeddings':<30}{count.non_embedding:>21,}",
        f"{'  active for a target':<30}{count.active:>21,}",
        "",
        found.training.what,
        f"{'convention':<30}{'a sequence':>21}{'a token':>21}",
    ]
    for name, flops in by_convention(found.training.flops).items():
        lines.append(f"{name:<30}{flops:>21,.0f}{flops / found.tokens:>21,.0f}")
    lines += ["", found.prefill.what, found.decode.what]
    lines.append(f"{'convention':<30}{'prefill':>21}{'decode':>21}")
    decode = by_convention(found.decode.flops)
    for name, flops in by_convention(found.prefill.flops).items():
        lines.append(f"{name:<30}{flops:>21,.0f}{decode[name]:>21,.0f}")
    lines += ["", f"{'forward operation':<30}{'training':>21}{'':>8}{'prefill':>21}{'decode':>21}"]
    total = sum(found.training.operations.values())
    for name, trained in found.training.operations.items():
        share = trained / total if total else 0.0
        read, told = (a.operations.get(name, 0) for a in (found.prefill, found.decode))
        lines.append(f"{name:<30}{trained:>21,}{share:>8.1%}{read:>21,}{told:>21,}")
    return "\n".join(lines)


def run(options: Options) -> None:
    """Print the report.

    Raises:
        UserError: the model or its lengths are impossible.
    """
    try:
        found = report(options)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(json.dumps(as_json(found)) if options.json else text(options, found))
