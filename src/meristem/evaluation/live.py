"""Watch for forgetting while any Hugging Face or TRL trainer trains. Imports torch and transformers.

::

    watch = ForgettingCallback("core.suite.yaml", patience=2)
    trainer = SFTTrainer(model, args=args, train_dataset=rows, callbacks=[watch])
    trainer.train()
    watch.flips          # items of the probe that were right at the start and are wrong now
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from meristem.engine.borrow import borrowed
from meristem.engine.identity import EngineSettings
from meristem.errors import BadInput, TrainingFailed
from meristem.evaluation import probes
from meristem.evaluation.comparison import Comparison, compare
from meristem.evaluation.exports.scales import scale
from meristem.evaluation.looks import Looks, loss_p
from meristem.evaluation.results import ItemResult
from meristem.evaluation.run import evaluate
from meristem.evaluation.significance import fewest
from meristem.evaluation.suites import Suite

__all__ = ["ForgettingCallback"]

SCHEMA = "meristem/forgetting/v1"
BAR_AFTER = 2.0  # seconds

logger = logging.getLogger("meristem.forgetting")


class ForgettingCallback(TrainerCallback):
    """Measures a probe suite before the first step and then at every look, compares item by item, and stops a run
    that forgets.

    ``probe``: a suite, or the path of a suite file; tasks with a judge or from a harness are refused. The run stops
    when ``patience`` looks in a row show a significant loss of more than ``margin`` (in the unit of the scores: 0.02
    is two points); ``patience=None`` only watches. ``alpha`` bounds the chance that a run that loses no more than
    ``margin`` is stopped by any of its looks (``looks.Looks``). ``every``: steps between looks, or as in
    ``logging_steps`` a share of all steps; by default there are ten looks however long the run is, which bounds the
    cost and the correction alike (intervals for saving and evaluating may be off, or as many as there are steps).
    The last step is always looked at. ``batch_tokens``: rows x width of one forward.

    Logged by the trainer's own ``log``, so that it stands in ``state.log_history`` and wherever ``report_to`` says:
    ``NAME/score``, ``NAME/difference`` (to the start), ``NAME/negative_flips`` and ``NAME/positive_flips`` (items
    right -> wrong and back; not for scores with a unit), ``NAME/p_value`` (one-sided, times the number of chances
    that looking so often gives: significant below ``alpha``), ``NAME/streak`` (significant looks in a row), and
    ``NAME/score/TASK`` where the suite has several tasks. Watches beside each other need different names.

    Training goes on to the same bits as without the callback, as long as it does not stop. The baseline travels in
    the trainer's state, so a resumed run is held against the same one. Under DDP every rank measures (a rank that
    waited would run into the time limit of its collectives) and rank 0's results count. ``BadInput`` before the first
    step for what cannot work: no text model or tokenizer, sharded weights, a probe on which no loss could ever be
    significant, a resumed run that was not watched from its start. ``TrainingFailed`` when the model can no longer
    be measured.

    After each look: ``comparison``, ``flips`` (``task/id`` of the negative ones), ``streak``; ``reason`` says in one
    line why the run was stopped, ``None`` while it was not. ``baseline``: the results before the first step.

    That is after ``continual``'s methods prepared the model: with per-task experts the new one, still empty, routes
    already, and with LAE the model holds its online weights from the first look to the last, not what a version serves.
    """

    def __init__(
        self,
        probe: Suite | str | Path,
        patience: int | None = 2,
        *,
        every: int | float = 0.1,
        margin: float = 0.0,
        alpha: float = 0.05,
        name: str = "forgetting",
        batch_tokens: int = EngineSettings.batch_tokens,
    ) -> None:
        probes.check_settings(patience, every, alpha, name, batch_tokens)
        self.probe = probes.readable(probe)
        probes.check_margin(margin, self.probe)
        self.patience, self.every, self.margin, self.alpha = patience, every, margin, alpha
        self.name, self.batch_tokens = name, batch_tokens
        self.baseline: list[ItemResult] = []
        self.comparison: Comparison | None = None
        self.streak = 0
        self.reason: str | None = None
        self.looks: Looks | None = None
        self._trainer: Any = None
        self._looked_at = 0

    @property
    def flips(self) -> tuple[str, ...]:
        """Items that were right at the start and were wrong at the latest look, as ``task/id``."""
        return self.comparison.flipped if self.comparison else ()

    # ---- events --------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer = _trainer_of(self)
        probes.check_trainer(self._trainer)
        self._check_name()
        self.looks = Looks.over(state.max_steps, self.every, self.patience, self.alpha)
        self.comparison, self.streak, self.reason = None, 0, None
        self._looked_at = state.global_step
        if state.global_step > 0:
            self._resume(state)
            return
        self.baseline = self._measured(state)
        self._check_sensitivity()
        self._remember(state)
        self._log(compare(old=self.baseline, new=self.baseline), 1.0, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.looks is not None
        if not self.looks.due(state.global_step):
            return
        comparison = self._look(state)
        p_value = loss_p(comparison, self.margin)
        self.streak = self.looks.streak(self.streak, p_value)
        self._log(comparison, p_value, control)
        self._remember(state)
        if self.looks.enough(self.streak):
            self._stop(comparison, p_value, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that something else stops is looked at once more, for the log only: that look was not planned.

        Not in ``on_train_end``, where those who report have closed their files.
        """
        if control.should_training_stop and self._looked_at < state.global_step:
            comparison = self._look(state)
            self._log(comparison, loss_p(comparison, self.margin), control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer = None

    # ---- a look --------------------------------------------------------------------------------------------

    def _look(self, state: TrainerState) -> Comparison:
        try:
            results = self._measured(state)
        except BadInput as error:  # the baseline went through, so it is the weights
            raise TrainingFailed(
                f"{self.name}: the model cannot be measured at step {state.global_step}: {error}"
            ) from error
        self.comparison = compare(old=self.baseline, new=results)
        self._looked_at = state.global_step
        return self.comparison

    def _measured(self, state: TrainerState) -> list[ItemResult]:
        """Results of the probe on the model as it is; the same on every rank."""
        trainer = self._trainer
        quiet = trainer.args.disable_tqdm or not state.is_world_process_zero
        model = trainer.accelerator.unwrap_model(trainer.model)
        with (
            tqdm(total=self.probe.size, desc=self.name, delay=BAR_AFTER, leave=False, disable=quiet) as bar,
            borrowed(model, probes.tokenizer_of(trainer), self.batch_tokens) as engine,
        ):
            results = evaluate(engine, self.probe, lambda done, _: bar.update(done - bar.n), prepared=True)
        if trainer.accelerator.num_processes > 1:
            # ranks may round differently, and all of them must stop at the same step
            [results] = broadcast_object_list([results], from_process=0)
        return results

    def _log(self, comparison: Comparison, p_value: float, control: TrainerControl) -> None:
        assert self.looks is not None
        values = {
            "score": comparison.new_score,
            "difference": comparison.difference,
            "p_value": self.looks.adjusted(p_value),
            "streak": self.streak,
        }
        if comparison.unit is None:
            values |= {
                "negative_flips": len(comparison.flipped),
                "positive_flips": len(comparison.gained),
            }
        if len(comparison.tasks) > 1:
            values |= {f"score/{task.name}": task.new_score for task in comparison.tasks}
        logs = {f"{self.name}/{key}": float(value) for key, value in values.items()}
        wanted = control.should_log
        # Trainer's, not a subclass's: TRL's hand the averages that they have gathered for the next line of losses
        # to whatever is logged first, and forget them.
        Trainer.log(self._trainer, logs)
        control.should_log = wanted  # logging takes it back, and the losses of this step may still be due

    def _stop(
        self, comparison: Comparison, p_value: float, state: TrainerState, control: TrainerControl
    ) -> None:
        assert self.looks is not None
        control.should_training_stop = True
        shown = scale(comparison.unit).plain
        lost = f"a loss of more than {self.margin:g}" if self.margin else "the loss"
        flips = ""
        if comparison.unit is None:
            flips = f", {len(comparison.flipped)} right -> wrong and {len(comparison.gained)} wrong -> right"
        self.reason = (
            f"{self.name} at step {state.global_step} of {state.max_steps}, training stops: "
            f"{shown(comparison.old_score)} -> {shown(comparison.new_score)} on {comparison.n} items of "
            f"{self.probe.name!r}{flips}; {lost} was significant at {self.streak} "
            f"{'look' if self.streak == 1 else 'looks in a row'} "
            f"(p {self.looks.adjusted(p_value):.2g} < {self.alpha:g}, corrected for {self.looks.count} looks)"
        )
        if state.is_world_process_zero:
            logger.warning(self.reason)

    # ---- what a resumed run needs --------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return f"meristem/{self.name}"

    def _remember(self, state: TrainerState) -> None:
        """Into the trainer's state, which stands in every checkpoint.

        Under a key of its own: what an ``ExportableState`` leaves there comes back only with
        ``restore_callback_states_from_checkpoint``, and then as another object than the caller's.
        """
        kept = [{**row, "prediction": "", "detail": {}} for row in self.baseline]
        state.stateful_callbacks[self._key] = {
            "schema": SCHEMA,
            "suite": self.probe.digest,
            "baseline": kept,
            "streak": self.streak,
        }

    def _resume(self, state: TrainerState) -> None:
        record = state.stateful_callbacks.get(self._key)
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise BadInput(
                f"{self.name}: the run up to step {state.global_step} was not watched, so how the model answered "
                "before it is not known; train from the start, or resume without this callback"
            )
        if record["suite"] != self.probe.digest:
            raise BadInput(
                f"{self.name}: the run up to step {state.global_step} was watched with another probe than "
                f"{self.probe.name!r}; resume with the same suite"
            )
        self.baseline, self.streak = record["baseline"], record["streak"]

    # ---- refusals that need the run ------------------------------------------------------------------------

    def _check_name(self) -> None:
        watches = [c for c in self._trainer.callback_handler.callbacks if isinstance(c, ForgettingCallback)]
        if sum(watch.name == self.name for watch in watches) > 1:
            raise BadInput(f"two watches are named {self.name!r}; give each a name= of its own")

    def _check_sensitivity(self) -> None:
        """Whether there is enough in the baseline that could be lost."""
        assert self.looks is not None
        needed, right = fewest(self.looks.level), probes.can_fall(self.baseline)
        if self.patience is not None and right < needed:
            raise BadInput(
                f"{self.name}: the model has {right} of {len(self.baseline)} items of {self.probe.name!r} right "
                f"before training, and losing fewer than {needed} is never significant over {self.looks.count} "
                "looks; use a probe that it can answer, more items, or patience=None to only watch"
            )


def _trainer_of(callback: TrainerCallback) -> Any:
    """The trainer that is calling: transformers hands its callbacks all but that, and only it can log."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and callback in found.callback_handler.callbacks:
            return found
        frame = frame.f_back
    raise BadInput("ForgettingCallback is called by no Trainer; give it to one as callbacks=[...]")
