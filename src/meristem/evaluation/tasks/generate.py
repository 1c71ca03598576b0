"""Task type ``generate``: the model's own text, greedy or sampled, held against the answer or shown to a judge.

The metrics are described in ``matching.py`` and ``judge.py``. Of several samples the score is the mean over them, and
the first is the prediction. ``detail``: ``tokens`` generated (of all samples), ``unfinished`` (samples that ended at
``max_new_tokens`` only; absent for none), ``truncated``, and

- ``read``: what of the text was compared, where ``extract`` or ``numeric`` took a part of it (``None``: no such part);
- ``samples``: ``[{"text", "score"}]`` of several;
- ``judge``: see ``judge.py``; of several samples each has its own.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item, text_of
from meristem.evaluation.results import ItemResult
from meristem.evaluation.tasks import matching
from meristem.evaluation.tasks.base import Progress, Run, TaskType, for_each, result
from meristem.evaluation.tasks.judge import JudgeSettings, ask_judge

if TYPE_CHECKING:
    from meristem.engine.generate import Generated
    from meristem.engine.load import Engine
    from meristem.evaluation.suites import Task

Metric = Literal["exact_match", "contains", "regex", "numeric", "json", "token_f1", "rouge_l", "judge"]

# settings that only some metrics read
BELONGS = {
    "ignore_case": {"exact_match", "contains", "regex", "json"},
    "ignore_punctuation": {"exact_match", "contains", "json"},
    "normalize": {"exact_match", "contains", "json"},
    "tolerance": {"numeric"},
    "judge": {"judge"},
}


@dataclass(frozen=True)
class Sample:
    """A text with its score; ``note`` holds what the row's detail says about it."""

    text: str
    score: float
    note: dict[str, Any]


