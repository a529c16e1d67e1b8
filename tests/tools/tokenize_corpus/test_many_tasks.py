"""What one task costs does not grow with the number of tasks."""

import os
from copy import deepcopy
from functools import partial

import dill
import pytest

from tools.corpus_plan import Settings, Task
from tools.corpus_records import Running, ended_path, failed_path, record_path, running_path
from tools.corpus_stage import TOKENISE, Stage, _Watcher
from tools.corpus_step import TaskStep

SETTINGS = Settings(256, 1, 1, 0.0, "text", "x", 1 << 20, 0, None, "none", "")


def tasks_of(count):
    return [
        Task(i, f"part-{i:06}.jsonl", f"/in/part-{i:06}.jsonl", 0, 9, None) for i in range(count)
    ]


def prepared(folder, count, work=TOKENISE.work):
    step = TaskStep(work, record_path, tasks_of(count), SETTINGS, folder)
    step.prepare()
    return step


def test_what_goes_to_a_worker_does_not_grow_with_the_tasks(tmp_path):
    from tools.corpus_engine import _QuietExecutor

    sizes = set()
    for count in (10, 3000):
        step = prepared(tmp_path / "out", count)
        executor = _QuietExecutor([step], tasks=5, workers=2, logging_dir=str(tmp_path / "logs"))
        sizes.add(len(dill.dumps(partial(executor._launch_run_for_rank, ranks_q=None))))
        assert deepcopy(step).tasks is None
    assert len(sizes) == 1, sizes


def told(task, settings, output, *, in_worker):
    (output / f"{task.id}.told").write_text(f"{task} {settings}")


@pytest.mark.parametrize("send", [deepcopy, lambda step: dill.loads(dill.dumps(step))])
def test_a_worker_finds_the_task_of_its_rank(tmp_path, send):
    for count in (7, 3):  # of another pass, in the same process
        step = send(prepared(tmp_path, count, told))
        for rank in (2, 0):
            assert list(step.run(None, rank)) == []
            assert (tmp_path / f"{rank}.told").read_text() == f"{tasks_of(count)[rank]} {SETTINGS}"
    assert len(list(tmp_path.glob("tasks/*.tasks"))) == 1


def test_a_look_at_the_progress_sees_only_what_runs_or_has_ended(tmp_path, monkeypatch):
    asked, listed = [], []

    def done(output, task):
        asked.append(task)
        return (100, 1) if record_path(output, task).exists() else None

    def look(path, real=os.scandir):
        listed.append(os.fspath(path))
        return real(path)

    count = 2000
    tasks = tasks_of(count)
    stage = Stage("x", lambda *given: None, record_path, done)
    watch = _Watcher(stage, tasks, dict.fromkeys(range(count), 10), tmp_path, {})
    shown = []
    monkeypatch.setattr(watch.progress, "show", lambda *given: shown.append(given))
    Running("elsewhere", 1, 5, 40, 2).tell(running_path_of(tmp_path, 0))
    for task in (1, 2, 3):
        Running("elsewhere", 1).tell(running_path_of(tmp_path, task))
        os.replace(running_path(tmp_path, task), ended_path(tmp_path, task))
    record_path(tmp_path, 1).write_text("done")
    failed_path(tmp_path, 2).write_text("why")  # and 3 is not seen yet
    monkeypatch.setattr(os, "scandir", look)
    monkeypatch.setattr(os, "listdir", look)
    watch()
    assert sorted(asked) == [1, 2, 3]
    record_path(tmp_path, 3).write_text("done")
    watch()
    watch()
    assert shown == [(15, 140, 3, count - 1), *[(25, 240, 4, count - 2)] * 2]
    assert sorted(asked) == [1, 2, 3, 3]
    assert {os.path.basename(path) for path in listed} == {"running"}


def running_path_of(output, task):
    (output / "tasks").mkdir(exist_ok=True)
    return running_path(output, task)


def test_a_ray_cluster_too_small_for_any_task_is_noticed():
    from tools.corpus_ray import has_room

    asked = {"CPU": 1, "memory": 1 << 30}
    small = {"Alive": True, "Resources": {"CPU": 4.0, "memory": 9e8}}
    head = {"Alive": True, "Resources": {"memory": 9e9}}
    gone = {"Alive": False, "Resources": {"CPU": 4.0, "memory": 9e9}}
    assert not has_room([small, head, gone], asked)
    assert has_room([small, gone | {"Alive": True}], asked)


def test_what_a_node_wrote_last_is_waited_for(tmp_path, monkeypatch):
    from tools import corpus_step

    step = prepared(tmp_path, 2)
    later = iter([record_path(tmp_path, 0), failed_path(tmp_path, 1)])
    monkeypatch.setattr(corpus_step.time, "sleep", lambda seconds: next(later).touch())
    step.wait_until_told()
    assert step.is_told()
    failed_path(tmp_path, 1).unlink()
    monkeypatch.setattr(corpus_step, "GRACE_SECONDS", 0.0)
    step.wait_until_told()
    assert not step.is_told()


def test_a_job_that_begins_anew_leaves_alone_what_it_has_done(tmp_path):
    step = prepared(tmp_path, 2, told)
    record_path(tmp_path, 0).write_text("done")
    for rank in (0, 1):
        list(step.run(None, rank))
    assert [path.name for path in tmp_path.glob("*.told")] == ["1.told"]
