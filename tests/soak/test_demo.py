"""The demo as a stranger runs it: whole, again, and interrupted again and again."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.soak, pytest.mark.distributed]
ROOT = Path(__file__).resolve().parent.parent.parent


def start(root: Path, *flags: str) -> subprocess.Popen[str]:
    """`isoflop demo ROOT`, started."""
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "isoflop"), "demo", str(root), *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(root: Path) -> dict[str, list[float]]:
    """Every held-out loss, by run: the last attempt of each step and set."""
    found = {}
    for file in sorted((root / "runs").glob("*/eval.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        last = {(record["eval_set"], record["step"]): record["loss"] for record in records}
        found[file.parent.name] = [last[key] for key in sorted(last)]
    return found


def test_the_whole_demo_learns_and_a_second_one_does_nothing_again(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    output, _ = (first := start(root)).communicate(timeout=1200)
    print(output)
    assert first.returncode == 0, output[-4000:]
    assert len(losses(root)) == 11
    for name in ("points.csv", "fit.json", "frontier.png", "report.html"):
        assert (root / "report" / name).stat().st_size > 0
    memory = re.search(r"peak memory .* ([\d.]+) GiB", output)
    assert memory is not None
    assert float(memory.group(1)) < 6
    before = losses(root)
    began = time.monotonic()
    output, _ = (second := start(root)).communicate(timeout=120)
    assert second.returncode == 0, output[-4000:]
    assert output.count("finished before; nothing to do") == 11
    assert time.monotonic() - began < 60
    assert losses(root) == before


def test_interrupting_it_anywhere_changes_nothing(tmp_path: Path) -> None:
    """Ctrl-C at a dozen random moments: the same losses, and no process left behind."""
    flags = ("--scale", "0.05", "--margin", "-10")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    output, _ = (first := start(whole, *flags)).communicate(timeout=900)
    assert first.returncode == 0, output[-4000:]
    moment = random.Random(0)
    for _ in range(12):
        process = start(broken, *flags)
        family = psutil.Process(process.pid)
        try:
            process.communicate(timeout=moment.uniform(2, 40))
        except subprocess.TimeoutExpired:
            below = family.children(recursive=True)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 130, output[-4000:]
            assert "the same command goes on" in output, output[-4000:]
            _, alive = psutil.wait_procs(below, timeout=30)
            assert not alive
        else:
            break
    else:
        # The rest undisturbed.
        output, _ = (process := start(broken, *flags)).communicate(timeout=900)
    assert process.returncode == 0, output[-4000:]
    assert losses(broken) == losses(whole)
