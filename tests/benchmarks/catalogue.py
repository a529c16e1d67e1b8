"""Every benchmark by name, and the peers that nothing here runs."""

from __future__ import annotations

from tests.benchmarks import (
    encoder_decoder_steps,
    entp_authors,
    entp_steps,
    feeding,
    feeding_cold,
    heads,
    megatron,
    megatron_feeding,
    model_steps,
    optimizer_step,
    sgemm,
    tokenising,
    trainer_step,
)
from tests.benchmarks.measure import Benchmark

ALL: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for module in (
        tokenising,
        megatron,
        megatron_feeding,
        feeding,
        feeding_cold,
        model_steps,
        encoder_decoder_steps,
        sgemm,
        heads,
        entp_steps,
        entp_authors,
        trainer_step,
        optimizer_step,
    )
    for benchmark in module.BENCHMARKS
}

# Peers with no benchmark: name to what one would take. `--peers` lists them as not run.
ABSENT_PEERS: dict[str, str] = {
    "tokenise-litdata": "an environment with litdata",
}
