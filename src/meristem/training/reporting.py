"""What a run tells while it goes, and the curve that it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from meristem.errors import TrainingFailed
from meristem.training._upstream import continue_token_count
from meristem.training.interrupts import Interruption

Progress = Callable[[str, int, int, str], None]


class ProgressCallback(TrainerCallback):
    """Reports every step and, when an interruption was requested, asks for a checkpoint and a stop.

    ``saved`` is called after every checkpoint.
    """

    def __init__(self, progress: Progress | None, interruption: Interruption, saved: Callable[[], None]):
        self._progress, self._interruption, self._saved = progress, interruption, saved
        self._trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """The trainer whose ``interrupted`` is set on an interruption and whose samples are named on trouble."""
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        continue_token_count(self._trainer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._progress:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            note = f"loss {losses[-1]:.3f}" if losses else ""
            self._progress("train", state.global_step, state.max_steps, note)
        if self._interruption.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            self._trainer.interrupted = True
        elif state.global_step >= state.max_steps:
            self._interruption.requested = False  # nothing is left to interrupt
        if control.should_save or state.global_step >= state.max_steps:
            self._refuse_lost_weights(state.global_step)
        return control

    def _refuse_lost_weights(self, step: int) -> None:
        """A finite loss can still take a step to NaN: such weights must not become a checkpoint or a version."""
        for name, parameter in self._trainer.parameters().items():
            if not bool(parameter.isfinite().all()):
                ids = ", ".join(self._trainer.sample_ids[:8])
                raise TrainingFailed(
                    f"weights {name} became NaN or infinite in step {step} (samples: {ids}); the last complete "
                    "checkpoint is kept: mend the samples or lower the learning rate"
                )

    @staticmethod
    def tokens(trainer: Any) -> float:
        """Tokens trained on, as TRL counts them (prompt and completion, padding excluded)."""
        return max((entry.get("num_tokens", 0.0) for entry in trainer.state.log_history), default=0.0)

    @staticmethod
    def curve(trainer: Any) -> list[dict[str, float]]:
        """One point per logged step: ``step``, ``loss`` and what methods logged (``ewc``...)."""
        kept = []
        for entry in trainer.state.log_history:
            if "loss" in entry:
                point = {k: v for k, v in entry.items() if k in _CURVE or k.endswith(("/penalty", "/loss"))}
                kept.append({key: round(float(value), 6) for key, value in point.items()})
        return kept


_CURVE = {"step", "loss", "grad_norm", "learning_rate"}


def method_progress(progress: Progress | None) -> Callable[[str, int], Callable[[int], None]] | None:
    """The seam's ``(label, total) -> advance(n)`` on top of ``progress``, for Fisher estimates and the like."""
    if progress is None:
        return None

    def announce(label: str, total: int) -> Callable[[int], None]:
        done = 0

        def advance(number: int) -> None:
            nonlocal done
            done += number
            progress(label, done, total, "")

        return advance

    return announce
