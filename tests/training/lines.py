"""What tests of versions of experts share: two tasks released one on the other, contents, answers."""

from __future__ import annotations

from typing import Any

from meristem.ecosystem import versions
from meristem.engine.generate import generate
from meristem.engine.prompts import encode_prompt


def release(ws: Any, tasks: str, method: str) -> None:
    """An update and its release for each of ``tasks``, one on the other."""
    for task in tasks:
        decision = ws.propose(ws.update("support", data=[task], methods=[method]).version)
        assert decision.passed, decision
        ws.promote(decision)


def content(ws: Any, reference: str) -> Any:
    with ws.store.database.read() as connection:
        return versions.content_of(connection, ws.version(reference).content)


def said(engine: Any, questions: Any) -> list[str]:
    """Four tokens at most to each question."""
    asked = [encode_prompt(engine, question) for question in questions]
    return [answer.text for [answer] in generate(engine, asked, max_new_tokens=4)]
