"""Training nano models under the trainer on ranks, to be compared with plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.distributed.harness import run_ranks

if TYPE_CHECKING:
    import torch

    from pipeline.config import RunConfig

BATCH, SEQ_LEN, VOCAB_SIZE, PEAK, CLIP, Z_LOSS = 12, 16, 512, 0.01, 1.0, 1e-4
# Of each step: "loss", "norm" of the gradient, "z" (mean squared log-normaliser), loss by source.
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Case:
    """One way to train a nano model on 12 sequences of 16 tokens a step."""

    arch: str = "decllm"
    stage: int = 3
    optimizer: str = "adamw"
    micro_batch: int = 6
    checkpointing: bool = False
    offload: str = ""  # "", "optimizer", or "both" (stage 3: parameters too)
    precision: str = "fp32"
    entp_chunk_pairs: int = 16_384
    compile: bool = False
    model: tuple[tuple[str, Any], ...] = ()  # other fields of the model
    run: tuple[tuple[str, Any], ...] = ()  # other fields of the run
    mask_seed: int | None = None  # score random targets only, unevenly many in each row
    grad_clip: float = CLIP
    file: str = ""  # a file of ds_configs/ instead of small buckets

    def __str__(self) -> str:
        marks = [self.arch, f"zero{self.stage}", self.optimizer, f"micro{self.micro_batch}"]
        marks += ["checkpointing"] * self.checkpointing
        marks += [f"offload-{self.offload}"] if self.offload else []
        marks += [self.precision] if self.precision != "fp32" else []
        marks += ["compile"] if self.compile else []
        marks += [f"{key}={value}" for key, value in self.model + self.run]
        marks += [f"masks{self.mask_seed}"] if self.mask_seed is not None else []
        marks += [f"clip{self.grad_clip}"] if self.grad_clip != CLIP else []
        marks += [self.file] if self.file else []
        return "-".join(marks)

    def model_overrides(self) -> dict[str, Any]:
        """What the case changes of the nano model."""
        return {
            "activation_checkpointing": self.checkpointing,
            "entp_chunk_pairs": self.entp_chunk_pairs,
            **dict(self.model),
        }

    def deepspeed_file(self) -> dict[str, Any]:
        """Small buckets, so that several are filled."""
        if self.file:
            from pipeline.deepspeed_file import read_deepspeed_file

            return read_deepspeed_file(f"ds_configs/{self.file}.json")
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage:
            zero |= {"contiguous_gradients": True, "reduce_bucket_size": 20_000}
        if self.stage in (1, 2):
            zero["allgather_bucket_size"] = 20_000
        if self.stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": 10_000,
                "stage3_param_persistence_threshold": 100,
                "stage3_max_live_parameters": 20_000,
                "stage3_max_reuse_distance": 20_000,
            }
        if self.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        if self.offload == "both":
            zero["offload_param"] = {"device": "cpu"}
        return {"zero_optimization": zero}


def run_config(case: Case, shards: Path, steps: int) -> RunConfig:
    """The case as a run."""
    from pipeline.config import RunConfig

    return RunConfig(
        run_dir="unused",
        data=str(shards),
        name=str(case),
        arch=case.arch,  # type: ignore[arg-type]
        size="nano",
        model=case.model_overrides(),
        steps=steps,
        seq_len=SEQ_LEN,
        global_batch=BATCH,
        micro_batch=case.micro_batch,
        optimizer=case.optimizer,  # type: ignore[arg-type]
        lr=PEAK,
        z_loss=Z_LOSS,
        grad_clip=case.grad_clip,
        precision=case.precision,  # type: ignore[arg-type]
        compile=case.compile,
        ds_config="unused",
        threads=1,
        **dict(case.run),
    )


def trained(
    cases: Sequence[Case], shards: Path, steps: int, world_size: int, timeout: float = 240
) -> list[Curve]:
    """Curves of `cases` under the trainer, one after the other on the same ranks."""
    return run_ranks(_train_cases, world_size, cases, shards, steps, timeout=timeout)[0]


def _train_cases(cases: Sequence[Case], shards: Path, steps: int) -> list[Curve]:
    from pipeline import distributed

    world = distributed.start(timeout_seconds=100, threads=1)
    return [_train(case, run_config(case, shards, steps), world) for case in cases]


def _train(case: Case, config: RunConfig, world: Any) -> Curve:
    from pipeline.assemble import make_engine
    from pipeline.callbacks.base import Callback, StepRecord
    from pipeline.plan import resolve_model
    from pipeline.pretrain import open_data
    from pipeline.run_folder import RunFolder
    from pipeline.sources import PretrainingSource
    from pipeline.trainer import Trainer

    found: Curve = []

    class Watch(Callback):
        def on_step(self, trainer: Trainer, record: StepRecord) -> None:
            found.append({"loss": record.loss, "norm": record.grad_norm, "z": record.z_loss})
            found[-1] |= record.loss_by_source

    order, _ = open_data(config)
    info = order.store.manifest.tokenizer
    model = resolve_model(config, info.vocab_size)
    bos, pad = info.special_ids["bos"], info.special_ids["pad"]
    source = PretrainingSource(config, model, order, bos=bos, pad=pad)
    if case.mask_seed is not None:
        source = _Masked(source, case.mask_seed)  # type: ignore[assignment]
    engine = make_engine(config, info.vocab_size, case.deepspeed_file())
    Trainer(config, world, engine, source, RunFolder(config.run_dir), [Watch()]).run()
    if case.compile:
        from torch._dynamo.utils import counters

        assert counters["stats"]["unique_graphs"] > 0
    engine.destroy()
    return found


def random_mask(seed: int, place: int, width: int) -> torch.Tensor:
    """Which targets of the sample at `place` of the order are scored, [width] bool."""
    import torch

    generator = torch.Generator().manual_seed(1_000_003 * seed + place)
    # From none at all to every one, and mostly few.
    share = torch.rand((), generator=generator) ** 3 * (place % 4 > 0)
    return torch.rand(width, generator=generator) < share


class _Masked:
    """A source whose loss masks are `random_mask`'s."""

    def __init__(self, source: Any, seed: int) -> None:
        self._source, self._seed, self.names = source, seed, source.names

    def share(self, step: int, rank: int, world_size: int) -> Any:
        import torch

        share = self._source.share(step, rank, world_size)
        place, masked = step * BATCH + rank * (BATCH // world_size), []
        for batch in share.micro_batches:
            rows, width = batch.targets.shape
            masks = [random_mask(self._seed, place + row, width) for row in range(rows)]
            masked.append(replace(batch, loss_mask=torch.stack(masks)))
            place += rows
        targets = sum(int(batch.loss_mask.sum()) for batch in masked)
        return replace(share, micro_batches=masked, target_tokens=targets)


def largest_difference(ours: Curve, theirs: Curve) -> float:
    """The largest relative difference of any loss or norm."""
    differences = []
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        differences += [abs(one[key] - other[key]) / abs(other[key]) for key in other]
    return max(differences)


def losses(curve: Curve) -> Curve:
    """Losses alone: norms feel rounding sooner."""
    return [{"loss": step["loss"]} for step in curve]


def too_large(found: dict[str, float], tolerance: float) -> dict[str, float]:
    """Of `found`, what is not below `tolerance`."""
    return {name: value for name, value in found.items() if not value < tolerance}
