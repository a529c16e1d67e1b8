"""`isoflop tokenize` on a real Slurm and a real Ray cluster, whatever is killed: the same bytes."""

import contextlib
import os
import random
import shutil
import signal
import time
from importlib.util import find_spec

import pytest

from pipeline.network import free_port
from tests.soak.ray_cluster import ray_cluster
from tests.soak.slurm_cluster import slurm_cluster
from tests.tools.tokenising import arguments, content, make_corpus, make_model, run_here, start
from tools.corpus_records import Running

pytestmark = [pytest.mark.soak, pytest.mark.distributed]
LARGE = {"task_bytes": 1_200_000, "shard_bytes": 300_000}  # a task is at work long enough to be hit
KILLS = {"ray": 5, "slurm": 4}
# What is lost is told soon; on a network's file system it may only not be seen yet.
_SOON = "import tools.corpus_step as s; s.GRACE_SECONDS = 1; from tools.cli import main; main()"
# Killed when the jobs are handed in, and not yet noted.
_UNNOTED = """
import os, signal, tools.corpus_slurm as slurm
slurm.write_atomically = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
from tools.cli import main
main()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), 12_000)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return make_model(make_corpus(folder / "corpus", 300), folder / "spm.model")


@pytest.fixture(scope="module")
def shards(corpus, model, tmp_path_factory):
    return content(run_here(corpus, model, tmp_path_factory.mktemp("data") / "shards", **LARGE))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        given = {"engine": "slurm", "workers": 2, "slurm": "mem-per-cpu=1G,time=00:10:00"}
        yield given, environment


@pytest.fixture(scope="module")
def ray(tmp_path_factory):
    if find_spec("ray") is None:
        pytest.skip("needs the extra cluster: ray")
    with ray_cluster(tmp_path_factory.mktemp("ray")) as cluster:
        yield {"engine": "ray", "workers": 2, "ray_address": cluster.address}, cluster.environment


engines = [pytest.param("slurm", marks=pytest.mark.privileged), "ray"]


@pytest.fixture(params=engines)
def engine(request):
    """Options, and an environment, for each kind of cluster."""
    return request.getfixturevalue(request.param)


def ended(process, seconds=120):
    """Exit code and stderr of a command that is to end by itself, without a traceback."""
    try:
        _, told = process.communicate(timeout=seconds)
    finally:
        kill_group(process)
    assert "Traceback" not in told
    return process.returncode, told


def kill_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_the_bytes_are_those_of_one_process(corpus, model, shards, engine, tmp_path):
    options, environment = engine
    given = arguments(corpus, model, tmp_path / "out", **options, **LARGE)
    code, told = ended(start(given, environment=environment))
    assert code == 0, told
    assert "waits for one" not in told  # as it does of a node that is too small
    assert content(tmp_path / "out") == shards


def test_a_task_that_fails_on_a_node_is_told_here(model, engine, tmp_path):
    options, environment = engine
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl.gz").write_bytes(b"no gzip")
    given = arguments(tmp_path / "in", model, tmp_path / "out", **options)
    code, told = ended(start(given, environment=environment))
    assert code == 2
    assert "task 0 of a.jsonl.gz failed: input=" in told


@pytest.mark.privileged
@pytest.mark.parametrize("noted", [True, False], ids=["detached", "killed as it submits"])
def test_the_same_command_waits_for_what_was_submitted(
    corpus, model, shards, slurm, tmp_path, noted
):
    options, environment = slurm
    given = arguments(corpus, model, tmp_path / "out", **options, **LARGE)
    if noted:
        process = start(given | {"detach": "true"}, environment=environment)
        assert "the same command goes on" in process.communicate(timeout=60)[0]
        assert process.returncode == 0
    else:
        process = start(given, _UNNOTED, environment)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/manifest.json").exists()
    code, told = ended(start(given, environment=environment))
    assert code == 0, told
    assert "is still at work" in told
    assert "submitted" not in told
    assert content(tmp_path / "out") == shards


@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra cluster: ray")
def test_an_address_where_nobody_listens_is_refused_at_once(corpus, model, tmp_path):
    for address in (f"127.0.0.1:{free_port()}", f"ray://127.0.0.1:{free_port()}", "no address"):
        given = arguments(corpus, model, tmp_path / "out", engine="ray", ray_address=address)
        code, told = ended(start(given), seconds=60)
        assert code == 2
        assert f"error: ray_address='{address}': no Ray cluster there" in told


def at_work(output):
    """The processes of tasks that say they run."""
    told = map(Running.read, sorted(output.glob("tasks/running/*.running")))
    return [running.process for running in told if running is not None and not running.is_gone()]


def wait_for_work(process, output, records):
    """Until a task runs and `records` are done; False when the command ended before."""
    deadline = time.monotonic() + 90
    while len(list(output.glob("tasks/0*.json"))) < records or not at_work(output):
        assert time.monotonic() < deadline
        if process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def test_killed_anywhere_it_ends_in_the_same_bytes(corpus, model, shards, engine, tmp_path):
    options, environment = engine
    output = tmp_path / "out"
    given = arguments(corpus, model, output, **options, **LARGE)
    generator = random.Random(5)
    hits = []
    for number in range(KILLS[options["engine"]]):
        process = start(given, _SOON, environment)
        try:
            if wait_for_work(process, output, records=generator.randrange(3)):
                time.sleep(generator.uniform(0, 0.4))
                # By turns: a process of a task, which the cluster or the command notices, and the
                # command, whose tasks Slurm lets go on and Ray ends.
                victims = at_work(output) if number % 2 == 0 else []
                if victims:
                    os.kill(generator.choice(victims), signal.SIGKILL)
                    hits.append("task")
                elif number % 2:
                    kill_group(process)
                    hits.append("command")
            if number % 2 == 0:
                code, told = ended(process)
                assert code in (0, 2), told
        finally:
            kill_group(process)
        if (output / "manifest.json").exists():
            assert content(output) == shards
            shutil.rmtree(output)
    assert {"task", "command"} <= set(hits), hits
    code, told = ended(start(given, environment=environment))
    assert code == 0, told
    assert content(output) == shards
