"""RunConfig: everything a run is told, loaded strictly before any work.

One owner for each setting: RunConfig holds batch, accumulation, precision, clipping, optimizer and
schedule; a file of ds_configs/ holds ZeRO, offload and communication; an overlap is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from models.registry import ARCHITECTURES, architecture
from pipeline.config_checks import config_problems
from pipeline.optim import recipe
from pipeline.optim import schedule as schedules
from pipeline.options import option

if TYPE_CHECKING:
    ArchitectureName = str
else:
    ArchitectureName = Literal[tuple(ARCHITECTURES)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run, pretraining or finetuning."""

    run_dir: str = option("run folder to write, and to go on from if it exists", metavar="DIR")
    data: str = option(
        "shard folder made by isoflop tokenize, or the URL of one (s3://…)", metavar="DIR"
    )
    arch: ArchitectureName = option("architecture")
    size: str = option("named shape, nano … 8b")
    steps: int = option("optimizer steps", minimum=1)
    global_batch: int = option("sequences in one optimizer step, over all ranks", minimum=1)

    name: str = option("name shown in reports (default: the run folder's)", "")
    model: dict[str, Any] = option(
        "overrides of the model's own fields, as --model.num_layers=3", default_factory=dict
    )
    seq_len: int = option("tokens in a training sample", 2048, minimum=2)
    prefix_len: int | None = option(
        "where a sample is split into prefix and matched targets (default: the middle)", None
    )
    objective: Literal["auto", "causal", "prefix", "random_prefix", "denoise"] = option(
        "what is predicted: every token, those after the prefix, those after a split drawn for "
        "each sample, or what UL2's mixture of denoisers takes out (auto: prefix for an "
        "encoder-decoder such as redllm, causal for the others); evaluations score the tokens "
        "after the prefix for all",
        "auto",
    )
    denoisers: dict[str, float] = option(
        "objective denoise: shares of R (short spans), S (the end) and X (much) (default: all "
        "seven denoisers equally often, R=2,S=1,X=4)",
        default_factory=dict,
    )
    micro_batch: int | None = option(
        "sequences a rank holds at once (default: its whole share of the global batch)",
        None,
        minimum=1,
    )

    optimizer: Literal["adamw", "adafactor", "muon"] = option(
        "adafactor as in T5X, factored or not; muon for hidden matrices, with adamw for the rest",
        "adamw",
    )
    lr: float = option(
        "peak learning rate (default: adamw 0.001; adafactor 0.01, relative to each parameter's "
        "RMS; muon 0.02)",
        None,
        minimum=0.0,
    )
    beta1: float = option(
        "first-moment decay (default: 0.9; adafactor 0, which keeps no momentum)", None
    )
    beta2: float = option("AdamW's second-moment decay", 0.95)
    weight_decay: float = option(
        "decoupled decay of matrices, a share of the learning rate (default: 0.1; adafactor 0)",
        None,
        minimum=0.0,
    )
    factored: bool = option("adafactor: keep row and column means of the second moment", False)
    decay_rate: float = option("adafactor: exponent of the second moment's decay", 0.8, minimum=0.0)
    clipping_threshold: float = option(
        "adafactor: largest RMS of a parameter's update (0: none)", 1.0, minimum=0.0
    )
    multiply_by_parameter_scale: bool = option(
        "adafactor: steps are relative to each parameter's RMS", True
    )
    min_dim_size_to_factor: int = option(
        "adafactor: smallest dimension that is factored", 128, minimum=1
    )
    momentum: float = option("muon: decay of its momentum", 0.95)
    ns_method: Literal["gram", "standard"] = option("muon: Newton-Schulz iteration", "gram")
    adam_lr: float = option(
        "muon: peak learning rate of what adamw steps: embeddings, head and vectors",
        1e-3,
        minimum=0.0,
    )
    schedule: Literal["cosine", "constant", "linear", "inverse_sqrt", "wsd"] = option(
        "learning rate after the warm-up (wsd: constant, then a decay at the end)", "cosine"
    )
    warmup_steps: int = option("steps of linear warm-up", 0, minimum=0)
    final_lr_fraction: float = option(
        "learning rate at the end, as a share of the peak", schedules.FINAL_FRACTION
    )
    decay_steps: int | None = option(
        "wsd: steps of its decay (default: a tenth of all)", None, minimum=1
    )
    decay_shape: Literal["linear", "cosine", "sqrt"] = option("wsd: shape of its decay", "linear")
    grad_clip: float = option(
        "largest global gradient norm, 0: none (default: 1; muon 0)", None, minimum=0.0
    )
    z_loss: float = option("weight of the squared log-normaliser", 1e-4, minimum=0.0)
    precision: Literal["fp32", "bf16"] = option(
        "numbers of the forward and backward pass; bf16 keeps fp32 masters", "bf16"
    )
    compile: bool = option(
        "compile the model with torch.compile: ZeRO stages 0 to 2, and a C++ compiler", False
    )
    ds_config: str = option("DeepSpeed file: ZeRO, offload, communication", metavar="FILE")

    max_epochs: float | None = option(
        "the run is finished before any source is gone through more often than this", None
    )
    seed: int = option("initial weights, sample order and dropout", 0, minimum=0)
    shuffle_window: str | int = option(
        "'all' (uniform over the epoch) or the number of shards mixed at a time", "all"
    )
    weights: dict[str, float] = option(
        "sampling weight by source (default: natural proportions)", default_factory=dict
    )
    weight_stages: dict[str, dict[str, float]] = option(
        "weights that hold from a sample number on, as --weight_stages.100000=book=2,c4=1",
        default_factory=dict,
    )
    document_masks: bool = option(
        "attention stays inside a document, and positions begin anew with each", False
    )
    cache_dir: str = option("where shards behind a URL are kept", "~/.cache/isoflop", metavar="DIR")
    cache_gb: float = option("what they may take there, in GB; two windows must fit", 100.0)
    prefetch: bool = option("make the next step's batches while this one trains", True)

    eval_every: int = option("steps between evaluations (0: only at the end)", 0, minimum=0)
    eval_sequences: int = option("held-out sequences of an evaluation", 512, minimum=1)
    eval_micro_batch: int = option("held-out sequences a rank holds at once", 32, minimum=1)
    checkpoint_every: int = option("steps between checkpoints (0: only at the end)", 0, minimum=0)
    keep_checkpoints: int = option(
        "newest checkpoints kept; the one with the lowest held-out loss stays too", 2, minimum=1
    )
    keep_every: int = option(
        "multiples of this many steps have a checkpoint that stays (0: none)", 0, minimum=0
    )
    log_spaced_checkpoints: int = option(
        "checkpoints in each factor of ten of steps that are made and stay, for scaling curves "
        "(0: none)",
        0,
        minimum=0,
    )
    async_checkpoints: bool = option(
        "write checkpoints beside the training, from a copy of the state in CPU memory", True
    )
    on_failed_save: Literal["stop", "go_on"] = option(
        "when a checkpoint cannot be written (a full disk): end with an error, or train on and try "
        "again at the next one; the last one must succeed",
        "stop",
    )
    restart: bool = option(
        "start over where a run's completed checkpoints are gone or none of them is whole", False
    )
    max_skipped_steps: int = option(
        "steps in a row that are skipped, as not finite or as spikes, before `on_nonfinite`",
        10,
        minimum=1,
    )
    on_nonfinite: Literal["stop", "rollback"] = option(
        "after that many: end with an error, or go back to the newest whole checkpoint (or the "
        "start) and leave out the batches that were skipped",
        "stop",
    )
    loss_spikes: Literal["off", "skip", "rollback", "stop"] = option(
        "a step whose loss is a spike: apply it, skip it, go back to the newest whole checkpoint "
        "and leave its batch out, or end with an error",
        "off",
    )
    spike_threshold: float = option(
        "robust standard deviations above the median that make a spike", 8.0, minimum=1.0
    )
    spike_window: int = option("applied steps that a loss is held against", 128, minimum=8)
    max_rollbacks: int = option(
        "times that a run goes back to one checkpoint, or its start, before it ends with an error",
        3,
        minimum=1,
    )
    check_ranks_every: int = option(
        "steps between comparisons of the ranks' parameters; at stages 0 to 2 they are also made "
        "before each checkpoint (0: never)",
        1000,
        minimum=0,
    )

    init_from: str | None = option(
        "run folder whose newest checkpoint gives the weights (finetuning)", None, metavar="DIR"
    )
    flan: str | None = option("FLAN folder made by isoflop flan (finetuning)", None, metavar="DIR")
    bidirectional_inputs: bool = option(
        "finetuning of decllm: input tokens see each other in both directions", False
    )

    threads: int = option("CPU threads of a rank (0: its share of the cores)", 0, minimum=0)
    collective_timeout: int = option("seconds before a stuck collective fails", 2400, minimum=1)
    stall_timeout: float = option(
        "seconds that a rank may stay in one phase of a step before the run ends and names it (0: "
        "no limit); six times that, and at least a minute, for the start, a save, an evaluation "
        "and a first step; give less than collective_timeout, which knows less of them",
        300.0,
        minimum=0.0,
    )
    start_timeout: int = option(
        "seconds in which all nodes must have joined, before training", 300, minimum=1
    )

    def __post_init__(self) -> None:
        """Give what depends on the optimizer its value."""
        given = {name: getattr(self, name) for name in recipe.DEFAULTS["adamw"]}
        for name, value in recipe.resolved(self.optimizer, given).items():
            object.__setattr__(self, name, value)

    @property
    def data_folder(self) -> Path:
        """Where `data` can be read: itself, or the cache of its URL. Raises UserError."""
        from pipeline.data.remote import local_folder

        return local_folder(self.data, self.cache_dir, self.cache_gb)

    @property
    def flan_folder(self) -> Path | None:
        """Where `flan` can be read. Raises UserError."""
        from pipeline.data.remote import local_folder

        if self.flan is None:
            return None
        return local_folder(self.flan, self.cache_dir, self.cache_gb)

    @property
    def split(self) -> int:
        """Tokens of a sample before the matched targets."""
        return self.seq_len // 2 if self.prefix_len is None else self.prefix_len

    @property
    def resolved_objective(self) -> str:
        """The objective with `auto` resolved."""
        if self.objective == "auto":
            return "prefix" if architecture(self.arch).encodes_prefix else "causal"
        return self.objective

    @property
    def reads_prefix_both_ways(self) -> bool:
        """Whether what a sample is predicted from sees itself in both directions."""
        if self.flan is not None:
            return self.bidirectional_inputs or architecture(self.arch).encodes_prefix
        return self.resolved_objective != "causal"

    @property
    def longest_stream(self) -> int:
        """Most positions that one sample takes."""
        if self.resolved_objective != "denoise":
            return self.seq_len
        from pipeline.denoising import longest_stream

        return longest_stream(self.seq_len)

    def problems(self) -> Iterable[str]:
        """What single fields cannot say."""
        return config_problems(self)
