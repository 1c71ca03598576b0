"""Metric ``judge``: another model reads the text and says how good it is.

The judge answers with a number of ``scale`` (its ends become 0 and 1) or with one of ``choices`` (each worth a share
from 0 to 1). Read is the last line of its reply, or the whole reply when that line names nothing; it counts when
exactly one number of the scale, or one choice, is named ("7/10" and "7 out of 10" name 7). All else is *unreadable*:
it scores 0, says so in the row, and an evaluation with more than ``max_unreadable`` of them ends as inconclusive.

A row's ``detail.judge``: ``score``, ``raw`` (the reply, shortened), ``model`` and ``fingerprint`` (what the endpoint
said it was), ``unreadable``. What was asked for, template and settings included, is part of the suite and its digest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from meristem.data.formats import fold
from meristem.data.jsonl import Refused
from meristem.errors import Inconclusive
from meristem.evaluation.items import Item, template_fields
from meristem.evaluation.tasks.matching import numbers

if TYPE_CHECKING:
    from meristem.engine.batching import Journal, Progress

FIELDS = {"question", "answer", "response"}
BATCH = 16  # judgements that a killed evaluation may have to pay for twice
RAW = 200


class JudgeSettings(BaseModel):
    """``url``: the endpoint up to ``/chat/completions``. ``prompt``: one user message, from {question}, {answer},
    {response}. ``api_key_env``: the variable of the environment that holds the key. ``options``: further fields of
    the request; ``temperature``, ``max_tokens`` and ``seed`` are left out of it where they are null.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    url: str
    model: str = Field(min_length=1)
    prompt: str
    scale: list[float] | None = Field(default=None, min_length=2, max_length=2)
    choices: dict[str, float] | None = Field(default=None, min_length=2)
    api_key_env: str | None = Field(default=None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    temperature: float | None = Field(default=0.0, ge=0.0)
    max_tokens: int | None = Field(default=64, ge=1)
    seed: int | None = 0
    options: dict[str, Any] = {}
    timeout: float = Field(default=60.0, gt=0.0)
    retries: int = Field(default=4, ge=0, le=20)
    concurrency: int = Field(default=4, ge=1, le=64)
    max_unreadable: float = Field(default=0.05, ge=0.0, le=1.0)

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        readable = (
            value.isprintable() and " " not in value and parts.port != 0
        )  # ``port`` refuses what is none
        if parts.scheme not in ("http", "https") or not parts.hostname or not readable:
            raise Refused("not an http(s) address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise Refused("an address holds no key; put it into a variable and name that in api_key_env")
        return value.rstrip("/").removesuffix("/chat/completions")

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str) -> str:
        found = set(template_fields(value))
        if found - FIELDS or "response" not in found:
            raise Refused("it must show {response}, and may show {question} and {answer}; nothing else")
        return value

    @field_validator("options")
    @classmethod
    def _options(cls, value: dict[str, Any]) -> dict[str, Any]:
        own = sorted(value.keys() & {"model", "messages", "stream", "n"})
        if own:
            raise Refused(f"{own[0]} is not for options: it would change what is asked, and of whom")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> JudgeSettings:
        if (self.scale is None) == (self.choices is None):
            raise Refused(
                "the judge answers on a scale: [lowest, highest] or by choices: {yes: 1, no: 0}; give one"
            )
        if self.scale and not self.scale[0] < self.scale[1]:
            raise Refused(f"scale: {self.scale[0]:g} is not below {self.scale[1]:g}")
        for name, worth in (self.choices or {}).items():
            if not fold(name) or not 0 <= worth <= 1:
                raise Refused(f"choices: {name!r} is worth {worth:g}; give words worth 0 to 1")
        if len({fold(name) for name in self.choices or {}}) < len(self.choices or {}):
            raise Refused("choices: two are the same but for their case")
        return self

    @cached_property
    def fields(self) -> frozenset[str]:
        """What the prompt shows."""
        return frozenset(template_fields(self.prompt))

    def read(self, reply: str) -> float | None:
        """The score that ``reply`` gives, from 0 to 1; ``None`` when it names none or several."""
        lines = [line for line in reply.splitlines() if line.strip()]
        for part in (*lines[-1:], reply):
            named = self._named(part)
            if named:
                return named.pop() if len(named) == 1 else None
        return None

    def _named(self, text: str) -> set[float]:
        if self.scale:
            lowest, highest = self.scale
            text = re.sub(rf"\s*(?:/|out of)\s*{highest:g}(?:\.0+)?(?![0-9])", " ", text)
            found = {float(number) for number in numbers(text)}
            return {(x - lowest) / (highest - lowest) for x in found if lowest <= x <= highest}
        text = fold(text)
        return {
            worth
            for name, worth in (self.choices or {}).items()
            if re.search(rf"(?<!\w){re.escape(fold(name))}(?!\w)", text)
        }


class Judgement(NamedTuple):
    """``score`` is ``None`` in the journal and 0 here when ``unreadable``."""

    score: float
    unreadable: bool
    raw: str
    model: str | None
    fingerprint: str | None

    def document(self) -> dict[str, Any]:
        said = {"model": self.model, "fingerprint": self.fingerprint, "unreadable": self.unreadable or None}
        return {
            "score": self.score,
            "raw": self.raw,
            **{key: value for key, value in said.items() if value is not None},
        }


def ask_judge(
    settings: JudgeSettings,
    asked: Sequence[tuple[Item, str]],
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[Judgement]:
    """The judgement of each (item, text). Finished batches are kept in ``journal`` and not asked for again, unless a
    reply in them was unreadable.

    Raises ``EnvironmentFailure`` when the endpoint gives no usable answer, ``Inconclusive`` for too many unreadable.
    """
    from meristem.engine.batching import Plan, run_batches
    from meristem.evaluation.tasks.judge_client import JudgeClient

    prompts = [judge_prompt(settings, item, text) for item, text in asked]
    numbered = range(len(prompts))
    plan = Plan(tuple(tuple(numbered[at : at + BATCH]) for at in numbered[::BATCH]), len(prompts))
    with JudgeClient(settings) as client:

        def compute(batch: tuple[int, ...]) -> list[list[str | None]]:
            return [list(reply) for reply in client.ask([prompts[at] for at in batch])]

        replies = run_batches(plan, compute, journal and _Readable(journal, settings), progress)
    judged = [_judgement(settings, *reply) for reply in replies]
    _refuse_noise(settings, asked, judged)
    return judged


class _Readable(NamedTuple):
    """A journal that forgets batches with an unreadable reply: a judge that was mended is asked again."""

    journal: Journal
    settings: JudgeSettings

    def get(self, batch: int) -> list[Any] | None:
        found = self.journal.get(batch)
        unreadable = any(self.settings.read(text or "") is None for text, *_ in found or ())
        return None if unreadable else found

    def put(self, batch: int, values: list[Any]) -> None:
        self.journal.put(batch, values)


def judge_prompt(settings: JudgeSettings, item: Item, response: str) -> str:
    """The one message that the judge gets. Several right answers stand on a line each."""
    said = [message for message in item.messages if message.role != "system"]
    turns = [f"{message.role}: {message.content}" for message in said]
    question = said[0].content if len(said) == 1 else "\n".join(turns)
    answer = "\n".join((item.answer, *item.references))
    return settings.prompt.format_map({"question": question, "answer": answer, "response": response})


def _judgement(settings: JudgeSettings, text: str | None, model: str | None, mark: str | None) -> Judgement:
    score = settings.read(text or "")
    raw = (text or "").strip()
    shown = raw if len(raw) <= RAW else f"{raw[:RAW]}..."
    return Judgement(score or 0.0, score is None, shown, model, mark)


def _refuse_noise(
    settings: JudgeSettings, asked: Sequence[tuple[Item, str]], judged: Sequence[Judgement]
) -> None:
    unreadable = [(item, one) for (item, _), one in zip(asked, judged, strict=True) if one.unreadable]
    if len(unreadable) > settings.max_unreadable * len(judged):
        item, one = unreadable[0]
        raise Inconclusive(
            f"{len(unreadable)} of {len(judged)} judgements of {settings.model} are unreadable, for item {item.id!r} "
            f"it said {one.raw[:60]!r}; ask for the score alone on the last line, or raise max_tokens"
        )
