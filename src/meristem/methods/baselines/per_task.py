"""One adapter per task, the bound without forgetting and without transfer."""

from __future__ import annotations

from typing import Any

from meristem.errors import Clash
from meristem.methods.base import Context, Method, trainable


class PerTask(Method):
    """Trains a fresh adapter on each task's rows alone; nothing is continued.

    theta_t = argmin_theta L(rows of task t), started at the base model

    Nothing is forgotten, because every task has weights of its own, and nothing is handed on; whoever serves them
    has to know which task an input is of. Stages give it the fresh adapter (``fresh_adapter``). A trainer of
    one's own gets a model with a new LoRA; one that has learned something is refused.

    Claims: none. Stages: all. State: none; one adapter per task.
    """

    name = "per-task"
    alone = True
    fresh_adapter = True
    task_id = "inference"
    grows = "one adapter"

    def prepare_model(self, model: Any, ctx: Context) -> None:
        configs = getattr(model, "peft_config", {}).values()
        if any(getattr(config, "init_lora_weights", None) is not True for config in configs):
            return  # an initialization that does not leave B = 0: no telling what was learned
        if any(".lora_B." in name and bool(p.any()) for name, p in trainable(model).items()):
            raise Clash(
                "method per-task starts each task from a fresh adapter, and this one has learned something: "
                "pass the base model with a new LoRA"
            )
