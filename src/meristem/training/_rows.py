"""Rows as the seam needs them: a data set whose rows all have a text ``id`` and ``task``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from datasets import Dataset

from meristem.errors import Clash
from meristem.methods.base import Row


class Stream(Sequence[Row]):
    """Stands for the rows of a task that come as a stream: whoever asks for them is told."""

    def __len__(self) -> NoReturn:
        raise Clash(
            "a method asks for ctx.rows, and this run has a stream: pass a datasets.Dataset or a list"
        )

    def __getitem__(self, index: Any) -> NoReturn:
        self.__len__()


def with_ids(given: Any, task: str) -> Dataset:
    """``given`` with ``id`` ("row-<n>" where missing) and ``task`` on every row, as text."""
    data = given if isinstance(given, Dataset) else dataset(given)
    for name, default in (("id", "row-{n}"), ("task", task.replace("{", "{{").replace("}", "}}"))):
        old = data[name] if name in data.column_names else [None] * len(data)
        new = [str(value) if value is not None else default.format(n=n) for n, value in enumerate(old)]
        if name in data.column_names:
            data = data.remove_columns(name)
        data = data.add_column(name, new)
    return data


def dataset(rows: Sequence[Row]) -> Dataset:
    """One data set of all columns that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return Dataset.from_list([{key: row.get(key) for key in keys} for row in rows])


def labels(row: Row) -> list[int]:
    """What the shifted loss of a tokenized row is taken over."""
    return list(row.get("labels") or row["input_ids"])[1:]
