"""Every benchmark by name, and the peers that cannot be had here."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks import (
    entp_steps,
    feeding,
    heads,
    model_steps,
    tokenising,
    trainer_step,
)
from tests.benchmarks.measure import Benchmark

ALL: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for module in (tokenising, feeding, model_steps, heads, entp_steps, trainer_step)
    for benchmark in module.BENCHMARKS
}
ABSENT_PEERS: dict[str, Callable[[], str]] = {}
