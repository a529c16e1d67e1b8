"""`isoflop tokenize` through kills, a full disk, a Slurm or Ray cluster: the same bytes."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest

from pipeline.data import loader
from pipeline.data.manifest import read_manifest
from tests.pipeline.data.test_damage import damage
from tests.tools.corpus_mutations import KINDS, Part, check_outcomes, make_originals
from tests.tools.tokenising import (
    ROOT,
    arguments,
    content,
    make_corpus,
    make_model,
    run_here,
    start,
)
from tools.corpus_engine import run_locally
from tools.corpus_plan import Settings, Task
from tools.corpus_records import record_path
from tools.corpus_rows import MAX_VALUES
from tools.corpus_stage import Stage, _Watcher
from tools.corpus_step import TaskStep
from tools.worker_pool import in_order

pytestmark = [pytest.mark.soak, pytest.mark.distributed]
KILLS = 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), 600)


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    return make_model(corpus, tmp_path_factory.mktemp("model") / "spm.model")


@pytest.fixture(scope="module")
def shards(corpus, model, tmp_path_factory):
    made = run_here(corpus, model, tmp_path_factory.mktemp("data") / "shards")
    assert len(read_manifest(made).inputs) == 3
    return content(made)


# Imports take longest: done once, in a process whose forks are the commands that are killed.
_FORKS = """
import os, signal, sys, time
from tools.cli import main
import datatrove.executor.local, gigatoken, sentencepiece, numpy, zstandard, tools.corpus_stage
import tools.corpus_tasks as tasks
from pathlib import Path
made = tasks.encoder_of
from pipeline.data.tokenizer import load
made(load({model!r}))
tasks.encoder_of = lambda tokenizer: (time.sleep(0.01), made(tokenizer))[1]
for line in sys.stdin:
    delay, workers = line.split()
    delay = float(delay)
    child = os.fork()
    if not child:
        os.setsid()
        sys.stdin.close()
        sys.argv.append("--workers=" + workers)
        main()
        os._exit(0)
    until = time.monotonic() + delay
    while time.monotonic() < until and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.002)
    if time.monotonic() >= until:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print("over", flush=True)
"""


@pytest.mark.parametrize(
    ("filtered", "kills", "workers"), [(False, KILLS, [1]), (True, 12, [1, 2])]
)
def test_killed_many_times_it_ends_in_the_same_bytes(
    corpus, model, shards, tmp_path, filtered, kills, workers
):
    output = tmp_path / "out"
    changes = {}
    if filtered:
        held = " ".join(f"word{i}" for i in range(20))
        again = b"".join(
            json.dumps({"text": f"row {i % 300} {held if i % 50 == 7 else ''}"}).encode() + b"\n"
            for i in range(2000)
        )
        corpus = shutil.copytree(corpus, tmp_path / "corpus")
        (corpus / "github/filtered_2.jsonl").write_bytes(again)
        (tmp_path / "eval.jsonl").write_text(json.dumps({"question": held}) + "\n")
        changes = {"dedup": "exact", "decontaminate": (str(tmp_path / "eval.jsonl"),)}
        shards = content(run_here(corpus, model, tmp_path / "whole", **changes))
        rejects = read_manifest(tmp_path / "whole").inputs[-1].rejects
        assert min(rejects["duplicate"], rejects["contaminated"]) > 0
    given = arguments(corpus, model, output, **changes)
    process = start_with_input(given, _FORKS.format(model=str(model)))
    generator = random.Random(7)

    def run_for(seconds):
        started = time.monotonic()
        process.stdin.write(f"{seconds} {generator.choice(workers)}\n")
        process.stdin.flush()
        while process.stdout.readline() != "over\n":
            assert process.poll() is None
        return time.monotonic() - started

    run_for(60)
    shutil.rmtree(output)
    whole = run_for(60)
    shutil.rmtree(output)
    partly, records = 0, set()
    for _ in range(kills):
        run_for(generator.uniform(0.1, 0.6) * whole)
        records.add(len(list(output.glob("tasks/0*.json"))))
        if (output / "manifest.json").exists():
            shutil.rmtree(output)
        else:
            partly += 1
    process.stdin.close()
    process.wait(30)
    assert partly > kills // 2
    assert len(records) > 3, records
    assert content(run_here(corpus, model, output, workers=2, **changes)) == shards


def start_with_input(given, code):
    flags = [f"--{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in given.items()]
    return subprocess.Popen(
        [sys.executable, "-c", code, "tokenize", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.privileged
@pytest.mark.parametrize(("workers", "sizes"), [(1, [500]), (2, [500, 100])])
def test_a_full_disk_is_one_line_and_room_lets_it_go_on(
    corpus, model, shards, tmp_path, workers, sizes
):
    with small_disk(tmp_path / "disk", 900 << 10) as disk:
        output = disk / "out"
        ballast = disk / "ballast"
        for size in sizes:
            ballast.write_bytes(bytes(size << 10))
            process = start(arguments(corpus, model, output, workers=workers))
            _, told = process.communicate(timeout=120)
            lines = [line for line in told.splitlines() if not line.startswith("{")]
            assert process.returncode == 2, told
            assert len(lines) == 1, told
            assert "No space left on device" in lines[0]
            assert "make room there, and the same command goes on" in lines[0]
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,size=64M", str(disk)], check=True)
        assert content(run_here(corpus, model, output, workers=workers)) == shards


@pytest.fixture
def memory(tmp_path):
    """A folder on no disk, where there is one: a hundred thousand small files are written."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def test_ten_thousand_damaged_inputs_of_each_kind_are_refused_or_read_right(memory):
    made = make_originals(memory)
    parts = [
        Part(memory / f"{name}-{seed}", *made, name, 2500, seed)
        for seed in range(4)
        for name in KINDS
    ]
    outcomes = sum(in_order(Part.fuzz, parts, workers=2), Counter())
    check_outcomes(outcomes)
    assert outcomes.total() == 10_000 * len(KINDS)


