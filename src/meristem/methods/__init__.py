"""Continual-learning methods for any Hugging Face trainer; importing this package loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from meristem.methods.base import Context, Method, MethodState, Step
from meristem.methods.registry import available, build, parse

if TYPE_CHECKING:
    from meristem.methods.architecture.mocl import MoCL
    from meristem.methods.architecture.o_lora import OLoRA
    from meristem.methods.architecture.param_isolation import ParamIsolation
    from meristem.methods.baselines.joint import Joint
    from meristem.methods.baselines.per_task import PerTask
    from meristem.methods.baselines.seq_finetune import SeqFinetune
    from meristem.methods.optimization.gpm import GPM
    from meristem.methods.optimization.lae import LAE
    from meristem.methods.regularization.ewc import EWC
    from meristem.methods.regularization.old_teacher_distill import OldTeacherDistill
    from meristem.methods.replay.experience_replay import ExperienceReplay
    from meristem.methods.replay.mer import MER

__all__ = [
    "EWC",
    "GPM",
    "LAE",
    "MER",
    "Context",
    "ExperienceReplay",
    "Joint",
    "Method",
    "MethodState",
    "MoCL",
    "OLoRA",
    "OldTeacherDistill",
    "ParamIsolation",
    "PerTask",
    "SeqFinetune",
    "Step",
    "available",
    "build",
    "parse",
]

_HOME = {
    "EWC": "meristem.methods.regularization.ewc",
    "ExperienceReplay": "meristem.methods.replay.experience_replay",
    "GPM": "meristem.methods.optimization.gpm",
    "Joint": "meristem.methods.baselines.joint",
    "LAE": "meristem.methods.optimization.lae",
    "MER": "meristem.methods.replay.mer",
    "MoCL": "meristem.methods.architecture.mocl",
    "OLoRA": "meristem.methods.architecture.o_lora",
    "OldTeacherDistill": "meristem.methods.regularization.old_teacher_distill",
    "ParamIsolation": "meristem.methods.architecture.param_isolation",
    "PerTask": "meristem.methods.baselines.per_task",
    "SeqFinetune": "meristem.methods.baselines.seq_finetune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'meristem.methods' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
