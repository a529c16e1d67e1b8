"""Runs a function on several ranks, each forked from one process that has imported everything.

Importing torch and DeepSpeed and what `deepspeed.initialize` imports takes many seconds per rank;
the standard library's fork server pays them once. It has made no tensor and started no thread pool,
so its children are clean.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from pipeline.network import free_port

PRELOAD = ["tests.distributed.preload"]


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """`function(*args)` on every rank; what each rank returned.

    `function` must be importable (defined at the top of a test module). The ranks' environment is
    the launcher's. Raises AssertionError with the first rank's traceback, or TimeoutError.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    ranks, pipes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main, args=(function, args, rank, world_size, port, sender), daemon=True
        )
        process.start()
        sender.close()
        ranks.append(process)
        pipes.append(receiver)
    try:
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} did not answer in time")
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                ok, value = False, "ended without an answer"
            assert ok, f"rank {rank}:\n{value}"
            results[rank] = value
    return results


def _rank_main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    try:
        value = function(*args)
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise
    sender.send((True, value))
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
