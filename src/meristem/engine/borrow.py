"""A model in the middle of its training, lent to a measurement and given back as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from meristem.engine.attention import base_model
from meristem.engine.identity import EngineSettings
from meristem.engine.load import Engine, wrapped


@contextmanager
def borrowed(model: Any, tokenizer: Any, batch_tokens: int = EngineSettings.batch_tokens) -> Iterator[Engine]:
    """An engine around a model that is being trained, on the device and in the precision that it trains in.

    After the block every module is in its old mode (frozen parts may stay in eval mode while others train), the
    generation settings and hooks are the old ones, and the random states of Python, NumPy and torch (CPU, and the
    model's device) stand where they stood: training goes on to the same bits.
    """
    parameter = next(model.parameters())
    settings = EngineSettings(
        dtype=str(parameter.dtype).removeprefix("torch."),
        device=str(parameter.device),
        batch_tokens=batch_tokens,
    )
    inner = base_model(model)
    modes = [(module, module.training) for module in model.modules()]
    generation = inner.generation_config
    with _random_states_kept(parameter.device):
        engine, hook = wrapped(model, tokenizer, settings)
        try:
            yield engine
        finally:
            hook.remove()
            inner.generation_config = generation
            for module, training in modes:
                module.training = training


@contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device.index or 0]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=devices, device_type=kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
