"""A plan as text for a terminal and as JSON for a machine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tools.planning.choose import Choice
from tools.planning.cluster import Cluster, Range
from tools.planning.disk import Disk
from tools.planning.memory import host, step_moments
from tools.planning.speed import MEMORY, MESSAGES, PRODUCTS

DAY = 86_400
CAVEAT = (
    "Times and energy are predictions that were never checked on a GPU; memory is counted tensor "
    "by tensor and checked against CPU runs."
)


@dataclass(frozen=True)
class Plan:
    """What a run will take, with what is recommended for it."""

    arch: str
    size: str
    parameters: int
    cluster: Cluster
    chosen: Choice
    global_batch: int
    steps: int
    tokens: int
    disk: Disk

    @property
    def days(self) -> Range:
        """Of the whole run."""
        step = self.chosen.speed.step
        return Range(step.low * self.steps / DAY, step.high * self.steps / DAY)

    @property
    def tokens_per_second(self) -> Range:
        """Of the whole cluster."""
        per_step, step = self.tokens / self.steps, self.chosen.speed.step
        return Range(per_step / step.high, per_step / step.low)

    @property
    def kilowatt_hours(self) -> Range:
        """Of the GPUs at full power; hosts and cooling come on top."""
        kilowatts = self.cluster.device.watts * self.cluster.devices / 1000
        return Range(self.days.low * 24 * kilowatts, self.days.high * 24 * kilowatts)

    @property
    def utilisation(self) -> Range:
        """Hardware FLOPs over the dense peak."""
        request, speed = self.chosen.request, self.chosen.speed
        peak = self.cluster.device.peak("bf16" if request.precision == "bf16" else "fp32")
        return Range(speed.flops / peak / speed.step.high, speed.flops / peak / speed.step.low)


def gigabytes(size: float) -> str:
    """Decimal GB, with one digit after the point, or MB below one."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def text(plan: Plan) -> str:
    """For a terminal."""
    chosen, cluster = plan.chosen, plan.cluster
    request, disk = chosen.request, plan.disk
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    again = str(request.model.activation_checkpointing).lower()
    lines = [
        f"{plan.arch} {plan.size}, {plan.parameters:,} parameters, on {cluster.devices} × "
        f"{cluster.kind} in {nodes}: {plan.tokens:,} tokens in {plan.steps:,} steps of "
        f"{plan.global_batch} × {request.seq_len}",
        "",
        f"ds_config: {chosen.file}   micro_batch: {request.micro_batch}   "
        f"eval_micro_batch: {chosen.eval_micro_batch}   model.activation_checkpointing: {again}",
        "",
        f"{'memory of a GPU, ' + chosen.peak.name:<58}{'':>2}",
    ]
    if cluster.on_cpu:
        lines[-1] = lines[-1].replace("GPU", "rank")
    for name, size in chosen.peak.parts.items():
        if size:
            lines.append(f"  {name:<40}{gigabytes(size):>12}")
    lines.append(
        f"  {'runtime and allocator (assumed)':<40}"
        f"{gigabytes(chosen.needs - chosen.peak.total):>12}"
    )
    lines.append(
        f"  {'in all':<40}{gigabytes(chosen.needs):>12} of {gigabytes(cluster.device.memory)}"
    )
    other = with_other_checkpointing(chosen)
    lines.append(f"  {'activations ' + other[0]:<40}{gigabytes(other[1]):>12}")
    at_evaluation = chosen.peak is chosen.evaluation
    other_phase = chosen.step if at_evaluation else chosen.evaluation
    named = "fullest of a training step" if at_evaluation else "fullest of an evaluation"
    lines.append(f"  {named:<40}{gigabytes(other_phase.total):>12}")
    for name, size in host(request).items():
        lines.append(f"  {'in host memory: ' + name:<40}{gigabytes(size):>12}")
    speed, days = chosen.speed, plan.days
    rates, energy, share = plan.tokens_per_second, plan.kilowatt_hours, plan.utilisation
    lines += [
        "",
        f"{'predicted':<42}{'optimistic':>12}{'pessimistic':>14}",
        _row("seconds a step", speed.step),
        _row("  matrix products", speed.products),
        _row("  activations and states", speed.memory),
        _row("  messages", speed.messages),
        *([_row("  host", speed.host)] if speed.host.high else []),
        _row("tokens a second", Range(rates.high, rates.low)),
        _row("hardware FLOPs, % of the peak", Range(100 * share.high, 100 * share.low)),
        _row("days", days),
        _row(f"kWh of the {'ranks' if cluster.on_cpu else 'GPUs'} at full power", energy),
        "",
        f"disk: {gigabytes(disk.data)} of tokens in {disk.shards:,} shards "
        f"({disk.shards_per_rank:.3g} a rank), {disk.checkpoints} checkpoints of "
        f"{gigabytes(disk.checkpoint)}: {gigabytes(disk.total)}",
        CAVEAT,
    ]
    return "\n".join(line.rstrip() for line in lines)


