"""`isoflop plan`: what a run will take on a cluster, before it is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from models.config import ModelConfig, named
from models.flops import parameters
from models.registry import ARCHITECTURES, architecture
from models.shapes import SIZES
from pipeline.accelerators import ACCELERATORS
from pipeline.checkpointing.retention import Retention
from pipeline.deepspeed_file import read_deepspeed_file, run_problems
from pipeline.model_overrides import convert_overrides
from pipeline.options import UserError, option
from tools.planning.choose import CPU_FILES, GPU_FILES, Freedom, best, closest, smallest
from tools.planning.cluster import Cluster
from tools.planning.disk import disk
from tools.planning.misfit import Misfit
from tools.planning.report import Plan, as_json, text
from tools.planning.request import Request

DS_CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"
# Held-out sequences at once where nothing is said: RunConfig's.
EVAL_MICRO_BATCH = 32
# Tokens for each parameter where nothing is said: about what Chinchilla found best.
TOKENS_PER_PARAMETER = 20


@dataclass(frozen=True)
class Options:
    """Memory of a GPU by component, time of a step, days, energy and disk of a run.

    Recommends a file of ds_configs/, micro-batches for training and evaluation and whether to
    recompute activations; says what the smallest cluster is where nothing fits. Memory is counted
    tensor by tensor and is checked against real CPU runs; times and energy are predictions, never
    checked on a GPU.
    """

    arch: str = option(f"architecture: {', '.join(ARCHITECTURES)}", metavar="ARCH")
    size: str = option(f"named size: {', '.join(SIZES)}", metavar="SIZE")
    gpus: int = option("GPUs, over all nodes (CPU ranks with --gpu cpu)", minimum=1)
    gpu: Literal[tuple(ACCELERATORS)] = option("kind of GPU", "h100")  # type: ignore[valid-type]
    gpus_per_node: int = option("GPUs of a node", 8, minimum=1)
    network_gbs: float | None = option(
        "GB/s of a node's network in one direction (default: the maker's own design's)", None
    )
    memory_gb: float | None = option("GB of a GPU (default: its kind's)", None)
    host_memory_gb: float = option(
        "GB of a node's own memory, for what is offloaded and for copies of checkpoints",
        1000.0,
        minimum=0.0,
    )
    seq_len: int = option("tokens of a sequence, an encoder's included", 2048, minimum=2)
    prefix_len: int | None = option(
        "of these, what an encoder reads and evaluations do not score (default: half of seq_len)",
        None,
        minimum=1,
    )
    global_batch: int = option("sequences in one optimizer step, over all GPUs", 512, minimum=1)
    tokens: float | None = option(
        f"tokens to train on (default: {TOKENS_PER_PARAMETER} for each parameter)", None
    )
    steps: int | None = option("optimizer steps, instead of tokens", None, minimum=1)
    vocab_size: int = option("rows of the tied embedding", 32_768, minimum=1)
    model: dict[str, Any] = option(
        "overrides of the model's own fields, as --model.num_kv_heads=4", default_factory=dict
    )
    optimizer: Literal["adamw", "adafactor", "muon"] = option("optimizer", "adamw")
    factored: bool = option("adafactor: keep row and column means of the second moment", False)
    beta1: float = option("adafactor: decay of its momentum (0: none)", 0.0, minimum=0.0)
    precision: Literal["fp32", "bf16"] = option(
        "numbers of the forward and backward pass; bf16 keeps fp32 masters", "bf16"
    )
    ds_config: str | None = option(
        "DeepSpeed file (default: the best of ds_configs/)", None, metavar="FILE"
    )
    micro_batch: int | None = option(
        "sequences a GPU holds at once (default: the best that fits)", None, minimum=1
    )
    activation_checkpointing: bool | None = option(
        "recompute blocks in the backward pass (default: where it is needed)", None
    )
    eval_micro_batch: int | None = option(
        f"held-out sequences a GPU holds at once (default: a run's {EVAL_MICRO_BATCH}, or the most "
        "below that fit)",
        None,
        minimum=1,
    )
    eval_sequences: int = option("held-out sequences of an evaluation", 512, minimum=1)
    checkpoint_every: int = option("steps between checkpoints", 1000, minimum=0)
    keep_checkpoints: int = option("newest checkpoints kept", 2, minimum=1)
    keep_every: int = option("multiples of this many steps have one that stays", 0, minimum=0)
    log_spaced_checkpoints: int = option(
        "checkpoints in each factor of ten of steps that stay", 0, minimum=0
    )
    async_checkpoints: bool = option(
        "write checkpoints beside the training, from a copy of the state in CPU memory", True
    )
    json: bool = option("print one JSON object instead of a table", False)

    def problems(self) -> Iterator[str]:
        """What single fields cannot say."""
        if self.tokens is not None and self.steps is not None:
            yield f"steps={self.steps}: tokens={self.tokens} says how many; give one of the two"
        if self.tokens is not None and self.tokens < 1:
            yield f"tokens={self.tokens}: too few; give at least 1"
        for name in ("network_gbs", "memory_gb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield f"{name}={value}: not above zero; give GB"
        if self.factored and self.optimizer != "adafactor":
            yield f"factored=true: {self.optimizer} has none; give optimizer=adafactor"
        if self.beta1 and self.optimizer != "adafactor":
            yield f"beta1={self.beta1}: only asked of adafactor; leave it out"
        if self.prefix_len is not None and self.prefix_len >= self.seq_len:
            yield f"prefix_len={self.prefix_len}: give less than seq_len={self.seq_len}"
        if self.gpu == "v100" and self.precision == "bf16":
            yield "precision='bf16': v100 has no such numbers; give fp32, or another gpu"
        yield from self._batch_problems()

    def _batch_problems(self) -> Iterator[str]:
        """As a launch finds them."""
        micro = self.micro_batch or 1
        unit, batch = self.gpus * micro, self.global_batch
        if batch % unit:
            below, above = batch // unit * unit, (batch // unit + 1) * unit
            remedy = f"{below} or {above}" if below else str(above)
            counts = [n for n in range(1, batch // micro + 1) if batch % (n * micro) == 0]
            around = [n for n in counts if n < self.gpus][-1:]
            around += [n for n in counts if n > self.gpus][:1]
            if around:
                remedy += f", or gpus {' or '.join(map(str, around))}"
            yield (
                f"global_batch={batch}: does not divide by {self.gpus} GPUs × micro_batch {micro}; "
                f"give {remedy}"
            )

    def cluster(self) -> Cluster:
        """The machines."""
        device = ACCELERATORS[self.gpu]
        if self.network_gbs is not None:
            device = replace(device, network=self.network_gbs * 1e9)
        if self.memory_gb is not None:
            device = replace(device, memory=self.memory_gb * 1e9)
        return Cluster(self.gpu, device, self.gpus, self.gpus_per_node, self.host_memory_gb * 1e9)

    def files(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """DeepSpeed files that may be chosen. Raises UserError."""
        if self.ds_config is not None:
            settings = read_deepspeed_file(self.ds_config)
            problems = list(run_problems(settings, precision=self.precision))
            if problems:
                raise UserError(f"ds_config={self.ds_config!r}: {'; '.join(problems)}")
            return ((self.ds_config, settings),)
        names = CPU_FILES if self.gpu == "cpu" else GPU_FILES
        paths = [DS_CONFIGS / f"{name}.json" for name in names]
        return tuple((f"ds_configs/{p.name}", read_deepspeed_file(str(p))) for p in paths)

    def retention(self) -> Retention:
        """Which checkpoints are made and kept."""
        return Retention(
            self.checkpoint_every,
            self.keep_checkpoints,
            self.keep_every,
            self.log_spaced_checkpoints,
        )

    def saves_on_the_way(self) -> bool:
        """Whether there is a checkpoint before the last, which the training does not wait for."""
        return bool(self.checkpoint_every or self.keep_every or self.log_spaced_checkpoints)

    def freedom(self) -> Freedom:
        """What may be chosen. Raises UserError."""
        again, scored = self.activation_checkpointing, self.eval_micro_batch
        sizes = [EVAL_MICRO_BATCH >> i for i in range(EVAL_MICRO_BATCH.bit_length())]
        return Freedom(
            files=self.files(),
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            checkpointing=(False, True) if again is None else (again,),
            eval_micro_batches=tuple(sizes) if scored is None else (scored,),
            eval_sequences=self.eval_sequences,
        )

    def request(self, model: ModelConfig) -> Request:
        """What is asked, before anything is chosen."""
        split = self.prefix_len or self.seq_len // 2
        return Request(
            model=model,
            optimizer=self.optimizer,
            precision=self.precision,
            zero={"stage": 1},
            ranks=self.gpus,
            micro_batch=1,
            backward_calls=1,
            seq_len=self.seq_len,
            source=split if architecture(self.arch).encodes_prefix else 0,
            split=split,
            copies_saves=self.async_checkpoints and self.saves_on_the_way(),
            factored=self.factored,
            momentum=self.beta1 > 0,
            on_cpu=self.gpu == "cpu",
        )


def resolved_model(options: Options) -> ModelConfig:
    """The model asked about. Raises UserError."""
    described = architecture(options.arch) if options.arch in ARCHITECTURES else None
    if described is not None and (described.shapes is None or described.kept is None):
        raise UserError(
            f"arch={options.arch!r}: does not say what it keeps for its backward pass; give its "
            "Architecture `shapes` and `kept`"
        )
    overrides = {"max_seq_len": options.seq_len, **_overrides(options.model)}
    try:
        return named(options.arch, options.size, options.vocab_size, **overrides)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def _overrides(model: dict[str, Any]) -> dict[str, Any]:
    """Overrides given as text, typed as ModelConfig's fields are. Raises UserError."""
    if (again := model.get("activation_checkpointing")) is not None:
        raise UserError(
            f"model.activation_checkpointing={again}: give --activation_checkpointing instead"
        )
    return convert_overrides(model)


