"""`isoflop demo`: runs the stages, skips what is done, and ends with the table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.atomic import write_atomically
from pipeline.network import free_port
from pipeline.options import UserError, option
from pipeline.run_folder import RunFolder
from tools.demo.stages import Stage, stages

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Options:
    """Real text to a compute frontier: corpus, tokenizer, shards, nine pretrainings of three
    architectures under ZeRO-3 with two ranks, two finetunings, and the report.

    A second run skips what is done; Ctrl-C leaves a state from which the same command goes on.
    """

    output: str = option("folder to work in", "demo_run", metavar="DIR", positional=True)
    scale: float = option("multiplies the number of training steps", 1.0, minimum=0.0)
    margin: float = option(
        "nats that every model must end below the unigram entropy of what it is scored on", 0.5
    )
    install_seconds: float = option("what the installation took, for the table of times", 0.0)


def run(options: Options) -> None:
    """Run what is not done yet and print the table. Exits with 1 where a stage or a model fails."""
    if not (ROOT / "pipeline" / "pretrain.py").exists():
        raise UserError("demo: runs from a checkout; install isoflop with make install")
    # Paths below the checkout are written as such: run folders say the same on every machine.
    root = Path(os.path.relpath(options.output, ROOT))
    os.chdir(ROOT)
    times = _read_times(root)
    plan = stages(root, options.scale)
    memory = PeakMemory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with memory:
        for number, stage in enumerate(plan, 1):
            print(f"[{number}/{len(plan)}] {stage.name}", flush=True)
            started = time.monotonic()
            try:
                _run_stage(stage)
            finally:
                # An interrupted stage goes on later: its time adds up.
                spent = time.monotonic() - started
                if spent > 1 or stage.name not in times:
                    times[stage.name] = round(times.get(stage.name, 0.0) + spent, 1)
                    write_atomically(root / "times.json", json.dumps(times, indent=2) + "\n")
    _summarise(root, plan, times, options.install_seconds, memory.peak)
    lagging = not_learned(root / "runs", options.margin)
    if lagging:
        print("error: not every model learned:\n" + "\n".join(lagging), file=sys.stderr)
        sys.exit(1)


def _run_stage(stage: Stage) -> None:
    if stage.run is not None:
        # The file is JSON, which is YAML too.
        file = Path(stage.argv[-1])
        text = json.dumps(stage.config, indent=2) + "\n"
        if RunFolder(stage.run).is_finished and file.exists() and file.read_text() == text:
            print(f"{stage.run.name}: finished before; nothing to do", flush=True)
            return
        write_atomically(file, text)
    # A session of its own: Ctrl-C reaches this process alone, which then asks the right ones.
    child = subprocess.Popen(_command(stage), cwd=ROOT, env=_environment(), start_new_session=True)
    code = _wait(child)
    finished = stage.run is None or RunFolder(stage.run).is_finished
    # Success is read from the run's own marker: the launcher's exit code alone does not prove it.
    if code != 0 or not finished:
        print(f"error: stage {stage.name!r} failed with exit code {code}", file=sys.stderr)
        print(f"to see it alone: {' '.join(_command(stage))}", file=sys.stderr)
        sys.exit(1)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The child's exit code; when interrupted, ask it to save its state and wait until it ended."""
    try:
        return child.wait()
    except KeyboardInterrupt:
        print("interrupted: waiting for the stage to save its state", file=sys.stderr, flush=True)
        previous = {
            number: signal.signal(number, signal.SIG_IGN)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            interrupt_tree(child.pid)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        raise


def interrupt_tree(pid: int) -> None:
    """Send SIGINT to what does the work below `pid`, and end whatever is left a minute later.

    DeepSpeed's launcher would die at once and leave its ranks behind, so the ranks are asked: they
    agree on a step, save, and leave, and the launcher ends after them.
    """
    import psutil

    try:
        top = psutil.Process(pid)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    parents = {process.ppid() for process in family if process.is_running()}
    leaves = [process for process in family if process.pid not in parents]
    for process in leaves:
        with contextlib.suppress(psutil.NoSuchProcess):
            # A launcher that has started no rank yet has nothing to save: it is ended quietly.
            launching = any("deepspeed" in Path(word).name for word in process.cmdline()[:4])
            process.send_signal(signal.SIGTERM if launching else signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=60)
    for process in alive:
        process.kill()


def _command(stage: Stage) -> list[str]:
    program = Path(sys.executable).parent / stage.argv[0]
    words = list(stage.argv[1:])
    if stage.argv[0] == "deepspeed":
        words = ["--quiet", "--master_port", str(free_port()), *words]
    return [sys.executable, str(program), *words]


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    if not Path("/dev/nvidiactl").exists():
        # Said once here instead of guessed, with a warning, by every process.
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _read_times(root: Path) -> dict[str, float]:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output={str(root)!r}: {error.strerror}; give a folder that can be written"
        ) from error
    file = root / "times.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


class PeakMemory:
    """The largest sum of resident memory of this process and all below it, sampled.

    Pages that processes share are counted once for each: an upper bound.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        me = psutil.Process()
        while not self._ended.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)


def _summarise(
    root: Path, plan: list[Stage], times: dict[str, float], install_seconds: float, peak: int
) -> None:
    from tools.frontier.points import read_runs
    from tools.frontier.summary import final_rows, text_table

    runs = root / "runs"
    found = read_runs(runs)
    print("\nheld-out blocks, matched targets\n" + text_table(final_rows(found)))
    print("\nheld-out instructions, targets\n" + text_table(final_rows(found, "flan_heldout")))
    print("\nseconds by stage")
    shown = {"install": install_seconds, **{stage.name: times[stage.name] for stage in plan}}
    for name, seconds in shown.items():
        print(f"  {name:<28}{seconds:>8.1f}")
    print(f"  {'all':<28}{sum(shown.values()):>8.1f}")
    print(f"peak memory (sum of resident sets) {peak / 2**30:.2f} GiB")
    report = (root / "report").resolve()
    print(f"table:  {report / 'points.csv'}\nreport: {report / 'report.html'}")


def not_learned(runs: Path, margin: float) -> list[str]:
    """A line for each run whose final loss is not `margin` nats below the unigram entropy."""
    lines = []
    for file in sorted(runs.glob("*/eval.jsonl")):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        final: dict[str, Any] = {r["eval_set"]: r for r in records if r["final"]}
        # A finetuned model is judged on what it was finetuned for.
        judged = final.get("flan_heldout") or final.get("validation")
        if judged is None:
            lines.append(f"{file.parent.name}: was never scored at its end")
        elif not judged["loss"] <= judged["unigram_entropy"] - margin:
            lines.append(
                f"{file.parent.name}: loss {judged['loss']:.3f} on {judged['eval_set']} is not "
                f"{margin} nats below the unigram entropy {judged['unigram_entropy']:.3f}"
            )
    return lines
