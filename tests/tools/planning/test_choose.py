"""The smallest cluster that a refusal names: accepted itself, and nothing smaller is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.config import RunConfig
from pipeline.config_checks import batch_problems
from pipeline.options import load
from tools.planning.command import Options, plan
from tools.planning.misfit import Misfit

BATCHES = (8, 24, 96, 100, 480, 512)
QUESTIONS = st.fixed_dictionaries(
    {
        "arch": st.sampled_from(("decllm", "redllm", "ared", "entp")),
        "size": st.sampled_from(("1b", "2b", "8b")),
        "gpu": st.sampled_from(("l4", "a100-40", "h100")),
        "gpus_per_node": st.sampled_from((1, 4, 8)),
        "global_batch": st.sampled_from(BATCHES),
        "host_memory_gb": st.sampled_from((0.0, 30.0, 120.0)),
        "async_checkpoints": st.booleans(),
        "seq_len": st.sampled_from((512, 2048)),
    },
    optional={
        "micro_batch": st.sampled_from((1, 2, 4)),
        "activation_checkpointing": st.booleans(),
        "eval_micro_batch": st.sampled_from((1, 64)),
        "optimizer": st.sampled_from(("adafactor", "muon")),
        "precision": st.just("fp32"),
        "ds_config": st.sampled_from(("ds_configs/zero1.json", "ds_configs/zero3.json")),
    },
)


def refusal(question: dict[str, Any], gpus: int) -> dict[str, Any] | None:
    """What is said where `gpus` are too few; None where they do."""
    try:
        plan(load(Options, question | {"gpus": gpus}))
    except Misfit as misfit:
        return misfit.document
    return None


def is_launched(question: dict[str, Any], gpus: int) -> bool:
    """Whether a run would accept so many ranks."""
    config = RunConfig(
        run_dir="r",
        data="d",
        arch="decllm",
        size="nano",
        steps=1,
        global_batch=question["global_batch"],
        micro_batch=question.get("micro_batch"),
        ds_config="unused",
    )
    return not list(batch_problems(config, gpus))


def check_smallest(question: dict[str, Any]) -> bool:
    """False where a single one does, and nothing is named."""
    counts = [n for n in range(1, question["global_batch"] + 1) if is_launched(question, n)]
    refused = refusal(question, counts[0])
    if refused is None:
        return False
    enough = next((n for n in counts if refusal(question, n) is None), None)
    named = refused["smallest_cluster"]
    assert (named and named["gpus"]) == enough, (question, named)
    return True


@given(QUESTIONS)
@settings(max_examples=12, deadline=None)
def test_the_cluster_that_is_named_is_accepted_and_none_below_it(question: dict[str, Any]) -> None:
    assume(question["global_batch"] % question.get("micro_batch", 1) == 0)
    check_smallest(question)


@pytest.mark.parametrize(
    "question",
    [
        # Three, six and twelve nodes' worth; a share of more than one micro-batch.
        {"size": "8b", "global_batch": 480, "gpu": "a100-40"},
        {"size": "8b", "global_batch": 96, "gpu": "l4", "gpus_per_node": 4},
        {"size": "8b", "global_batch": 512, "gpu": "l4", "micro_batch": 2},
        # No number of them.
        {"size": "8b", "global_batch": 3, "gpu": "l4"},
    ],
)
def test_clusters_that_are_no_power_of_two(question: dict[str, Any]) -> None:
    few = {"arch": "decllm", "host_memory_gb": 0.0, "async_checkpoints": False}
    assert check_smallest(few | question)
