"""Run folders as the pipeline writes them, made from a known loss surface."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

ENTROPY = 6.1
SURFACE = {"E": 1.2, "A": 30.0, "B": 60.0, "alpha": 0.3, "beta": 0.28}


def surface(params: float, tokens: float) -> float:
    """A loss like a real one's."""
    return (
        SURFACE["E"]
        + SURFACE["A"] / params ** SURFACE["alpha"]
        + (SURFACE["B"] / tokens ** SURFACE["beta"])
    )


class RunMaker:
    """Writes run folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(
        self,
        folder: str,
        *,
        name: str | None = None,
        arch: str = "decllm",
        params: int = 200_000,
        steps: int = 200,
        every: int = 50,
        tokens_per_step: int = 4096,
        flops_factor: float = 6.0,
        stage: str = "pretrain",
        parent: Path | None = None,
        finished: bool = True,
        seed: int = 0,
        offset: float = 0.0,
        eval_sets: tuple[str, ...] = ("validation",),
        start_tokens: int = 0,
        start_loss: float | None = None,
    ) -> Path:
        """The folder of a run whose held-out loss follows `surface`."""
        path = self.root / folder
        path.mkdir(parents=True)
        config = {
            "format": 1,
            "stage": stage,
            "run": {
                "name": folder if name is None else name,
                "arch": arch,
                "size": "nano",
                "seq_len": 64,
                "steps": steps,
                "seed": seed,
            },
            "model": {"arch": arch},
            "parameters": {"total": params, "non_embedding": params * 3 // 4, "active": params},
            "data": {"path": "shards", "fingerprint": "f" * 32, "tokenizer_sha256": "a" * 64},
            "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
            "world_size": 2,
        }
        if parent is not None:
            config["parent"] = parent.name
        (path / "config.json").write_text(json.dumps(config))
        metrics, evaluations = [], []
        for step in range(0, steps + 1):
            tokens = start_tokens + step * tokens_per_step
            if stage == "finetune":
                loss = (start_loss or 4.0) - 0.8 * (1 - math.exp(-step / 40)) + offset
            else:
                loss = surface(params, tokens + 20_000) + offset
            flops = flops_factor * params * tokens
            counts = {
                "processed_tokens": tokens,
                "loss_tokens": tokens // (2 if arch == "redllm" else 1),
                "flops_6n": 6.0 * params * 0.75 * tokens,
                "flops_model_causal": flops,
                "flops_model_full": flops * 1.1,
                "flops_hardware": flops * 1.4,
            }
            if step:
                wiggle = 0.05 * math.sin(step * 1.7) + 0.03 * math.sin(step * 0.31)
                metrics.append(
                    {
                        "step": step,
                        "attempt": 1,
                        "loss": loss + wiggle,
                        **counts,
                        "grad_norm": 1.0,
                        "lr": 1e-3,
                        "seconds": 0.1,
                    }
                )
            if step % every == 0 or step == steps:
                for number, eval_set in enumerate(eval_sets):
                    measured = loss + 0.3 * number
                    evaluations.append(
                        {
                            "step": step,
                            "attempt": 1,
                            "eval_set": eval_set,
                            "loss": measured,
                            "eval_tokens": 16384,
                            "bits_per_byte": measured / math.log(2) / 3.1,
                            "unigram_entropy": ENTROPY + 0.2 * number,
                            **counts,
                            "final": step == steps,
                        }
                    )
        for file, rows in (("metrics.jsonl", metrics), ("eval.jsonl", evaluations)):
            (path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            (path / "FINISHED").touch()
        return path


@pytest.fixture
def make_run(tmp_path: Path) -> RunMaker:
    """`make_run("folder", arch=…)` writes a run folder below tmp_path / "runs"."""
    return RunMaker(tmp_path / "runs")


EVIL = (
    '<script>document.title="owned"</script>"\'><img src=x onerror=document.title="owned"> '
    "</title></svg></script> $x ${y} 名前 \u202e"
)


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nine pretraining runs of three architectures and two finetuning runs."""
    root = tmp_path_factory.mktemp("sweep") / "runs"
    make_sweep(root)
    return root


@pytest.fixture(scope="session")
def evil() -> str:
    """The name of one of the sweep's runs."""
    return EVIL


def make_sweep(root: Path) -> RunMaker:
    """Nine pretraining runs of three architectures and two finetuning runs, one evilly named."""
    make = RunMaker(root)
    factors = {"decllm": 6.3, "redllm": 3.4, "entp": 70.0}
    offsets = {"decllm": 0.0, "redllm": 0.08, "entp": -0.15}
    for arch, factor in factors.items():
        for size, params in (("pico", 90_000), ("nano", 240_000), ("micro", 700_000)):
            make(
                f"{arch}-{size}",
                arch=arch,
                params=params,
                steps=400,
                every=50,
                name=EVIL if (arch, size) == ("redllm", "nano") else None,
                flops_factor=factor,
                offset=offsets[arch],
            )
    for arch in ("decllm", "redllm"):
        make(
            f"{arch}-micro-flan",
            arch=arch,
            params=700_000,
            steps=120,
            every=60,
            stage="finetune",
            parent=root / f"{arch}-micro",
            start_tokens=400 * 4096,
            flops_factor=factors[arch],
            eval_sets=("flan_heldout", "validation"),
            start_loss=4.2,
        )
    return make
