"""Task type ``choice``: the option that the model finds most likely.

With s(o) = sum_j log p(o_j | prompt, o_<j), an option is chosen by

- ``plain``: s(o);
- ``length``: s(o) / characters of o (``acc_norm`` of lm-evaluation-harness);
- ``unconditional``: s(o) - log p(o | the same conversation with empty user messages), which takes out how likely an
  option is by itself (Brown et al. 2020, section 2.4, with their "answer context" made from the chat template).

The first of equals wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from meristem.data.jsonl import Refused
from meristem.evaluation.items import Item, check_options
from meristem.evaluation.results import ItemResult
from meristem.evaluation.tasks.base import Run, TaskType, result

if TYPE_CHECKING:
    from meristem.engine.load import Engine
    from meristem.evaluation.suites import Task


class Choice(TaskType):
    """``scoring``: what an option is chosen by (see above). ``options``: those of every item that brings none."""

    KEYS: ClassVar[frozenset[str]] = frozenset({"answer", "options"})
    INPUTS: ClassVar[frozenset[str]] = frozenset({"options"})
    metric: Literal["accuracy"] = "accuracy"
    scoring: Literal["plain", "length", "unconditional"] = "plain"
    options: list[str] | None = Field(default=None, exclude=True)

    @field_validator("options")
    @classmethod
    def _options(cls, value: list[str] | None) -> list[str] | None:
        return None if value is None else list(check_options(value))

    def parts(self, raw: dict[str, Any]) -> dict[str, Any]:
        own = raw.get("options")
        options = check_options(own) if own is not None else tuple(self.options or ())
        if not options:
            raise Refused('a choice item needs "options", here or in the suite file')
        return {"options": options, "answer": _answer(raw.get("answer"), options)}

    def check(self, item: Item) -> None:
        check_options(item.options)
        if item.answer not in item.options:
            raise Refused(f'"answer" {item.answer!r} is not among the options {list(item.options)}')

    def run(self, engine: Engine, task: Task, run: Run) -> list[ItemResult]:
        from meristem.evaluation.tasks.likelihood import option_scores, unconditional_scores

        scored = option_scores(engine, task, run)
        prior = unconditional_scores(engine, task, run) if self.scoring == "unconditional" else None
        rows = []
        for at, item in enumerate(task.items):
            values = [score.logprob for score in scored[at].scores]
            detail: dict[str, Any] = {"logprobs": rounded(item.options, values)}
            if prior is not None:
                detail["unconditional"] = rounded(item.options, prior[at])
            by = self._criterion(item.options, values, prior[at] if prior else None)
            best = item.options[max(range(len(by)), key=lambda k: (by[k], -k))]
            rows.append(result(task, item, best, best == item.answer, {**detail, **scored[at].cost()}))
        return rows

    def _criterion(
        self, options: Sequence[str], values: Sequence[float], prior: Sequence[float] | None
    ) -> list[float]:
        if self.scoring == "length":
            return [value / len(option) for option, value in zip(options, values, strict=True)]
        if prior is not None:
            return [value - before for value, before in zip(values, prior, strict=True)]
        return list(values)


def rounded(options: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Six digits: what a person compares and a file should hold."""
    return {option: float(f"{value:.6g}") for option, value in zip(options, values, strict=True)}


def _answer(value: Any, options: tuple[str, ...]) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < len(options):
            raise Refused(f'"answer" {value} is no index of {len(options)} options (0 to {len(options) - 1})')
        return options[value]
    if not isinstance(value, str) or not value.strip():
        raise Refused('"answer" must be a non-empty string')
    if value not in options:
        raise Refused(f'"answer" {value!r} is not among the options {list(options)}')
    return value