def _row(name: str, value: Range) -> str:
    return f"{name:<42}{_figure(value.low):>12}{_figure(value.high):>14}"


def _figure(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def with_other_checkpointing(chosen: Choice) -> tuple[str, int]:
    """What activations take at most the other way: with recomputation, or without."""
    request = chosen.request
    is_on = request.model.activation_checkpointing
    model = dataclasses.replace(request.model, activation_checkpointing=not is_on)
    other = request.with_changes(model=model)
    most = max(moment.parts.get("activations", 0) for moment in step_moments(other))
    return ("without recomputation" if is_on else "with recomputation"), most


def as_json(plan: Plan) -> dict[str, Any]:
    """For a machine; bytes, seconds and shares are plain numbers."""
    chosen, cluster = plan.chosen, plan.cluster
    other = with_other_checkpointing(chosen)
    return {
        "fits": True,
        "model": dataclasses.asdict(chosen.request.model),
        "parameters": plan.parameters,
        "cluster": cluster_json(cluster),
        "ds_config": chosen.file,
        "micro_batch": chosen.request.micro_batch,
        "eval_micro_batch": chosen.eval_micro_batch,
        "activation_checkpointing": chosen.request.model.activation_checkpointing,
        "global_batch": plan.global_batch,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "memory": memory_json(chosen) | {f"activations {other[0]}": other[1]},
        "predicted": {
            "step_seconds": dataclasses.asdict(chosen.speed),
            "tokens_per_second": dataclasses.asdict(plan.tokens_per_second),
            "hardware_utilisation": dataclasses.asdict(plan.utilisation),
            "days": dataclasses.asdict(plan.days),
            "kilowatt_hours": dataclasses.asdict(plan.kilowatt_hours),
            "assumed_efficiencies": {
                "products": dataclasses.asdict(PRODUCTS),
                "memory": dataclasses.asdict(MEMORY),
                "messages": dataclasses.asdict(MESSAGES),
            },
        },
        "disk": dataclasses.asdict(plan.disk) | {"total": plan.disk.total},
        "caveat": CAVEAT,
    }


def cluster_json(cluster: Cluster) -> dict[str, Any]:
    """The machines."""
    return {
        "gpu": cluster.kind,
        "gpus": cluster.devices,
        "gpus_per_node": cluster.per_node,
        "nodes": cluster.nodes,
        **dataclasses.asdict(cluster.device),
    }


def memory_json(choice: Choice) -> dict[str, Any]:
    """Of one device at its fullest moment, and of its host."""
    return {
        "at": choice.peak.name,
        "bytes": choice.peak.parts,
        "tensors": choice.peak.total,
        "needed": choice.needs,
        "step": choice.step.total,
        "evaluation": choice.evaluation.total,
        "host": host(choice.request),
    }
