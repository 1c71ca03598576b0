"""Task type ``lm-eval``: a task of lm-evaluation-harness, scored by its own code on our engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item
from meristem.evaluation.results import ItemResult
from meristem.evaluation.tasks.base import Run, TaskType, Unit
from meristem.evaluation.tasks.harness.shared import (
    digest,
    installed_version,
    same_documents,
    same_version,
)

if TYPE_CHECKING:
    from meristem.engine.load import Engine
    from meristem.evaluation.suites import Task

PACKAGE = "lm-eval"


class Frozen(BaseModel):
    """What pins a task, filled in when its suite is read.

    ``harness``, ``version``: of lm-eval and of the task. ``yaml``: its file inside the installed package; or
    ``config``: the resolved configuration of a local task, as JSON, without where its data was. ``digest``: of the
    configuration and the code that it names. ``documents``, ``shots``: as JSON texts, in lm-eval's order of keys.
    ``drawn``: per document the places of its examples in ``shots``; empty without examples.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    harness: str
    version: str
    yaml: str | None = None
    config: str | None = None
    digest: str
    documents: list[str]
    shots: list[str] = []
    drawn: list[list[int]] = []

    @model_validator(mode="after")
    def _whole(self) -> Frozen:
        if self.drawn and len(self.drawn) != len(self.documents):
            raise ValueError("drawn: not one entry per document")
        if any(not 0 <= at < len(self.shots) for places in self.drawn for at in places):
            raise ValueError("drawn: an example that is not among the shots")
        for text in (*self.documents, *self.shots, self.config or "{}"):
            if not isinstance(json.loads(text), dict):
                raise ValueError(f"{text[:40]!r} is no JSON object")
        return self


class LmEval(TaskType):
    """``task``: its name, or a ``.yaml`` file beside the suite. ``metric``, ``filter``: whose value an item's score
    is (the task's first). ``limit``: only so many documents. ``include_path``: a folder of task files."""

    INPUTS: ClassVar[frozenset[str]] = frozenset({"include_path", "limit"})
    PROMPTED: ClassVar[bool] = False
    BRINGS_ITEMS: ClassVar[bool] = True
    metric: str = ""
    filter: str = ""
    task: str = Field(min_length=1)
    num_fewshot: int | None = Field(default=None, ge=0, le=64)
    limit: int | None = Field(default=None, ge=1, exclude=True)
    include_path: str | None = Field(default=None, min_length=1, exclude=True)
    frozen: Frozen | None = None

    @property
    def unit(self) -> Unit:
        return "bits_per_byte" if self.metric == "bits_per_byte" else "share"

    def collect(self, folder: Path) -> tuple[LmEval, tuple[Item, ...]]:
        if self.frozen is not None:
            raise Refused("frozen: it is written when the suite is added; remove it")
        version = _installed()
        from meristem.evaluation.tasks.harness import lm_eval_frozen as lm_eval
        from meristem.evaluation.tasks.harness.lm_eval_source import find

        try:
            with lm_eval.harness_ways():
                source = find(self.task, self.include_path, folder)
                task = lm_eval.load(source, self.num_fewshot)
                metric, filter = lm_eval.choose(task, self.metric, self.filter)
                frozen = lm_eval.freeze(source, task, version, self.limit)
                # the rebuilt one is what will be evaluated, so it must stand now
                items = lm_eval.items(lm_eval.rebuild(frozen, self.num_fewshot), frozen)
        except BadInput as error:
            raise Refused(str(error)) from error
        found = {"task": str(task.config.task), "metric": metric, "filter": filter, "frozen": frozen}
        return self.model_copy(update=found), items

    def prepare(self, task: Task) -> None:
        self._rebuilt(task)

    def run(self, engine: Engine, task: Task, run: Run) -> list[ItemResult]:
        from meristem.evaluation.tasks.harness import lm_eval_run

        return lm_eval_run.run(engine, task, self, self._rebuilt(task), run)

    def _rebuilt(self, task: Task) -> Any:
        """The harness's task. ``BadInput`` when the harness, the task or its documents are not what was frozen."""
        if self.frozen is None:
            raise BadInput("it was stored without its documents; add the suite again")
        same_version(PACKAGE, self.frozen.harness)
        from meristem.evaluation.tasks.harness import lm_eval_frozen as lm_eval

        with lm_eval.harness_ways():
            try:
                built = lm_eval.rebuild(self.frozen, self.num_fewshot)
                items = lm_eval.items(built, self.frozen)
            except Refused as error:
                raise BadInput(str(error)) from error
        # what leak checks read must be what is asked
        same_documents(_digests(task.items), _digests(items))
        return built


def _digests(items: tuple[Item, ...]) -> dict[str, str]:
    return {item.id: digest(item.to_document()) for item in items}


def _installed() -> str:
    try:
        return installed_version(PACKAGE)
    except BadInput as error:
        raise Refused(str(error)) from None
