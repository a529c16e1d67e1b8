"""The cases of `parity` in one process of plain PyTorch: no engine, no source, no trainer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.distributed.parity import (
    BATCH,
    PEAK,
    SEQ_LEN,
    VOCAB_SIZE,
    Z_LOSS,
    Case,
    Curve,
    random_mask,
)
from tests.distributed.plain_optim import adamw


def plain(
    case: Case,
    shards: Path,
    steps: int,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
) -> Curve:
    """The case in one process of plain PyTorch: no engine, no source, no trainer."""
    import numpy as np

    from models.batch import Batch
    from models.config import named
    from models.registry import build
    from pipeline.data.loader import SequenceStore, TrainingOrder

    torch.manual_seed(0)
    choices = {"max_seq_len": SEQ_LEN, **dict(case.model)}
    sampled = choices.pop("entp_sampled_prefixes", 0)  # drawn here instead
    model = build(named(case.arch, "nano", vocab_size=VOCAB_SIZE, **choices))
    masters = _Masters(model, make_optimizer, case)
    order = TrainingOrder(SequenceStore(shards, "train", SEQ_LEN), seed=0)
    bos = order.store.manifest.tokenizer.special_ids["bos"]
    found = []
    for step in range(steps):
        places = range(step * BATCH, (step + 1) * BATCH)
        x = torch.from_numpy(order.batch(step * BATCH, BATCH).ids.astype("int64"))
        encoder, targets = (x[:, :8], x[:, 8:]) if case.arch == "redllm" else (None, x)
        inputs = torch.cat([torch.full((BATCH, 1), bos), targets[:, :-1]], 1)
        mask = torch.ones_like(targets, dtype=torch.bool)
        if case.mask_seed is not None:
            width = targets.shape[1]
            mask = torch.stack([random_mask(case.mask_seed, place, width) for place in places])
        scored = int(mask.sum())
        if sampled:
            mask = drawn(case, step, sampled)
        share = scored / int(mask.sum())  # what a scored target of the sample stands for
        # The peak at step 0, then the half cosine to a tenth at the last step.
        warmth = (1 + math.cos(math.pi * step / (steps - 1))) / 2
        for group in masters.optimizer.param_groups:
            group["lr"] = PEAK * (0.1 + 0.9 * warmth) * group.get("lr_scale", 1.0)
        sources = torch.from_numpy(order.locate(np.array(places))[0])
        by_row, nll, z = torch.zeros(BATCH), 0.0, 0.0
        for rows in at_once(case, step):
            source = None if encoder is None else encoder[rows]
            batch = Batch(inputs[rows], targets[rows], mask[rows], encoder_ids=source)
            drawn_from = torch.get_rng_state()
            by_row[rows] = model.token_nll(batch).sum(1)
            torch.set_rng_state(drawn_from)
            terms = model(batch, Z_LOSS)
            (share * terms.objective / scored).backward()
            nll, z = nll + share * float(terms.nll) / scored, z + share * float(terms.z) / scored
        norm = masters.step()
        found.append({"loss": nll, "norm": float(norm), "z": z})
        for index, name in enumerate(order.mixture.sources):
            targets_of = share * int(mask[sources == index].sum())
            if targets_of:
                found[-1][name] = share * float(by_row[sources == index].sum()) / targets_of
    return found


def at_once(case: Case, step: int) -> Iterator[slice]:
    """Rows of one forward pass: all of them, or what 2 ranks' passes draw dropout for, each rank
    from its own seed."""
    if not dict(case.model).get("dropout"):
        yield slice(0, BATCH)
        return
    for low in range(0, BATCH, case.micro_batch):
        if low % (BATCH // 2) == 0:
            torch.manual_seed(hash((0, step, low // (BATCH // 2))) % 2**63)
        yield slice(low, low + case.micro_batch)


def drawn(case: Case, step: int, sampled: int) -> torch.Tensor:
    """Which targets 2 ranks draw at `step`, [BATCH, SEQ_LEN] bool: every group of rows that one
    chunk holds has a draw of its own, from the rank's seed."""
    rows = min(case.micro_batch, case.entp_chunk_pairs // (sampled * SEQ_LEN))
    mask = torch.zeros(BATCH, SEQ_LEN, dtype=torch.bool)
    for low in range(0, BATCH, rows):
        if low % (BATCH // 2) == 0:
            torch.manual_seed(hash((0, step, low // (BATCH // 2))) % 2**63)
        offset = float(torch.rand((), dtype=torch.float64))
        places = [int((i + offset) * SEQ_LEN / sampled) for i in range(sampled)]
        mask[low : low + rows, places] = True
    return mask


class _Masters:
    """fp32 parameters that an optimizer moves, and the model, in fp32 or bf16, that follows."""

    def __init__(self, model: nn.Module, make_optimizer: Any, case: Case) -> None:
        if case.precision == "bf16":
            model.bfloat16()
        self._model, self._clip = model, case.grad_clip or math.inf
        self._fp32 = copy.deepcopy(model).float() if case.precision == "bf16" else model
        self.optimizer: torch.optim.Optimizer = make_optimizer(self._fp32)

    def step(self) -> torch.Tensor:
        """Clip and apply the model's gradients; their norm."""
        pairs = list(zip(self._fp32.parameters(), self._model.parameters(), strict=True))
        for master, parameter in pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self._fp32.parameters(), self._clip)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in pairs:
                parameter.copy_(master)
        self._model.zero_grad()
        return norm
