"""Adafactor (arXiv 1804.04235) that knows what ZeRO made of the parameters.

The rule, with T5X's names and defaults, for a parameter p with gradient g at its step t (from 1):

    β₂ = 1 − t^−decay_rate
    v ← β₂·v + (1 − β₂)·(g² + ε₁)            factored: so R and C, from means of g² + ε₁ instead
    u = g / √v                                factored: u = g / (√(R / mean R)·√C)
    u ← u / max(1, RMS(u) / clipping_threshold)
    s = lr·max(RMS(p), ε₂)·u
    m ← β₁·m + (1 − β₁)·s                     without momentum (β₁ = 0): m = s
    p ← (1 − lr·weight_decay)·p − m

RMS(u) and RMS(p) belong to a whole parameter, R and C to whole rows and columns. ZeRO hands an
optimizer flat tensors that hold slices of many parameters: a stock Adafactor takes one for a single
parameter of one dimension. This one is told what lies where (`bind`), keeps the flat tensors, and
sums over the ranks two numbers a parameter and, factored, the row and column sums: one all-reduce a
flat tensor and step, two when factored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from pipeline.optim.recipe import factored_dims
from pipeline.optim.second_moment import Factored, SecondMoment, Unfactored
from pipeline.optim.shard import Shard
from pipeline.zero_layout import Fragment


class Adafactor(torch.optim.Optimizer):
    """Adafactor over whole parameters, or over the flat tensors that ZeRO makes of them.

    Args:
        params: parameters, or groups of them with their own lr and weight_decay. A group that has
            factored and other parameters is split, so that each flat tensor is of one kind.
        lr: the step relative to the parameter's RMS (0.01 in the papers); with
            multiply_by_parameter_scale=False the step itself.
        factored: keep row and column means of the second moment instead of all of it.
        decay_rate: exponent of the second moment's decay.
        clipping_threshold: largest RMS of a parameter's update; None clips nothing.
        multiply_by_parameter_scale: whether steps are relative to max(RMS(p), epsilon2).
        beta1: momentum's decay; 0 keeps no momentum.
        weight_decay: share of lr by which parameters shrink at a step (T5X's weight_decay_rate with
            weight_decay_rate_lr_exponent=1).
        min_dim_size_to_factor: parameters whose second largest dimension is smaller stay whole.
        epsilon1: added to squared gradients.
        epsilon2: smallest scale of a parameter.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        factored: bool = False,
        decay_rate: float = 0.8,
        clipping_threshold: float | None = 1.0,
        multiply_by_parameter_scale: bool = True,
        beta1: float = 0.0,
        weight_decay: float = 0.0,
        min_dim_size_to_factor: int = 128,
        epsilon1: float = 1e-30,
        epsilon2: float = 1e-3,
    ) -> None:
        self.factored = factored
        self.decay_rate = decay_rate
        self.clipping_threshold = clipping_threshold
        self.multiply_by_parameter_scale = multiply_by_parameter_scale
        self.beta1 = beta1
        self.min_dim_size_to_factor = min_dim_size_to_factor
        self.epsilon1 = epsilon1
        self.epsilon2 = epsilon2
        self._shards: dict[int, Shard] = {}
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(list(self._groups_by_kind(params)), defaults)

    def _groups_by_kind(self, params: Iterable[Any]) -> Iterator[dict[str, Any]]:
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        for group in groups:
            kinds: dict[bool, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                kinds.setdefault(self._is_factored(shape), []).append(parameter)
            yield from ({**group, "params": members} for members in kinds.values())

    def _is_factored(self, shape: Sequence[int]) -> bool:
        return self.factored and factored_dims(shape, self.min_dim_size_to_factor) is not None

    def bind(self, fragments: Iterable[Fragment]) -> None:
        """Learn what each flat tensor holds, and make its state; before the first step.

        `fragments` are of every parameter, those too of which this rank holds nothing, in one order
        on all ranks. Without it each tensor is one whole parameter, equal on all ranks.
        """
        held: dict[int, list[Fragment]] = {}
        for fragment in fragments:
            held.setdefault(id(fragment.flat), []).append(fragment)
        self._shards = {key: self._make_shard(found) for key, found in held.items()}

    def _make_shard(self, fragments: Sequence[Fragment]) -> Shard:
        kinds = {self._is_factored(fragment.shape) for fragment in fragments}
        if len(kinds) != 1:
            raise RuntimeError("a flat tensor mixes factored and other parameters")
        minimum = self.min_dim_size_to_factor if kinds == {True} else None
        shard = Shard(fragments, minimum)
        state: dict[str, Any] = {"step": 0}
        if minimum is None:
            state["exp_avg_sq"] = torch.zeros_like(shard.flat, requires_grad=False)
        else:
            state["row"] = shard.flat.new_zeros(shard.num_rows)
            state["column"] = shard.flat.new_zeros(shard.num_columns)
        if self.beta1:
            state["exp_avg"] = torch.zeros_like(shard.flat, requires_grad=False)
        self.state[shard.flat] = state
        return shard

    def replicated_state(self) -> dict[str, torch.Tensor]:
        """Row and column statistics, whole on every rank, by `row/NAME` and `column/NAME`."""
        found = {}
        for shard in self._shards.values():
            state = self.state[shard.flat]
            for fragment, factors in zip(shard.fragments, shard.factors, strict=False):
                found[f"row/{fragment.name}"] = factors.rows_of(state["row"])
                found[f"column/{fragment.name}"] = factors.columns_of(state["column"])
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every tensor in `param_groups` that has a gradient. A collective.

        Gradients are overwritten: they become the updates.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step_one(flat, group["lr"], group["weight_decay"])
        return loss

    def _step_one(self, flat: torch.Tensor, lr: float, weight_decay: float) -> None:
        shard = self._shards.get(id(flat))
        if shard is None:
            name, size = str(len(self._shards)), flat.numel()
            whole = Fragment(name, flat.shape, flat, 0, 0, size, replicated=True)
            shard = self._shards[id(flat)] = self._make_shard([whole])
        state = self.state[flat]
        # ZeRO steps one flat tensor a call, so steps are counted for each, not by calls.
        step = state["step"] = int(state["step"]) + 1
        share, gradient = step**-self.decay_rate, flat.grad.view(-1)  # type: ignore[union-attr]
        moment: SecondMoment
        if shard.factors:
            moment = Factored(shard, gradient, state, share, self.epsilon1)
        else:
            moment = Unfactored(shard, gradient, state, share, self.epsilon1)
        parameter = flat.view(-1)
        rms_u, rms_p = shard.rms(parameter, moment.divide)
        sizes = [lr * self._scale(u, p) for u, p in zip(rms_u, rms_p, strict=True)]
        momentum = state["exp_avg"].view(-1) if self.beta1 else None
        for piece in shard.pieces:
            p, u = piece.of(parameter), piece.of(gradient)
            if weight_decay:
                p.mul_(1 - lr * weight_decay)
            target, weight = p, -1.0
            if momentum is not None:
                target, weight = piece.of(momentum).mul_(self.beta1), 1 - self.beta1
            for index, part, added in piece.parts_of_both(target, u):
                part.add_(added, alpha=weight * sizes[index])
            if momentum is not None:
                p.sub_(target)

    def _scale(self, rms_u: float, rms_p: float) -> float:
        """max(RMS(p), ε₂) / max(1, RMS(u) / clipping_threshold), each if asked for."""
        scale = max(rms_p, self.epsilon2) if self.multiply_by_parameter_scale else 1.0
        if self.clipping_threshold is not None:
            scale /= max(1.0, rms_u / self.clipping_threshold)
        return scale
