"""Task type ``inspect``: a task of an installed Inspect package, solved by our engine and scored by its own scorers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.items import Item
from meristem.evaluation.results import ItemResult
from meristem.evaluation.tasks.base import Run, TaskType
from meristem.evaluation.tasks.harness.shared import (
    installed_version,
    same_documents,
    same_version,
)

if TYPE_CHECKING:
    from meristem.engine.load import Engine
    from meristem.evaluation.suites import Task

PACKAGE = "inspect-ai"


class Frozen(BaseModel):
    """What pins a task, filled in when its suite is read.

    ``harness``, ``version``: of Inspect and of the task. ``code``: digest of the task's source file and of how it is
    solved and scored. ``samples``: digest of every sample, in order. ``epochs``: how often each is solved.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    harness: str
    version: str
    code: str
    samples: list[str]
    epochs: int = 1


class InspectTask(TaskType):
    """``task``: ``package/name`` of a registered task. ``args``: its arguments. ``metric``: the scorer whose value an
    item's score is, or ``scorer/key`` of one that gives several (the task's first). ``limit``: only so many samples.
    ``max_new_tokens``: where a text ends when the task says nothing."""

    PROMPTED: ClassVar[bool] = False
    BRINGS_ITEMS: ClassVar[bool] = True
    metric: str = ""
    task: str = Field(pattern=r"^[A-Za-z0-9_-]+/[A-Za-z0-9_-]+$")
    args: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=256, ge=1, le=4096)
    frozen: Frozen | None = None

    def collect(self, folder: Path) -> tuple[InspectTask, tuple[Item, ...]]:
        if self.frozen is not None:
            raise Refused("frozen: it is written when the suite is added; remove it")
        try:
            version = installed_version(PACKAGE)
            from meristem.evaluation.tasks.harness import inspect_source as source

            built = source.build(self.task, self.args)
            metric = source.choose(built, self.metric)
            samples = source.samples(built, self.limit)
        except BadInput as error:
            raise Refused(str(error)) from error
        frozen = Frozen(
            harness=version,
            version=str(built.version),
            code=source.code_digest(built, self.task),
            samples=list(source.digests(samples).values()),
            epochs=built.epochs or 1,
        )
        items = tuple(source.item(id, sample) for id, sample in samples.items())
        return self.model_copy(update={"metric": metric, "frozen": frozen}), items

    def prepare(self, task: Task) -> None:
        self._rebuilt(task)

    def run(self, engine: Engine, task: Task, run: Run) -> list[ItemResult]:
        built = self._rebuilt(task)
        from meristem.evaluation.tasks.harness import inspect_run

        return inspect_run.run(engine, task, self, built, run)

    def _rebuilt(self, task: Task) -> Any:
        """Inspect's task. ``BadInput`` when the harness, the task or its samples are not what was frozen."""
        if self.frozen is None or len(self.frozen.samples) != len(task.items):
            raise BadInput("it was stored without its digests; add the suite again")
        same_version(PACKAGE, self.frozen.harness)
        from meristem.evaluation.tasks.harness import inspect_source as source

        built = source.build(self.task, self.args)
        try:
            code = source.code_digest(built, self.task)
            found = source.digests(source.samples(built, self.limit))
        except Refused as error:
            raise BadInput(str(error)) from error
        if code != self.frozen.code or (built.epochs or 1) != self.frozen.epochs:
            raise BadInput(f"the installed {self.task} is not the one that was frozen; add the suite again")
        same_documents(
            {item.id: was for item, was in zip(task.items, self.frozen.samples, strict=True)}, found
        )
        return built