def plan(options: Options) -> Plan:
    """Everything the command says. Raises UserError, `Misfit` where nothing fits."""
    model, cluster = resolved_model(options), options.cluster()
    request, freedom = options.request(model), options.freedom()
    found = best(request, cluster, freedom)
    if found is None:
        raise Misfit(
            f"{options.arch} {options.size}",
            cluster,
            freedom,
            closest(request, cluster, freedom),
            smallest(request, cluster, freedom),
        )
    total = parameters(model).total
    step_tokens = options.global_batch * options.seq_len
    tokens = options.tokens or TOKENS_PER_PARAMETER * total
    steps = options.steps or max(1, round(tokens / step_tokens))
    return Plan(
        arch=options.arch,
        size=options.size,
        parameters=total,
        cluster=cluster,
        chosen=found,
        global_batch=options.global_batch,
        steps=steps,
        tokens=steps * step_tokens,
        disk=disk(found.request, steps * step_tokens, steps, options.retention()),
    )


def run(options: Options) -> None:
    """Print the plan.

    Raises:
        UserError: the model or the cluster is impossible, or nothing fits.
    """
    try:
        found = plan(options)
    except Misfit as misfit:
        if options.json:
            print(json.dumps(misfit.document | {"reason": str(misfit)}))
        raise
    print(json.dumps(as_json(found)) if options.json else text(found))
