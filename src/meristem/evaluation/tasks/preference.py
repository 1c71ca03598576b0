"""Task type ``preference``: is the chosen answer more likely than the rejected one?

With s(y) = log p(y | prompt), summed over tokens, and len(y) the characters of y:

- ``plain``: margin = s(chosen) - s(rejected);
- ``length``: margin = s(chosen) / len(chosen) - s(rejected) / len(rejected).

``accuracy`` scores 1 where the margin is positive, ``margin`` is the margin itself, in nats. An answer ends with the
chat template's end of turn (as plain text with the end-of-sequence token), and the prompt ends where the tokens of the
two conversations leave it: the sequences that DPO trains on (TRL's ``DPOTrainer``), so that stopping counts as well.
"""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item, text_of
from meristem.evaluation.results import ItemResult
from meristem.evaluation.tasks.base import Run, TaskType, Unit, for_each, result

if TYPE_CHECKING:
    from meristem.engine.load import Engine
    from meristem.evaluation.suites import Task

Tokens = list[int]


class Preference(TaskType):
    """``scoring``: what the two answers are compared by (see above)."""

    KEYS: ClassVar[frozenset[str]] = frozenset({"chosen", "rejected"})
    metric: Literal["accuracy", "margin"] = "accuracy"
    scoring: Literal["plain", "length"] = "plain"

    @property
    def unit(self) -> Unit:
        return "nats" if self.metric == "margin" else "share"

    def parts(self, raw: dict[str, Any]) -> dict[str, Any]:
        chosen, rejected = (text_of(raw.get(key), f'"{key}"') for key in ("chosen", "rejected"))
        return {"answer": chosen, "options": (chosen, rejected)}

    def check(self, item: Item) -> None:
        if len(item.options) != 2 or item.options[0] != item.answer:
            raise Refused('a preference item needs "chosen" and "rejected"')
        if item.options[0] == item.options[1]:
            raise Refused('"chosen" and "rejected" are equal; remove the item or mend one')

    def run(self, engine: Engine, task: Task, run: Run) -> list[ItemResult]:
        from meristem.engine.score import score_options

        encoded = for_each(task.items, lambda item: _encoded(engine, task, item))
        scored = score_options(
            engine,
            [context for context, _, _ in encoded],
            [replies for _, replies, _ in encoded],
            names=[f"item {item.id!r}" for item in task.items],
            journal=run.journal("options"),
            progress=run.progress,
        )
        rows = []
        for item, (context, replies, cut), scores in zip(task.items, encoded, scored, strict=True):
            logprobs = {name: score.logprob for name, score in zip(item.options, scores, strict=True)}
            margin = self._margin(item, [score.logprob for score in scores])
            # the last token of an answer is predicted, never fed
            tokens = len(context) + sum(len(reply) - 1 for reply in replies)
            detail: dict[str, Any] = {"logprobs": {name: _six(value) for name, value in logprobs.items()}}
            detail |= {"margin": _six(margin), "tokens": tokens, **({"truncated": cut} if cut else {})}
            score = margin if self.metric == "margin" else float(margin > 0)
            rows.append(result(task, item, item.options[margin <= 0], score, detail))
        return rows

    def _margin(self, item: Item, logprobs: list[float]) -> float:
        if self.scoring == "length":
            logprobs = [value / len(option) for value, option in zip(logprobs, item.options, strict=True)]
        return logprobs[0] - logprobs[1]


def _six(value: float) -> float:
    return float(f"{value:.6g}")


def _encoded(engine: Engine, task: Task, item: Item) -> tuple[Tokens, list[Tokens], int]:
    """The prompt's tokens, fitted; those of chosen and rejected; how many the window had no room for."""
    from meristem.engine.prompts import fit

    context, replies = reply_tokens(engine, task, item)
    room = engine.max_length and engine.max_length - max(map(len, replies))
    fitted, cut = fit(context, room, task.truncation)
    return fitted, replies, cut


def reply_tokens(engine: Engine, task: Task, item: Item) -> tuple[Tokens, list[Tokens]]:
    """The prompt and, behind it, each option as a whole turn. ``BadInput`` for one without tokens of its own."""
    from meristem.engine.prompts import encode_prompt, render

    messages = task.chat(item)
    chat = task.format == "chat" and engine.tokenizer.chat_template is not None
    if chat:
        turns = [
            _conversation(engine, [*messages, {"role": "assistant", "content": option}])
            for option in item.options
        ]
    else:
        prompt = render(engine, messages, task.format)
        end = engine.tokenizer.eos_token or ""
        space = "" if prompt[-1:].isspace() else " "
        turns = [f"{prompt}{space}{option}{end}" for option in item.options]
    prompt_ids = encode_prompt(engine, messages, task.format)
    wholes = [
        [
            int(token)
            for token in engine.tokenizer(turn, add_special_tokens=not chat, verbose=False)["input_ids"]
        ]
        for turn in turns
    ]
    start = min(_common(prompt_ids, whole) for whole in wholes)
    if not start or any(len(whole) == start for whole in wholes):
        raise BadInput("an answer has no tokens after its prompt")
    return prompt_ids[:start], [whole[start:] for whole in wholes]


def _conversation(engine: Engine, messages: list[dict[str, str]]) -> str:
    try:
        return str(engine.tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program: it may raise anything
        raise BadInput(f"the chat template refuses these messages: {error}") from error


def _common(one: Tokens, other: Tokens) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
