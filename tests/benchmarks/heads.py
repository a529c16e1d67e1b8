"""The head: what z-loss costs, and the chunked loss against plain cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.benchmarks.measure import Benchmark, Contest
from tests.benchmarks.model_steps import contest_of_steps, one_thread, random_ids

ROWS, D_MODEL, VOCAB_SIZE = 1024, 512, 32_768
Z_LOSS = 1e-4


def chunked(z_loss: float) -> Callable[[], tuple[float, ...]]:
    """linear_cross_entropy, forward and backward: nll, and the norms of both gradients."""
    import torch

    from models.losses import linear_cross_entropy

    one_thread()
    hidden, weight = inputs()
    targets = random_ids(1, ROWS, VOCAB_SIZE)[0]
    mask = torch.ones(ROWS, dtype=torch.bool)

    def step() -> tuple[float, ...]:
        hidden.grad = weight.grad = None
        terms = linear_cross_entropy(hidden, weight, targets, mask, z_loss)
        terms.objective.backward()
        return float(terms.nll), float(hidden.grad.norm()), float(weight.grad.norm())

    return step


def chunked_with_z() -> Callable[[], tuple[float, ...]]:
    """`chunked` with z-loss."""
    return chunked(Z_LOSS)


def chunked_nll() -> Callable[[], tuple[float, ...]]:
    """`chunked` with z-loss; only the nll, which z-loss does not touch."""
    step = chunked(Z_LOSS)
    return lambda: step()[:1]


def chunked_nll_without_z() -> Callable[[], tuple[float, ...]]:
    """`chunked` without z-loss; only the nll."""
    step = chunked(0.0)
    return lambda: step()[:1]


def plain_with_z() -> Callable[[], tuple[float, ...]]:
    """Full logits, F.cross_entropy and a log-sum-exp of them for z-loss."""
    import torch.nn.functional as F

    one_thread()
    hidden, weight = inputs()
    targets = random_ids(1, ROWS, VOCAB_SIZE)[0]

    def step() -> tuple[float, ...]:
        hidden.grad = weight.grad = None
        logits = F.linear(hidden, weight)
        nll = F.cross_entropy(logits, targets, reduction="sum")
        objective = nll + Z_LOSS * logits.logsumexp(-1).square().sum()
        objective.backward()
        return float(nll.detach()), float(hidden.grad.norm()), float(weight.grad.norm())

    return step


def inputs():  # type: ignore[no-untyped-def]
    """Hidden states [ROWS, D_MODEL] and a weight [VOCAB_SIZE, D_MODEL], both leaves."""
    import torch

    hidden = torch.randn(ROWS, D_MODEL).requires_grad_()
    weight = (torch.randn(VOCAB_SIZE, D_MODEL) / D_MODEL**0.5).requires_grad_()
    return hidden, weight


def z_loss_share(folder: Path) -> Contest:
    """See `BENCHMARKS`."""
    return contest_of_steps(chunked_nll, chunked_nll_without_z)


def against_plain(folder: Path) -> Contest:
    """See `BENCHMARKS`."""
    return contest_of_steps(chunked_with_z, plain_with_z, work=ROWS, unit="rows")


_SHAPE = f"{ROWS} rows, d {D_MODEL}, V {VOCAB_SIZE:,}, fp32; forward and backward"
BENCHMARKS = (
    Benchmark(
        name="head-z-loss",
        ours="linear_cross_entropy with z-loss",
        theirs="linear_cross_entropy without it",
        process="one process",
        prepare=z_loss_share,
        note=f"{_SHAPE}; z-loss's share of the head is 1 - ratio",
    ),
    Benchmark(
        name="head-plain",
        ours="linear_cross_entropy with z-loss",
        theirs="full logits, F.cross_entropy, and their logsumexp for z-loss",
        process="one process",
        prepare=against_plain,
        note=f"{_SHAPE}; peak MiB is what two steps add",
    ),
)
