"""A tiny engine with room for a short chat, and tasks made from items as a data file holds them."""

from __future__ import annotations

import pytest
from tests.engine.conftest import make_model, make_tokenizer

from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap
from meristem.evaluation.items import Rules, make_item
from meristem.evaluation.run import evaluate
from meristem.evaluation.suites import Suite, Task
from meristem.evaluation.tasks.base import type_named


@pytest.fixture(scope="session")
def engine():
    return wrap(make_model(), make_tokenizer(), EngineSettings(dtype="float32", batch_tokens=256))


def task_of(kind, rows, task=None, **settings):
    """A task of type ``kind``; ``task`` holds format, truncation and shots."""
    made = type_named(kind).model_validate(settings)
    items = tuple(make_item(row, Rules(made), f"i{at}") for at, row in enumerate(rows))
    return Task("t", kind, made, "target", items, **(task or {}))


def results_of(engine, kind, rows, task=None, **settings):
    return evaluate(engine, Suite("s", (task_of(kind, rows, task, **settings),)))