def test_ten_thousand_damaged_folders_are_refused_or_read_right(memory, model):
    corpus = make_corpus(memory / "corpus", 60)
    folder = run_here(corpus, model, memory / "shards", task_bytes=10**6)
    parts = [(folder, memory / f"copy-{seed}", 2500, seed) for seed in range(4)]
    found = list(in_order(damage_part, parts, workers=2))
    refused, harmless = map(sum, zip(*found, strict=True))
    assert refused + harmless == 10_000
    assert min(refused, harmless) > 500


def damage_part(part):
    """One process's share of the damaged folders."""
    folder, copy, count, seed = part
    # What is never asked for need not be planned: that was half of the time.
    with mock.patch.object(loader, "_PLANNED_AT_ONCE", 1), mock.patch("os.fsync"):
        return damage(folder, Path(shutil.copytree(folder, copy)), count, seed)


@pytest.mark.skipif(find_spec("spacy") is None, reason="needs the extra dedup: regex, spacy")
def test_near_duplicates_leave_one_document_of_each_cluster(model, tmp_path):
    generator = random.Random(2)
    # Letters alone: MinHash takes all digits for one.
    words = ["".join(letters) for letters in product("aeiou", "bdfghklmnprst", "aeiou")]
    originals, others = (
        [" ".join(generator.choices(words, k=300)) for _ in range(count)] for count in (4, 6)
    )
    changed = [text.replace(text.split()[150], "changed", 1) for text in originals]
    texts = others + originals + originals + changed
    generator.shuffle(texts)
    (tmp_path / "in").mkdir()
    for name, part in (("a", texts[:9]), ("b", texts[9:])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / "in" / f"{name}.jsonl").write_text(rows)
    given = {"dedup": "minhash", "task_bytes": 10**6}
    manifests = [
        read_manifest(run_here(tmp_path / "in", model, tmp_path / name, **given))
        for name in ("out", "again")
    ]
    rejects = sum((Counter(item.rejects) for item in manifests[0].inputs), Counter())
    assert rejects == {"duplicate": 4, "near duplicate": 4}
    assert sum(item.documents for item in manifests[0].inputs) == 10
    assert manifests[0].fingerprint == manifests[1].fingerprint


