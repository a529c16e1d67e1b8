"""The benchmarks' own machinery: statistics, order, refusals, and two of them end to end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.options import UserError, load
from tests.benchmarks import __main__ as program
from tests.benchmarks import catalogue, feeding, tokenising
from tests.benchmarks.measure import (
    Benchmark,
    Contest,
    Measurement,
    NotRun,
    Sample,
    UnequalWork,
    live_growth,
    measure,
    median_interval,
)
from tests.benchmarks.model_steps import same_numbers
from tests.benchmarks.report import as_record, table

ROOT = Path(__file__).parents[1]


def test_the_median_interval_is_that_of_the_binomial() -> None:
    values = [5.0, 9.0, 1.0, 7.0, 3.0, 8.0, 2.0, 6.0, 4.0]
    assert median_interval(values) == (2.0, 8.0, pytest.approx(1 - 20 / 512))
    assert median_interval(values[:6]) == (1.0, 9.0, pytest.approx(1 - 2 / 64))
    assert median_interval(values[:5]) is None
    stats = pytest.importorskip("scipy.stats")
    for n in range(6, 60):
        found = median_interval(list(map(float, range(1, n + 1))))
        assert found is not None
        k = int(stats.binom.ppf(0.025, n, 0.5))  # the largest with 2·P(Bin < k) ≤ 0.05
        assert found == (k, n + 1 - k, pytest.approx(1 - 2 * stats.binom.cdf(k - 1, n, 0.5)))


def test_the_median_interval_covers_the_median_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(0).lognormal(size=(4000, 9))
    intervals = [median_interval(list(row)) for row in drawn]
    covered = np.mean([i[0] <= 1 <= i[1] for i in intervals if i])
    expected = 1 - 20 / 512
    assert covered == pytest.approx(expected, abs=4 * math.sqrt(expected * 0.04 / 4000))


def constant(value: float, result: Any = 0) -> Sample:
    return Sample(value, result)


def test_pairs_are_interleaved_and_their_ratios_taken_inside_each() -> None:
    calls: list[str] = []
    costs = iter([100.0, 100.0, 1.0, 4.0, 2.0, 2.0, 4.0, 12.0])

    def side(name: str) -> Sample:
        calls.append(name)
        return constant(next(costs))

    found = measure(Contest(lambda: side("a"), lambda: side("b"), lambda a, b: None), pairs=3)
    assert calls == ["a", "b"] * 4  # the first pair is the warm-up
    assert found.ratios == [4.0, 1.0, 3.0]
    record = as_record(found, Contest(constant, constant, print, work=8.0, unit="MB"))  # type: ignore[arg-type]
    assert record["ratio"] == np.median([4.0, 1.0, 3.0])
    assert record["cpu_seconds"] == {"ours": 2.0, "theirs": 4.0}
    assert record["per_cpu_second"] == {"ours": 4.0, "theirs": 2.0}
    assert record["interval"] is None


def test_every_pair_is_checked() -> None:
    results = iter([1, 1, 2])

    def check(ours: int, theirs: int) -> None:
        if ours != theirs:
            raise UnequalWork("no")

    contest = Contest(lambda: constant(1.0, next(results)), lambda: constant(1.0, 1), check)
    with pytest.raises(UnequalWork):
        measure(contest, pairs=5)
    assert list(results) == []


def fake(name: str, prepare: Any) -> Benchmark:
    return Benchmark(name, "ours", "theirs", "one process", prepare)


def raises(error: Exception) -> Any:
    def prepare(folder: Path) -> Contest:
        raise error

    return prepare


def test_what_is_absent_or_fails_is_told_and_the_rest_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Contest(lambda: constant(1.0), lambda: constant(2.0), lambda a, b: None)
    made = {
        "absent": fake("absent", raises(NotRun("no such thing; install it"))),
        "unequal": fake("unequal", raises(UnequalWork("ids differ"))),
        "good": fake("good", lambda folder: good),
    }
    monkeypatch.setattr(program, "ALL", made)
    output = tmp_path / "benchmarks.json"
    assert program.run(load(program.Options, {"output": str(output), "pairs": 6})) == 1
    shown = capsys.readouterr().out
    assert "absent: not run: no such thing; install it" in shown
    assert "unequal: failed: ids differ" in shown
    records = {r["name"]: r for r in json.loads(output.read_text())["results"]}
    assert records["absent"]["not_run"]
    assert records["unequal"]["failed"]
    assert records["good"]["ratio"] == 2.0
    assert records["good"]["interval"] == [2.0, 2.0]
    # A second run replaces what it measures and keeps the rest.
    del made["unequal"], made["absent"]
    assert program.run(load(program.Options, {"output": str(output), "pairs": 1})) == 0
    records = {r["name"]: r for r in json.loads(output.read_text())["results"]}
    assert set(records) == {"absent", "unequal", "good"}
    assert records["good"]["pairs"] == 1


def test_a_foreign_output_file_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "notes.json"
    output.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="holds no benchmarks"):
        program.run(load(program.Options, {"output": str(output)}))
    assert output.read_text() == '{"mine": 1}'


def test_list_names_all_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['bench', '--list']\n"
        "from tests.benchmarks import __main__ as program\n"
        "try: program.main()\n"
        "finally: assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr
    assert all(name in found.stdout for name in catalogue.ALL)


def test_an_unknown_name_is_refused() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--only", "feeding,feding"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 2
    assert "only='feding': no such benchmark; give one of: tokenise" in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.distributed
def test_small_ones_run_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "BLOCKS", 4)
    monkeypatch.setattr(tokenising, "TEXT_BYTES", 400_000)
    monkeypatch.setattr(tokenising, "VOCAB_SIZE", 1000)
    names = ("tokenise-sentencepiece", "feeding")
    output = tmp_path / "benchmarks.json"
    options = {"output": str(output), "pairs": 1, "only": ",".join(names)}
    assert program.run(load(program.Options, options)) == 0
    records = json.loads(output.read_text())["results"]
    assert tuple(r["name"] for r in records) == names
    for record in records:
        assert record["ratio"] > 0
        assert min(record["cpu_seconds"].values()) > 0
        assert record["machine"]["cores"]
    assert min(records[0]["peak_mib"].values()) > 10
    assert min(records[0]["start_up_cpu_seconds"].values()) > 0
    assert all(name in table(records) for name in names)


def test_sides_that_differ_are_found() -> None:
    with pytest.raises(UnequalWork, match="ids differ"):
        tokenising.same_ids("aa", "bb")
    with pytest.raises(UnequalWork, match="sequences differ"):
        feeding.same_sequences(("a", 1), ("b", 1))
    with pytest.raises(UnequalWork, match="differ"):
        same_numbers((1.0, 2.0), (1.0, 2.1))
    with pytest.raises(UnequalWork, match="differ"):
        same_numbers((math.nan,), (1.0,))
    same_numbers((1.0, 2.0), (1.0, 2.0 + 1e-5))


def test_measurement_refuses_unpaired_costs() -> None:
    with pytest.raises(ValueError, match="zip"):
        Measurement([1.0], [1.0, 2.0])


def test_live_memory_is_what_tensors_hold_at_once():
    import torch

    def work():
        kept = torch.empty(3 * 2**18)
        for _ in range(3):
            torch.empty(5 * 2**18)  # given back at once
        return kept

    assert 8 <= live_growth(work) < 8.1
