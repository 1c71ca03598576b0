"""A model lent to a measurement comes back as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.engine.conftest import make_model, make_tokenizer
from transformers import GenerationConfig

from meristem.engine.borrow import borrowed
from meristem.engine.generate import generate
from meristem.engine.score import score_options


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seeded():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def half_frozen():
    """In training, but for one layer and a generation setting of its own."""
    model = make_model()
    model.generation_config = GenerationConfig(temperature=0.3, do_sample=True)
    model.train()
    model.model.layers[0].eval()
    return model


def look(engine):
    assert not any(module.training for module in engine.model.modules())
    generate(engine, [[5, 6, 7]], max_new_tokens=3, temperature=1.0)
    random.random(), np.random.rand(), torch.rand(2)  # as a task of somebody else might
    return score_options(engine, [[5, 6, 7]], [[[8], [9, 10]]])


@pytest.mark.parametrize("adapter", [False, True])
def test_modes_settings_hooks_and_random_states_are_those_from_before(adapter):
    model = half_frozen()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.train()
        model.base_model.model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    assert True in before and False in before
    seeded()
    expected = draws()
    seeded()
    head = model.get_output_embeddings()
    with borrowed(model, make_tokenizer()) as engine:
        look(engine)
        assert len(head._forward_pre_hooks) == 1
    assert draws() == expected
    assert [module.training for module in model.modules()] == before
    assert model.generation_config.temperature == 0.3 and not head._forward_pre_hooks


def test_the_model_comes_back_after_an_error_too():
    model = half_frozen()
    seeded()
    expected = draws()
    seeded()
    with pytest.raises(RuntimeError, match="torn"), borrowed(model, make_tokenizer()) as engine:
        look(engine)
        raise RuntimeError("torn")
    assert draws() == expected
    assert model.training and not model.model.layers[0].training
    assert model.generation_config.temperature == 0.3 and not model.lm_head._forward_pre_hooks


def test_gradients_flow_after_a_look():
    model = make_model().train()
    model.gradient_checkpointing_enable()
    with borrowed(model, make_tokenizer()) as engine:
        first = look(engine)
    ids = torch.tensor([[3, 4, 5, 6]])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with borrowed(model, make_tokenizer()) as engine:
        assert look(engine) == first
