"""Small real data that tests of the pipeline and the tools train on, made once a session."""

from __future__ import annotations

import json
import os
import signal
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread a process: tests run side by side on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_configure() -> None:
    """Signals do what they do at a terminal, also where nohup or a shell's `&` had them ignored.

    What is ignored is inherited by every process that a test starts.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A whole run takes two cores, unless files, -n or --pdb ask for something else."""
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    is_free = config.getoption("numprocesses", 0) is None and not config.option.usepdb
    if is_whole and is_free and "PYTEST_XDIST_WORKER" not in os.environ:
        config.option.numprocesses, config.option.dist = 2, "loadfile"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Full counts run only where soak is asked for by name."""
    if "soak" in config.option.markexpr:
        return
    full = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=full)
    items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_disks() -> Iterator[None]:
    """No test's folder must outlive the power; what is synced, and when, has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as RedPajama's, of the standard library's source: about 1.5 MB."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(sysconfig.get_path("stdlib"))
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in library.glob("*.py")]
    texts = sorted(texts, key=len)[:110]
    for source, part in (("github/filtered_0.jsonl", 0), ("wikipedia/wiki.jsonl", 1)):
        path = folder / source
        path.parent.mkdir()
        rows = [{"text": text, "meta": {}} for text in texts[part::2]]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def shards_dir(corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard folder of `corpus_dir`: 512 ids, blocks of 1,024."""
    from tools.cli import dispatch

    folder = tmp_path_factory.mktemp("data")
    model = folder / "t.model"
    shards = folder / "shards"
    dispatch(f"tokenizer train --input {corpus_dir} --output {model} --vocab_size 512".split())
    dispatch(
        f"tokenize --input {corpus_dir} --output {shards} --tokenizer {model} "
        "--block_tokens 1024 --validation_fraction 0.1".split()
    )
    return shards


@pytest.fixture(scope="session")
def flan_dir(shards_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLAN folder: names of functions from their first lines, every other row held out."""
    from tools.cli import dispatch

    folder = tmp_path_factory.mktemp("flan")
    library = Path(sysconfig.get_path("stdlib"))
    rows = []
    for file in sorted(library.glob("*.py"))[:60]:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("def ") and line.endswith(":"):
                rows.append(
                    {
                        "inputs": f"Name the function.\n{line}",
                        "targets": line[4:].partition("(")[0],
                        "task_source": "CoT",
                        "task_name": "function_name",
                        "template_type": "zs_noopt",
                    }
                )
    for split, part in (("train", rows[::2]), ("heldout", rows[1::2])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    made = folder / "made"
    dispatch(
        f"flan --input {folder}/train.jsonl --validation_input {folder}/heldout.jsonl "
        f"--output {made} --tokenizer {shards_dir}/tokenizer.model "
        "--max_input 48 --max_target 16".split()
    )
    return made
