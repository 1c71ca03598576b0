"""What methods are told of a batch before the model runs on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from meristem.methods.base import Method


def seen(methods: Sequence[Method], batch: Any, tasks: Sequence[str] = ()) -> ExitStack:
    """Inside, each method that asks for it (``Method.batch``) knows the labelled batch that the model runs on.

    ``tasks``: of its rows, where they are known.
    """
    stack = ExitStack()
    for method in methods if isinstance(batch, Mapping) else ():
        if method.overrides("batch"):
            stack.enter_context(method.batch({**batch, "tasks": list(tasks)}))
    return stack