def peak_mib(corpus, model, folder, *flags):
    """Peak memory of a process that runs one task."""
    (folder / "tasks").mkdir(parents=True)
    shutil.copyfile(model, folder / "tokenizer.model")
    code = (
        "import sys; from pathlib import Path; from tools.corpus_engine import run_locally\n"
        "from tools.corpus_tasks import run_task; from tools.corpus_plan import Settings, Task\n"
        "import numpy as np; from tools.corpus_decontaminate import Evaluations, keep_evaluations\n"
        "held = Evaluations(np.array([5], np.uint64), 1, 0)\n"
        "keep_evaluations(Path(sys.argv[2]), held)\n"
        "held = held.fingerprint if len(sys.argv) > 3 else ''\n"
        "given = Settings(131072, 1, 1 << 30, 0.0, 'text', 'x', 64 << 20, 0, None, 'none', held)\n"
        "task = Task(0, 'a', sys.argv[1], 0, Path(sys.argv[1]).stat().st_size, 'x')\n"
        "record = run_task(task, given, Path(sys.argv[2]))\n"
        "print(record.documents, sorted(record.rejects.items()))\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus), str(folder), *flags],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    told, peak = done.stdout.splitlines()
    return told, int(peak) / 1024


def test_memory_is_bounded_on_ordinary_documents_and_on_any(model, tmp_path):
    generator = random.Random(0)
    words = [
        "".join(generator.choices("abcdefghij", k=generator.randint(2, 9))) for _ in range(9999)
    ]
    ordinary = tmp_path / "ordinary.jsonl"
    with open(ordinary, "w") as file:
        for _ in range(4000):
            file.write(json.dumps({"text": " ".join(generator.choices(words, k=600))}) + "\n")
    told, peak = peak_mib(ordinary, model, tmp_path / "ordinary")
    assert told == "4000 []"
    assert peak < 300

    long = tmp_path / "long.jsonl"
    texts = [" ".join(generator.choices(words, k=4_000_000)), "a" * (40 << 20), "\ud83d " * 10**6]
    with open(long, "w") as file:
        for text in texts:
            file.write(json.dumps({"text": text + " 😀"}) + "\n")
        file.truncate(file.tell() + (1100 << 20))  # a line of zeros, over a gigabyte
    told, peak = peak_mib(long, model, tmp_path / "long")
    assert told == "3 [('row too long', 1)]"
    assert peak < 1024


def test_memory_is_bounded_on_rows_of_many_words_or_values(model, tmp_path):
    generator = random.Random(0)
    words = [
        "".join(generator.choices("abcdefghij", k=generator.randint(2, 5))) for _ in range(5000)
    ]
    path = tmp_path / "words.jsonl"
    path.write_text(json.dumps({"text": " ".join(generator.choices(words, k=13_000_000))}) + "\n")
    told, peak = peak_mib(path, model, tmp_path / "words", "decontaminate")
    assert told == "1 []"
    assert peak < 700

    text = b'"' + b"a" * (40 << 20) + b'\\ud83d\\ude00"'
    held = (
        b'{"text":' + text + b',"n":NaN,"meta":[' + b'{"a":1},' * (MAX_VALUES // 2 - 8) + b"0]}\n"
    )
    path = tmp_path / "values.jsonl"
    path.write_bytes(b'{"text":"a","meta":[' + b"[]," * (20 << 20) + b"0]}\n" + held)
    told, peak = peak_mib(path, model, tmp_path / "values")
    assert told == "1 [('too many values', 1)]"
    assert peak < 1024


def empty_task(task, settings, output, *, in_worker):
    """Is done."""
    record_path(output, task.id).write_text("done")


def test_the_command_takes_no_longer_for_each_of_more_tasks(tmp_path):
    seconds = []
    for count in (100, 1000):
        names = [f"train/chunk{i % 10}/example_train_{i}.jsonl.zst" for i in range(count)]
        tasks = [Task(i, name, f"/data/{name}", 0, None, None) for i, name in enumerate(names)]
        given = Settings(256, 1, 1, 0.0, "text", "x", 1 << 20, 0, None, "none", "")
        stage = Stage("x", empty_task, record_path, lambda output, task: None)
        step = TaskStep(empty_task, record_path, tasks, given, tmp_path / str(count))
        step.prepare()
        watch = _Watcher(stage, tasks, dict.fromkeys(range(count), 1), step.output, {})
        started = time.process_time()
        run_locally(step, 2, watch)
        seconds.append((time.process_time() - started) / count)
        assert step.is_told()
    assert seconds[1] < 2 * seconds[0] + 0.002, seconds
