"""One run put together: plan → model, engine, batches, callbacks → FINISHED.

Pretraining and finetuning differ in their `Stage` alone: where batches come from, what is scored,
and where the weights start.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from pipeline.config import RunConfig
from pipeline.config_checks import cut
from pipeline.config_file import program_help
from pipeline.guards.attempt import Guards, guarded
from pipeline.options import Fault, UserError
from pipeline.plan import (
    Plan,
    Stage,
    check_run,
    identity,
    redrawn,
    refuse_other_identity,
)
from pipeline.preflight import Preflight
from pipeline.run_folder import RunFolder


def run_stage(stage: Stage) -> None:
    """The whole of an entry point: read the command line, train, mark the run FINISHED."""
    argv = sys.argv[1:]
    if any(word in ("--help", "-h") for word in argv):
        print(program_help(stage.program, stage.purpose))
        return
    main_rank = os.environ.get("RANK", "0") == "0"
    # Torch's sockets warn, with a page of addresses, of what is told in one line here: a host whose
    # name is not known, a rank that is gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

    def locked_plan() -> Plan:
        plan = check_run(stage, argv)
        if main_rank and not plan.folder.is_finished:
            plan.folder.lock()
            plan.folder.forget_stop()  # that meant an earlier attempt
        return plan

    preflight = Preflight(locked_plan)
    plan = preflight.plan
    try:
        if not plan.folder.is_finished:
            with guarded(plan.config, plan.folder) as guards:
                _train(stage, preflight, guards)
        elif main_rank:
            print(f"{plan.config.name}: finished before; nothing to do", flush=True)
    finally:
        preflight.leave()


def make_engine(config: RunConfig, vocab_size: int, ds_settings: dict[str, Any]) -> Any:
    """The DeepSpeed engine of a run, its weights drawn from the run's seed."""
    import torch

    from pipeline.engine import build_engine
    from pipeline.optim.build import bind_optimizer, build_optimizer
    from pipeline.run_start import RunStart

    torch.manual_seed(config.seed)
    engine = build_engine(
        RunStart(config, vocab_size, ds_settings).make_model,
        lambda model: build_optimizer(model, config),
        config,
        ds_settings,
    )
    bind_optimizer(engine)
    if config.compile:
        engine.compile(compile_kwargs=compile_settings(config))
    return engine


def compile_settings(config: RunConfig) -> dict[str, Any]:
    """How a run's model is compiled.

    Where every batch has one shape, that alone: a size that may vary would make slower code, or
    none. Where shapes differ from batch to batch (instructions, samples cut at random, ENTP's
    chunks) torch decides: code for each would be compiled until it gives up.
    """
    varies = (
        config.flan is not None
        or config.resolved_objective in ("random_prefix", "denoise")
        or config.arch == "entp"
    )
    return {} if varies else {"dynamic": False}