class Generate(TaskType):
    """``max_new_tokens``: where a text ends at the latest; ``stop``: strings before which it ends.

    ``temperature`` 0 is greedy; ``extract`` is a regular expression whose first match (its first group) is compared
    instead of the whole text.
    """

    KEYS: ClassVar[frozenset[str]] = frozenset({"answer"})
    metric: Metric = "exact_match"
    max_new_tokens: int = Field(default=64, ge=1, le=4096)
    samples: int = Field(default=1, ge=1, le=256)
    temperature: float = Field(default=0.0, ge=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int = 0
    stop: list[str] = Field(default=[])
    extract: str | None = None
    ignore_case: bool = False
    ignore_punctuation: bool = False
    normalize: bool = False
    tolerance: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    judge: JudgeSettings | None = None

    @field_validator("extract")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        if value is not None:
            matching.compiled(value)
        return value

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: list[str]) -> list[str]:
        if not all(value):
            raise Refused("an empty stop string would end every text at once; leave it out")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Generate:
        changed = {key for key in self.model_fields_set if getattr(self, key) != _default(key)}
        for key, metrics in BELONGS.items():
            if key in changed and self.metric not in metrics:
                raise Refused(
                    f"{key} belongs to the metric {' or '.join(sorted(metrics))}, not {self.metric}"
                )
        if self.metric == "judge" and self.judge is None:
            raise Refused("the metric judge needs judge: {url, model, prompt, scale or choices}")
        sampled = sorted(changed & {"samples", "top_p", "seed"})
        if sampled and not self.temperature:
            raise Refused(f"{sampled[0]}: greedy texts are all the same; set a temperature or leave it out")
        return self

    def parts(self, raw: dict[str, Any]) -> dict[str, Any]:
        given = raw.get("answer")
        if given is None and self.judge and "answer" not in self.judge.fields:
            return {}
        answers = given if isinstance(given, list) else [given]
        if not answers:
            raise Refused('"answer" is an empty list; name at least one right answer')
        first, *others = dict.fromkeys(self._answer(value) for value in answers)
        return {"answer": first, "references": tuple(others)}

    def _answer(self, value: Any) -> str:
        if self.metric == "json":
            if not isinstance(value, dict) or not value:
                raise Refused('"answer" must be a JSON object with at least one field for the metric json')
            return json.dumps(value, sort_keys=True, ensure_ascii=False)
        if isinstance(value, bool) or (isinstance(value, float) and self.metric != "numeric"):
            raise Refused(f'"answer" {json.dumps(value)} can be written in several ways; make it a string')
        return text_of(str(value) if isinstance(value, int | float) else value, '"answer"')

    def check(self, item: Item) -> None:
        for answer in (item.answer, *item.references):
            if self.metric == "regex":
                matching.compiled(answer, self.ignore_case)
            elif self.metric == "numeric" and matching.whole_number(answer) is None:
                raise Refused(f'"answer" {answer!r} is not one number')
            elif self.metric == "json" and not matching.json_object(answer):
                raise Refused(f'"answer" {answer!r} is not a JSON object')
            elif self.metric in ("exact_match", "contains") and answer and not self._rules.plain(answer):
                # it would stand in every text
                raise Refused(f'of "answer" {answer!r} nothing is left to compare; change it or the settings')

    def shown(self, item: Item) -> str:
        if self.metric == "regex" or not item.answer:
            raise Refused("few_shot: the answers of these items are no texts to show as examples; remove it")
        return item.answer

    def prepare(self, task: Task) -> None:
        if self.metric == "rouge_l" and importlib.util.find_spec("rouge_score") is None:
            raise BadInput("the metric rouge_l needs rouge-score; pip install 'meristem[rouge]'")
        if self.judge:
            from meristem.evaluation.tasks.judge_client import JudgeClient

            with JudgeClient(self.judge) as client:
                client.check()

    def document(self) -> dict[str, Any]:
        return {**super().document(), "max_new_tokens": self.max_new_tokens}

    def run(self, engine: Engine, task: Task, run: Run) -> list[ItemResult]:
        prompts = for_each(task.items, lambda item: self._prompt(engine, task, item))
        passes = 2 if self.judge else 1
        made = self._texts(engine, task, [tokens for tokens, _ in prompts], run, passes)
        if self.judge:
            samples = self._judged(task, made, run, passes)
        else:
            pairs = dict(zip((item.id for item in task.items), made, strict=True))
            samples = for_each(
                task.items, lambda item: [self._matched(item, one.text) for one in pairs[item.id]]
            )
        return [
            self._row(task, *row)
            for row in zip(task.items, made, samples, (cut for _, cut in prompts), strict=True)
        ]

    def _prompt(self, engine: Engine, task: Task, item: Item) -> tuple[list[int], int]:
        """Token ids, and how many the window had no room for."""
        from meristem.engine.prompts import encode_prompt, fit

        room = engine.max_length and engine.max_length - self.max_new_tokens
        return fit(encode_prompt(engine, task.chat(item), task.format), room, task.truncation)

    def _texts(
        self, engine: Engine, task: Task, prompts: list[list[int]], run: Run, passes: int
    ) -> list[list[Generated]]:
        from meristem.engine.generate import generate

        return generate(
            engine,
            prompts,
            max_new_tokens=self.max_new_tokens,
            samples=self.samples,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            names=[f"item {item.id!r}" for item in task.items],
            journal=run.journal("samples"),
            progress=_pass(run.progress, 0, passes),
        )

    def _matched(self, item: Item, text: str) -> Sample:
        """One text against all right answers."""
        text, note = text.strip(), {}
        compared: str | None = text
        if self.extract is not None:
            note["read"] = compared = matching.extracted(self.extract, text)
        if compared is None:
            return Sample(text, 0.0, note)
        if self.metric == "numeric":
            found = matching.numbers(compared)
            note["read"] = str(found[-1]) if found else None
        metric = matching.METRICS[self.metric]
        answers = (item.answer, *item.references)
        return Sample(text, max(metric(compared, answer, self._rules) for answer in answers), note)

    @property
    def _rules(self) -> matching.TextRules:
        return matching.TextRules(self.ignore_case, self.ignore_punctuation, self.normalize, self.tolerance)

    def _judged(
        self, task: Task, made: Sequence[Sequence[Generated]], run: Run, passes: int
    ) -> list[list[Sample]]:
        texts = [[self._shown(one.text.strip()) for one in own] for own in made]
        asked = [(item, shown) for item, own in zip(task.items, texts, strict=True) for shown, _ in own]
        assert self.judge is not None
        judged = iter(
            ask_judge(
                self.judge, asked, run.journal("judgements"), _pass(run.progress, 1, passes, self.samples)
            )
        )
        samples: list[list[Sample]] = []
        for own, shown in zip(made, texts, strict=True):
            samples.append([])
            for one, (_, note) in zip(own, shown, strict=True):
                judgement = next(judged)
                note = {**note, "judge": judgement.document()}
                samples[-1].append(Sample(one.text.strip(), judgement.score, note))
        return samples

    def _shown(self, text: str) -> tuple[str, dict[str, Any]]:
        """What the judge sees of a text."""
        if self.extract is None:
            return text, {}
        read = matching.extracted(self.extract, text)
        return read or "", {"read": read}

    def _row(
        self, task: Task, item: Item, made: Sequence[Generated], samples: Sequence[Sample], cut: int
    ) -> ItemResult:
        detail: dict[str, Any] = {"tokens": sum(one.tokens for one in made)}
        detail |= {"unfinished": count} if (count := sum(not one.finished for one in made)) else {}
        detail |= {"truncated": cut} if cut else {}
        if len(samples) > 1:
            detail["samples"] = [{"text": one.text, "score": one.score, **one.note} for one in samples]
        else:
            detail |= samples[0].note
        score = sum(one.score for one in samples) / len(samples)
        return result(task, item, samples[0].text, score, detail)


def _default(key: str) -> Any:
    return Generate.model_fields[key].default


def _pass(progress: Progress | None, number: int, passes: int, each: int = 1) -> Progress | None:
    """Progress of one of ``passes`` over the items, each of ``each`` steps an item, as progress of all of them."""
    if progress is None or (passes == 1 and each == 1):
        return progress

    def report(done: int, total: int) -> None:
        items = total // each
        progress((number * items + done // each) // passes, items)

    return report
