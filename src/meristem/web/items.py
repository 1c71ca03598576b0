"""Test items as people read them: the question, what was expected, what a version answered and how surely."""

from __future__ import annotations

from dataclasses import dataclass

from meristem.evaluation.items import Item
from meristem.evaluation.results import ItemResult
from meristem.evaluation.suites import Suite
from meristem.web import wording

SHORT = 220  # characters of a question that stand open; the rest is folded away
LONG = 6000
ANSWER = 300


@dataclass(frozen=True)
class Question:
    """``opening``: the start of ``whole``, which is empty when the opening is all there is."""

    opening: str
    whole: str
    context: str


def questions(suite: Suite) -> dict[str, Question]:
    """``task/id`` -> what the model was asked (without a task's few-shot examples)."""
    return {f"{task.name}/{item.id}": _question(item) for task in suite.tasks for item in task.items}


def _question(item: Item) -> Question:
    *before, last = [(message.role, message.content) for message in item.messages] or [
        ("text", item.text or "")
    ]
    text, context = last[1], "\n".join(f"{role}: {content}" for role, content in before)
    if len(text) <= SHORT:
        return Question(text, "", wording.clipped(context, LONG))
    return Question(wording.clipped(text, SHORT), wording.clipped(text, LONG), wording.clipped(context, LONG))


def question_of(asked: dict[str, Question], row: ItemResult) -> Question:
    """The question of a result. A harness that brings its own tests keeps their texts."""
    found = asked.get(f"{row['task']}/{row['id']}")
    return (
        found if found and found.opening else Question("(the text of this item is not stored here)", "", "")
    )


def margin(row: ItemResult) -> float | None:
    """log p(right answer) minus log p(best other option), in nats; above zero the right one is likelier.

    None where no option was scored.
    """
    logprobs = row["detail"].get("logprobs")
    if not isinstance(logprobs, dict) or len(logprobs) < 2 or row["answer"] not in logprobs:
        return None
    others = [value for option, value in logprobs.items() if option != row["answer"]]
    return float(logprobs[row["answer"]] - max(others))


def prediction(row: ItemResult) -> str:
    return wording.clipped(row["prediction"], ANSWER) or "(nothing)"
