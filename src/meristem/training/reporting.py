"""What a run tells while it goes, and the curve that it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from meristem.training.interrupts import Interruption

Progress = Callable[[str, int, int, str], None]


class ProgressCallback(TrainerCallback):
    """Reports every step and, when an interruption was requested, asks for a checkpoint and a stop."""

    def __init__(self, progress: Progress | None, interruption: Interruption):
        self._progress, self._interruption = progress, interruption
        self.on_interrupt: Callable[[], None] = lambda: None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self._progress:
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            note = f"loss {losses[-1]:.3f}" if losses else ""
            self._progress("train", state.global_step, state.max_steps, note)
        if self._interruption.requested and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
            self.on_interrupt()
        elif state.global_step >= state.max_steps:
            self._interruption.requested = False  # nothing is left to interrupt
        return control

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
                point = {k: v for k, v in entry.items() if isinstance(v, int | float) and k in _CURVE}
                kept.append({key: round(float(value), 6) for key, value in point.items()})
        return kept


_CURVE = {"step", "loss", "grad_norm", "learning_rate", "penalty/ewc"}