def _train(stage: Stage, preflight: Preflight, guards: Guards) -> None:
    plan = preflight.plan
    config, folder = plan.config, plan.folder
    # torch and deepspeed take seconds to import: only now, when nothing is left to be refused.
    from pipeline import checkpoint, distributed
    from pipeline.callbacks.evaluation import Evaluation
    from pipeline.callbacks.progress import Progress
    from pipeline.callbacks.records import Ledger, Metrics
    from pipeline.callbacks.saving import Saving
    from pipeline.data.tokenizer import load as load_tokenizer
    from pipeline.guards.rank_check import RankCheck
    from pipeline.prefetch import Prefetched
    from pipeline.run_start import RunStart
    from pipeline.run_state import RunState
    from pipeline.trainer import Trainer

    guards.network = preflight.join()
    world = distributed.start(timeout_seconds=config.collective_timeout, threads=config.threads)
    preflight.check_links(world)
    guards.meet()
    tokenizer = load_tokenizer(config.data_folder / "tokenizer.model")
    source, evalsets = stage.prepare(config, plan.model, tokenizer, world)
    if config.prefetch:
        source = Prefetched(source, config.steps, pinned=world.device.type == "cuda")
    guards.heart.begin("start")
    engine = make_engine(config, plan.model.vocab_size, plan.ds_settings)
    guards.heart.begin("start")
    if world.is_main:
        folder.cut_torn_lines()
    found = checkpoint.newest_good(folder.checkpoints, world, restart=config.restart)
    completed = distributed.same_everywhere(
        folder.completed_checkpoints() if world.is_main else None
    )
    before = distributed.same_everywhere(folder.last_attempt() if world.is_main else None)
    parent = None
    if found is not None:
        state = checkpoint.read_state(found)
        refuse_other_identity(state["identity"], plan.document, f"checkpoint {found}")
        checkpoint.load(engine, found, world)
    elif completed and not config.restart:
        # What seemed to be there was not whole.
        raise UserError(
            f"checkpoints={str(folder.checkpoints)!r}: the run completed one at step "
            f"{max(completed)} and none is whole; restore it, or give --restart=true to start over"
        )
    elif config.init_from is not None:
        inherited = RunFolder(config.init_from).checkpoints
        parent = checkpoint.newest_good(inherited, world, tidy=False)
        if parent is None:
            raise UserError(f"init_from={config.init_from!r}: holds no checkpoint; train it first")
    start = RunStart(config, plan.model.vocab_size, plan.ds_settings, parent)
    if found is None:
        state = start.inherit(engine, world)
    evaluated = distributed.same_everywhere(
        folder.evaluations(up_to=state["step"]) if world.is_main else None
    )
    if world.is_main:
        folder.write_config(plan.document)
        how = "starts"
        if found is not None:
            how = f"goes on from step {state['step']}"
            if max(completed, default=0) > state["step"]:
                how += f" (the checkpoint of step {max(completed)} is gone)"
        elif config.restart and (before or completed):
            folder.append("checkpoints.jsonl", {"event": "restarted", "attempt": before + 1})
            how = "starts over, as asked"
            if completed:
                how += f": its checkpoint of step {max(completed)} is gone"
        elif before:
            # What a kill has left of a first save is removed next, and tells no later start of it.
            folder.append("checkpoints.jsonl", {"event": "started_over", "attempt": before + 1})
            how = "was stopped before its first checkpoint and starts over"
        print(
            f"{config.name}: {how}; {config.arch} {config.size}, "
            f"{plan.document['parameters']['total']:,} parameters, {config.steps} steps, "
            f"{world.size} rank(s), ZeRO-{engine.zero_optimization_stage()}",
            flush=True,
        )
        now = cut(config, world.size)
        for warning in (plan.fitted, redrawn(plan.model, state.get("cut", now), now)):
            if warning:
                print(f"{config.name}: {warning}", flush=True)
    # By the ledger too: a kill may have come between a rollback and the next checkpoint.
    left_out = folder.discarded_batches(config.global_batch) if world.is_main else None
    at = RunState.of(config, state)
    at.positions = at.positions.without(distributed.same_everywhere(left_out))
    trainer = Trainer(
        config,
        world,
        engine,
        source,
        folder,
        # The evaluation comes last: what it scores is saved.
        [
            Metrics(),
            Ledger(),
            Progress(),
            RankCheck(),
            Saving(identity(plan.document), evalsets[0].name),
            Evaluation(evalsets, evaluated, at_start=stage.scores_start),
        ],
        state=at,
        attempt=before + 1,
        heart=guards.heart,
        start=start if found is None else None,
    )
    guards.on_orphaned(trainer.leave_as_orphan)
    guards.on_asked(trainer.ask_stop)
    with contextlib.closing(source) if config.prefetch else contextlib.nullcontext():
        finished = trainer.run()
    if problem := distributed.same_everywhere(folder.write_held() if world.is_main else ""):
        raise UserError(problem)
    wished = finished or trainer.was_wished()
    if world.is_main:
        if finished:
            folder.finish(trainer.step, trainer.end)
        else:
            why = "" if wished else ", as a launcher is gone"
            print(
                f"{config.name}: stopped after step {trainer.step}{why}; the same command goes on"
            )
    distributed.stop()
    if not finished:
        sys.exit(STOPPED if wished else Fault.exit_code)


# The exit code of a run that was asked to stop and saved its state: the shell's for SIGINT.
STOPPED = 130
