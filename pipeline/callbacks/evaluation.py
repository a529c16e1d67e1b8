"""Held-out evaluations during the run, and the one that ends it."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from pipeline.callbacks.base import Callback, StepRecord
from pipeline.evaluation.perplexity import EvalSet, evaluate

if TYPE_CHECKING:
    from pipeline.trainer import Trainer


class Evaluation(Callback):
    """Scores every evaluation set each `eval_every` steps and at the end."""

    phase = "evaluate"

    def __init__(
        self,
        sets: Sequence[EvalSet],
        evaluated: Set[tuple[int, str]],
        *,
        at_start: bool = False,
    ) -> None:
        """`evaluated`: (step, set) scored before; `at_start`: whether first weights are scored."""
        self._sets = sets
        self._evaluated = evaluated
        self._at_start = at_start

    def on_start(self, trainer: Trainer) -> None:
        """Score where the run goes on from, when a stop came between saving and scoring it."""
        if self._due(trainer):
            self._evaluate(trainer, final=False)

    def on_step(self, trainer: Trainer, record: StepRecord) -> None:
        """Score at every `eval_every`-th step but the last, which `on_end` scores."""
        if self._due(trainer):
            self._evaluate(trainer, final=False)

    def on_rolled_back(self, trainer: Trainer) -> None:
        """What is trained again is scored again."""
        self._evaluated = {(step, name) for step, name in self._evaluated if step <= trainer.step}

    def _due(self, trainer: Trainer) -> bool:
        if trainer.step == 0:
            return self._at_start
        every = trainer.config.eval_every
        return bool(every) and trainer.step % every == 0 and trainer.step < trainer.config.steps

    def on_end(self, trainer: Trainer) -> None:
        """Score the finished model."""
        self._evaluate(trainer, final=True)

    def _evaluate(self, trainer: Trainer, *, final: bool) -> None:
        for evalset in self._sets:
            if not final and (trainer.step, evalset.name) in self._evaluated:
                continue
            result = evaluate(
                trainer.engine.module, evalset, trainer.world, trainer.ranks_agree_to_stop
            )
            trainer.notify("on_evaluation", result, final)
            trainer.say(
                f"step {trainer.step}: {result.eval_set} loss {result.loss:.4f} nats, "
                f"{result.bits_per_byte:.4f} bits per byte "
                f"(unigram entropy {result.unigram_entropy:.4f} nats)"
            )
