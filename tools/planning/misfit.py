"""What is said where nothing fits: what comes nearest, what fills it, and what would do."""

from __future__ import annotations

import math
from typing import Any

from pipeline.options import UserError
from tools.planning.choose import Choice, Freedom
from tools.planning.cluster import Cluster
from tools.planning.memory import SAVE_COPY, host
from tools.planning.report import cluster_json, gigabytes, memory_json


class Misfit(UserError):
    """Nothing that may be chosen fits.

    Attributes:
        document: the same for a machine.
    """

    def __init__(
        self,
        model: str,
        cluster: Cluster,
        freedom: Freedom,
        nearest: tuple[Choice | None, Choice | None],
        enough: tuple[Cluster, Choice] | None,
    ) -> None:
        """`nearest`: of what fits no device, and of what fits one but not its host; see `closest`.
        `enough`: the smallest cluster that holds it."""
        beyond, inside = nearest
        shown = inside or beyond
        assert shown is not None  # a file that can run the model is there, or was refused
        if beyond is not None and (inside is None or inside.request.offloads_optimizer):
            # Of a host nothing was asked, or too much: what does without it is the first to know.
            shown = beyond
            parts = [_on_device(model, cluster, beyond)]
            if inside is not None:
                parts.append(f"{inside.file} would fit with {_enough_on_host(cluster, inside)}")
        else:
            parts = [_on_host(model, cluster, shown)]
        parts.append(_remedy(cluster, freedom, enough))
        super().__init__(f"gpus={cluster.devices}: {'; '.join(parts)}")
        self.document = _document(cluster, shown, enough)


def _on_device(model: str, cluster: Cluster, choice: Choice) -> str:
    peak = choice.peak
    return (
        f"{model} does not fit {cluster.kind}'s {gigabytes(cluster.device.memory)}: each needs at "
        f"least {gigabytes(choice.needs)} ({peak.name}), most of it {peak.largest} "
        f"({gigabytes(peak.parts[peak.largest])})"
    )


def _on_host(model: str, cluster: Cluster, choice: Choice) -> str:
    node = cluster.on_node
    named = ", ".join(f"{name} {gigabytes(node * n)}" for name, n in host(choice.request).items())
    return (
        f"host_memory_gb={cluster.host_memory / 1e9:g}: too little for {model} with {choice.file} "
        f"({named}); give {_enough_on_host(cluster, choice)}"
    )


def _enough_on_host(cluster: Cluster, choice: Choice) -> str:
    """What would do for `choice`."""
    held, node = host(choice.request), cluster.on_node
    said = f"host_memory_gb={math.ceil(node * sum(held.values()) / 1e9)}"
    if cluster.holds_on_host(sum(held.values()) - held.get(SAVE_COPY, 0)):
        said += " or async_checkpoints=false, which makes no copy"
    return said


def _remedy(cluster: Cluster, freedom: Freedom, enough: tuple[Cluster, Choice] | None) -> str:
    if enough is None:
        given = [f"global_batch={freedom.global_batch}"]
        if freedom.micro_batch is not None:
            given.append(f"micro_batch={freedom.micro_batch}")
        return (
            f"no number of {cluster.kind} that {' and '.join(given)} can be cut for holds it: give "
            "a larger global_batch, a shorter seq_len, more host memory or a larger kind"
        )
    way = enough[1]
    said = (
        f"the smallest cluster that holds it is {enough[0].devices} × {cluster.kind} with "
        f"{way.file}, micro_batch {way.request.micro_batch}, eval_micro_batch "
        f"{way.eval_micro_batch}"
    )
    if way.request.model.activation_checkpointing:
        said += " and activation checkpointing"
    return said


def _document(
    cluster: Cluster, nearest: Choice, enough: tuple[Cluster, Choice] | None
) -> dict[str, Any]:
    found = None
    if enough is not None:
        found = {
            "gpus": enough[0].devices,
            "ds_config": enough[1].file,
            "micro_batch": enough[1].request.micro_batch,
            "eval_micro_batch": enough[1].eval_micro_batch,
            "activation_checkpointing": enough[1].request.model.activation_checkpointing,
            "memory": memory_json(enough[1]),
        }
    return {
        "fits": False,
        "cluster": cluster_json(cluster),
        "ds_config": nearest.file,
        "memory": memory_json(nearest),
        "largest": nearest.peak.largest,
        "smallest_cluster": found,
    }
