"""What a plan is asked about: one run on one cluster, in the terms of models/ and pipeline/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from models.config import ModelConfig
from models.kept import Round
from models.operations import Pass
from models.parameter_shapes import embedding_shapes
from models.registry import architecture
from pipeline.deepspeed_file import offloads, zero_stage


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model."""

    name: str
    shape: tuple[int, ...]
    numel: int

    @property
    def module(self) -> str:
        """The module that holds it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Request:
    """One rank's share of one run.

    Attributes:
        model: the model, with or without activation checkpointing.
        optimizer: adamw, adafactor or muon.
        factored: Adafactor's row and column means.
        momentum: Adafactor's β₁ is not 0.
        precision: fp32 or bf16.
        zero: the zero_optimization section of a file of ds_configs/.
        ranks: data-parallel ranks.
        micro_batch: sequences a rank holds at once.
        backward_calls: micro-batches of a step on one rank.
        seq_len: tokens of a sequence, source and target.
        source: of these, what an encoder reads.
        split: of these, what evaluations do not score.
        evaluated: held-out sequences that a rank holds at once; 0: none are scored.
        copies_saves: whether checkpoints are written from a copy in host memory.
        on_cpu: whether ranks are CPU ones, over gloo.
    """

    model: ModelConfig
    optimizer: str
    precision: str
    zero: Mapping[str, Any]
    ranks: int
    micro_batch: int
    backward_calls: int
    seq_len: int
    source: int = 0
    split: int = 0
    evaluated: int = 0
    copies_saves: bool = False
    factored: bool = False
    momentum: bool = False
    on_cpu: bool = False

    @property
    def width(self) -> int:
        """Bytes of a number that the model computes in."""
        return 2 if self.precision == "bf16" else 4

    @property
    def stage(self) -> int:
        """ZeRO's."""
        return zero_stage({"zero_optimization": self.zero})

    @property
    def offloads_optimizer(self) -> bool:
        """Whether masters and optimizer states wait in host memory."""
        return offloads({"zero_optimization": self.zero})

    @property
    def offloads_parameters(self) -> bool:
        """Whether slices of parameters do."""
        return "offload_param" in self.zero

    def setting(self, key: str, default: int) -> int:
        """A number of the zero_optimization section, or DeepSpeed 0.19.8's default."""
        return int(self.zero.get(key, default))

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Of the model, in its own order."""
        return _parameters(self.model)

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """What the backward calls of a micro-batch keep; the largest of each kind."""
        target = self.seq_len - self.source
        step = Pass(tokens=target, scored=target, source=self.source)
        return _rounds(self.model, self.micro_batch, step)

    @cached_property
    def evaluation_rounds(self) -> tuple[Round, ...]:
        """What an evaluation computes at once; none where nothing is scored."""
        if not self.evaluated:
            return ()
        target = self.seq_len - self.source
        scored = min(target, self.seq_len - self.split)
        step = Pass(tokens=target, scored=scored, source=self.source, training=False)
        return _rounds(self.model, self.evaluated, step)

    def with_changes(self, **changes: Any) -> Request:
        """The same, changed."""
        return replace(self, **changes)


# A search asks for the same of many ways to run a model.
@lru_cache(maxsize=16)
def _parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    listed = architecture(model.arch).shapes
    assert listed is not None  # the command has seen to it
    shapes = [*embedding_shapes(model), *listed(model)]
    return tuple(Parameter(name, shape, _product(shape)) for name, shape in shapes)


@lru_cache(maxsize=256)
def _rounds(model: ModelConfig, rows: int, step: Pass) -> tuple[Round, ...]:
    kept = architecture(model.arch).kept
    assert kept is not None
    return tuple(kept(model, rows, step))


def _product(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found
