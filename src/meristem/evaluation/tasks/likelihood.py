"""Log-likelihoods of the options of a task's items: prompts rendered as served, fitted, scored. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meristem.engine.load import Engine
from meristem.engine.prompts import encode_options, fit, render
from meristem.engine.score import OptionScore, score_options
from meristem.evaluation.items import Item
from meristem.evaluation.suites import Task
from meristem.evaluation.tasks.base import Run, for_each
from meristem.evaluation.tasks.perplexity import first_condition

Tokens = list[int]


@dataclass(frozen=True)
class ItemScores:
    """``scores[k]`` of option k; ``tokens``: how many had to be encoded; ``cut``: how many the window had no room for."""

    scores: list[OptionScore]
    tokens: int
    cut: int

    def cost(self) -> dict[str, Any]:
        return {"tokens": self.tokens, **({"truncated": self.cut} if self.cut else {})}


def option_scores(engine: Engine, task: Task, run: Run) -> list[ItemScores]:
    """One entry per item of ``task``."""
    encoded = for_each(task.items, lambda item: _encoded(engine, task, item))
    scored = score_options(
        engine,
        [context for context, _, _ in encoded],
        [options for _, options, _ in encoded],
        names=[f"item {item.id!r}" for item in task.items],
        journal=run.journal("options"),
        progress=run.progress,
    )
    return [
        # the last token of an option is predicted, never fed
        ItemScores(scores, len(context) + sum(len(option) - 1 for option in options), cut)
        for scores, (context, options, cut) in zip(scored, encoded, strict=True)
    ]


def unconditional_scores(engine: Engine, task: Task, run: Run) -> list[list[float]]:
    """log p of every option after the same conversation with empty user messages; each different one scored once."""
    asked = [
        tuple((m["role"], "" if m["role"] == "user" else m["content"]) for m in task.chat(item))
        for item in task.items
    ]
    wanted = {
        (empty, option): None
        for empty, item in zip(asked, task.items, strict=True)
        for option in item.options
    }
    contexts, options = [], []
    for empty, option in wanted:
        messages = [{"role": role, "content": content} for role, content in empty]
        context, continuation = _encoded_alone(engine, messages, option, task)
        contexts.append(context)
        options.append([continuation])
    scored = score_options(engine, contexts, options, journal=run.journal("unconditional"))
    known = dict(zip(wanted, (row[0].logprob for row in scored), strict=True))
    return [
        [known[empty, option] for option in item.options]
        for empty, item in zip(asked, task.items, strict=True)
    ]


def _encoded_alone(
    engine: Engine, messages: list[dict[str, str]], option: str, task: Task
) -> tuple[Tokens, Tokens]:
    """As ``encode_options``; text without a word and a tokenizer that begins with no token: after its first condition."""
    prompt = render(engine, messages, task.format)
    if prompt.strip() or engine.tokenizer("")["input_ids"]:
        context, [continuation] = encode_options(engine, messages, [option], task.format)
        return context, continuation
    return [first_condition(engine)], engine.tokenizer(f" {option}", add_special_tokens=False, verbose=False)[
        "input_ids"
    ]


def _encoded(engine: Engine, task: Task, item: Item) -> tuple[Tokens, list[Tokens], int]:
    """Context, options, and how many of the context's tokens were cut."""
    context, options = encode_options(engine, task.chat(item), item.options, task.format)
    room = engine.max_length and engine.max_length - max(map(len, options)) + 1
    context, cut = fit(context, room, task.truncation)
    return context, options, cut
