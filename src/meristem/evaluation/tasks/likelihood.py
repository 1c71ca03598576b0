"""Log-likelihoods of the options of a task's items: prompts rendered as served, fitted, scored. Imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meristem.engine.load import Engine
from meristem.engine.prompts import encode_options, fit
from meristem.engine.score import OptionScore, score_options
from meristem.evaluation.items import Item
from meristem.evaluation.suites import Task
from meristem.evaluation.tasks.base import Run, for_each

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
    """One entry per item of ``task``; an item whose options reach into its prompt's last token has several contexts."""
    encoded = for_each(task.items, lambda item: _encoded(engine, task, item))
    asked = [(at, group) for at, (groups, _) in enumerate(encoded) for group in groups]
    scored = score_options(
        engine,
        [group.context for _, group in asked],
        [group.options for _, group in asked],
        names=[f"item {task.items[at].id!r}" for at, _ in asked],
        journal=run.journal("options"),
        progress=run.progress,
    )
    scores: list[dict[int, OptionScore]] = [{} for _ in task.items]
    tokens = [0] * len(task.items)
    for (at, group), row in zip(asked, scored, strict=True):
        scores[at].update(zip(group.members, row, strict=True))
        # the last token of an option is predicted, never fed
        tokens[at] += len(group.context) + sum(len(option) - 1 for option in group.options)
    return [
        ItemScores([scores[at][k] for k in range(len(item.options))], tokens[at], encoded[at][1])
        for at, item in enumerate(task.items)
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
        [context], [continuation] = encode_options(engine, messages, [option], task.format)
        contexts.append(context)
        options.append([continuation])
    scored = score_options(engine, contexts, options, journal=run.journal("unconditional"))
    known = dict(zip(wanted, (row[0].logprob for row in scored), strict=True))
    return [
        [known[empty, option] for option in item.options]
        for empty, item in zip(asked, task.items, strict=True)
    ]


@dataclass(frozen=True)
class _Group:
    """Options that continue the same context; ``members`` are their places among the item's options."""

    context: Tokens
    options: list[Tokens]
    members: list[int]


def _encoded(engine: Engine, task: Task, item: Item) -> tuple[list[_Group], int]:
    """The groups of an item, and how many of its prompt's tokens were cut."""
    contexts, options = encode_options(engine, task.chat(item), item.options, task.format)
    room = engine.max_length and engine.max_length - max(map(len, options)) + 1
    fitted = [fit(context, room, task.truncation) for context in contexts]
    groups: dict[tuple[int, ...], _Group] = {}
    for k, (context, _) in enumerate(fitted):
        group = groups.setdefault(tuple(context), _Group(context, [], []))
        group.options.append(options[k])
        group.members.append(k)
    return list(groups.values()), max(cut for _, cut in fitted)
