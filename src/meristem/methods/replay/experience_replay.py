"""Experience replay: mix rows of earlier tasks into the new task's training set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from meristem.errors import BadInput
from meristem.methods._formats import check_format
from meristem.methods.base import Context, Method, MethodState, Row
from meristem.methods.replay.buffers import BUFFERS, Buffer


class ExperienceReplay(Method):
    """Mixes kept rows of earlier tasks into the new task's training set.

    With N new rows and ``ratio`` r, the mixed set has R = round(N r / (1 - r)) replayed rows, so that
    R / (N + R) = r: the *share of replayed rows in the mixed set*, not a rate per new row. They are drawn from
    the buffer without replacement; when R exceeds the buffer, whole passes over it repeat. Rows keep their own
    ``id`` and ``task``, and the mixed order is a function of ``seed``, the task and the rows.

    Source: Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning" (arXiv 1902.10486).
    Claims: less forgetting. Stages: cpt, cit, ca. State: a buffer of at most ``capacity`` raw rows, whatever
    the number of tasks (``buffer``: "task-balanced" or "reservoir"); tasks of the lineage's history that it has
    not seen (a lineage that began without replay) are added first.
    """

    name = "experience-replay"
    claims = ("less-forgetting",)
    stages = frozenset({"cpt", "cit", "ca"})
    old_data = "sample"

    def __init__(
        self, ratio: float = 0.1, capacity: int = 1000, buffer: str = "task-balanced", seed: int = 0
    ) -> None:
        if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise BadInput(f"{self.name}: ratio={ratio!r} must be in [0, 1): the share of replayed rows")
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1:
            raise BadInput(f"{self.name}: capacity={capacity!r} must be a whole number of rows, 1 or more")
        if buffer not in BUFFERS:
            raise BadInput(f"{self.name}: buffer={buffer!r} must be one of {', '.join(BUFFERS)}")
        if not isinstance(seed, int):
            raise BadInput(f"{self.name}: seed={seed!r} must be a whole number")
        self.ratio, self.seed = float(ratio), seed
        self.buffer: Buffer = BUFFERS[buffer](capacity, seed)
        self._known: set[str] = set()  # tasks that the buffer has seen, rows of them kept or not

    def prepare_data(self, rows: Sequence[Row], ctx: Context) -> Sequence[Row]:
        for task, earlier in ctx.history.items():
            if task not in self._known:
                self._remember(earlier)
        held = self.buffer.rows()
        if not held or not len(rows):
            return rows
        check_format(self.name, rows[0], held)
        draw = random.Random(f"{self.seed}/{ctx.seed}/{ctx.task}")
        count = round(len(rows) * self.ratio / (1 - self.ratio))
        mixed = [dict(row) for row in rows] + _passes(held, count, draw)
        draw.shuffle(mixed)
        return mixed

    def finish(self, ctx: Context) -> None:
        self._remember(ctx.rows)

    def _remember(self, rows: Sequence[Row]) -> None:
        self.buffer.add(rows)
        self._known |= {row["task"] for row in rows}

    def state_dict(self) -> MethodState:
        return {"tensors": {}, "json": {"buffer": self.buffer.state(), "tasks": sorted(self._known)}}

    def load_state_dict(self, state: MethodState) -> None:
        saved: dict[str, Any] = state["json"]
        self.buffer.load(saved["buffer"])
        self._known = set(saved["tasks"])


def _passes(held: list[Row], count: int, draw: random.Random) -> list[Row]:
    """``count`` rows: whole shuffled passes over ``held``, the last one cut."""
    drawn: list[Row] = []
    while len(drawn) < count:
        drawn += draw.sample(held, min(len(held), count - len(drawn)))
    return [dict(row) for row in drawn]
