"""MoE-CL's published preset as a method: what it learns, keeps, carries, resumes and serves."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.methods.adapters import assert_resumes
from tests.tiny import new_model, tiny_model
from tests.training.stream import rows, sft
from transformers import AutoModelForCausalLM

from meristem.engine.load import load
from meristem.errors import BadInput, Clash
from meristem.methods import build
from meristem.methods.architecture.experts import of
from meristem.methods.architecture.moe_cl import MoECL
from meristem.methods.architecture.moe_cl.published import PublishedMoECL
from meristem.methods.replay.experience_replay import ExperienceReplay

PARTS = ("gate_proj", "up_proj", "down_proj")


def published(**arguments):
    return MoECL(preset="published", depth=1, **arguments)


def adapted(base=new_model, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        lora = {"r": 2, "lora_alpha": 6, "target_modules": [*PARTS], "task_type": "CAUSAL_LM", **options}
        return get_peft_model(base(), LoraConfig(**lora))


def update(folder, task, state=None, method=None, model=None, **options):
    trainer = sft(
        folder, [*([method] if method else [published()])], rows(4, task), model=model or adapted(), task=task,
        method_state=state, **{"max_steps": 3, "learning_rate": 2e-2, **options},
    )  # fmt: skip
    trainer.train()
    return trainer


def test_interrupted_resumed_and_carried_it_ends_in_the_same_bits(tmp_path):
    (state,) = assert_resumes(lambda: [published()], tmp_path, targets=PARTS).values()
    assert [e["task"] for e in state["json"]["experts"]] == ["A", "B"]
    assert {"gates.model.layers.0.mlp", "discriminators.model.layers.1.mlp"} <= state["tensors"].keys()
