"""Joint training on everything seen so far, the upper reference."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from meristem.methods._formats import check_format
from meristem.methods.base import Context, Method, Row


class Joint(Method):
    """Trains on the rows of all earlier tasks and the new ones together, each row once.

    rows_t = new rows + the rows of every task in the history that are not equal, field by field, to one before

    in an order that is a function of the seed and the task. It is what replay with an unbounded buffer and no
    fixed share would be, costs an update as long as the whole past, and goes on from the weights that are there;
    training all tasks at once from the base model is ``joint`` of ``meristem bench``.

    Claims: less forgetting. Stages: all. State: none; the rows of earlier tasks must still be there.
    """

    name = "joint"
    claims = ("less-forgetting",)
    alone = True
    old_data = "all"

    def prepare_data(self, rows: Sequence[Row], ctx: Context) -> Sequence[Row]:
        earlier = [row for task in ctx.history.values() for row in task]
        if not earlier or not len(rows):
            return rows
        check_format(self.name, rows[0], earlier)
        whole = [dict(row) for row in rows]
        seen = {_key(row) for row in whole}
        for row in earlier:
            if _key(row) not in seen:
                seen.add(_key(row))
                whole.append(dict(row))
        random.Random(f"{ctx.seed}/{ctx.task}").shuffle(whole)
        return whole


def _key(row: Row) -> str:
    """All that a row says; fields without a value do not count."""
    said = {name: value for name, value in row.items() if value is not None}
    return json.dumps(said, sort_keys=True, default=str)
