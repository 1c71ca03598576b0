"""Which test items stand in training rows: as the same text, or with n words in a row of it.

Memory grows with the items; rows are read once, as they come.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from meristem.data.formats import Row, fold, normalized_text
from meristem.data.ngrams import SHORTEST, Hit, NgramIndex, words

MOST_ROWS = 5  # rows named per item
NEARBY = 50  # in running text an answer counts when it comes within so many words after the input
_BATCH = 200_000  # words

Kind = Literal["exact", "ngram"]


@dataclass(frozen=True)
class Wanted:
    """A test item. ``inputs``: what it asks, best the raw text before a prompt template, then other forms of it.

    N-grams are of the first, equality is looked for with all. ``group``: items with a template in common.
    """

    id: str
    group: str
    inputs: tuple[str, ...]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowMatch:
    """A training row in which an item's input stands; ``answer``: so does its answer, where the row teaches one."""

    data: str
    row: str
    kind: Kind
    answer: bool


@dataclass(frozen=True)
class ItemMatch:
    """An item that stands in training data.

    ``kind``: ``exact`` when some row's input is the same text but for case, white space and punctuation. ``share``: of
    the item's n-grams, those found (1.0 when exact). ``answer``: whether some row holds input and answer, None for an
    item that has none. ``rows``: how many; ``first``: the first few of them, exact ones before others.
    """

    item: str
    kind: Kind
    share: float
    answer: bool | None
    rows: int
    first: tuple[RowMatch, ...]


@dataclass
class _Tally:
    rows: int = 0
    answer: bool = False
    first: dict[Kind, list[RowMatch]] = field(default_factory=lambda: {"exact": [], "ngram": []})


@dataclass(frozen=True)
class _Reading:
    """A row's words, and which of them are learned as answers; ``running``: plain text, where any word is."""

    id: str
    key: str
    words: list[str]
    learned: tuple[str, ...]
    running: bool


class OverlapSearch:
    """Looks for ``items`` in data sets that are shown to it one after the other."""

    def __init__(self, items: Sequence[Wanted], n: int = 13):
        self._items = items
        asked = [words(item.inputs[0]) if item.inputs else [] for item in items]
        self._index = NgramIndex(asked, [item.group for item in items], n)
        self._exact: dict[str, list[int]] = {}
        for number, item in enumerate(items):
            for key in dict.fromkeys(_key(text, words(text)) for text in item.inputs):
                if key:
                    self._exact.setdefault(key, []).append(number)
        self._answers = [[found for answer in item.answers if (found := words(answer))] for item in items]
        self._tallies: dict[int, _Tally] = {}

    def searched(self) -> list[bool]:
        """Per item, whether n-grams of it are looked for; others (short, or common text alone) only as a whole."""
        return [bool(size) for size in self._index.sizes()]

    def add(self, label: str, rows: Iterable[Row], step: Callable[[int], None] | None = None) -> int:
        """Read the rows of one data set; returns how many. ``step(rows)`` is called after each batch."""
        batch: list[_Reading] = []
        count = size = 0
        for row in rows:
            batch.append(_read(row))
            count, size = count + 1, size + len(batch[-1].words)
            if size >= _BATCH:
                self._search(label, batch)
                batch, size = [], 0
                if step:
                    step(count)
        self._search(label, batch)
        if step:
            step(count)
        return count

    def found(self) -> dict[int, ItemMatch]:
        """Every item found so far, by its place among the items."""
        sizes = np.maximum(self._index.sizes(), 1)
        shares = (self._index.matched() / sizes).tolist()
        return {number: self._match(number, shares[number]) for number in sorted(self._tallies)}

    def _match(self, number: int, share: float) -> ItemMatch:
        item, tally = self._items[number], self._tallies[number]
        exact = bool(tally.first["exact"])
        return ItemMatch(
            item=item.id,
            kind="exact" if exact else "ngram",
            share=1.0 if exact else share,
            answer=tally.answer if item.answers else None,
            rows=tally.rows,
            first=tuple([*tally.first["exact"], *tally.first["ngram"]][:MOST_ROWS]),
        )

    def _search(self, label: str, batch: list[_Reading]) -> None:
        hits = self._index.scan([reading.words for reading in batch])
        partly: dict[int, list[Hit]] = {}
        for hit in hits:
            partly.setdefault(hit.row, []).append(hit)
        for place, reading in enumerate(batch):
            same = self._exact.get(reading.key, ())
            for number in same:
                self._note(number, label, reading, "exact", len(reading.words))
            for hit in partly.get(place, ()):
                if hit.text not in same:
                    self._note(hit.text, label, reading, "ngram", hit.end)

    def _note(self, number: int, label: str, reading: _Reading, kind: Kind, end: int) -> None:
        tally = self._tallies.setdefault(number, _Tally())
        tally.rows += 1
        listed = tally.first[kind]
        if tally.answer and len(listed) >= MOST_ROWS:
            return
        answer = any(_taught(reading, wanted, end) for wanted in self._answers[number])
        tally.answer = tally.answer or answer
        if len(listed) < MOST_ROWS:
            listed.append(RowMatch(label, reading.id, kind, answer))


def _taught(reading: _Reading, answer: list[str], end: int) -> bool:
    """Whether a row teaches ``answer``; running text does when it comes soon after word ``end``."""
    if reading.running:
        return _contains(reading.words[end : end + NEARBY + len(answer)], answer)
    return any(_contains(words(text), answer) for text in reading.learned)


def _contains(text: list[str], part: list[str]) -> bool:
    return any(text[at : at + len(part)] == part for at in range(len(text) - len(part) + 1))


def _read(row: Row) -> _Reading:
    asked = normalized_text(row)
    asked_words = words(asked)
    before, after, learned = _beside(row)
    return _Reading(
        id=str(row["id"]),
        key=_key(asked, asked_words),
        words=words(before) + asked_words + words(after) if before or after else asked_words,
        learned=learned,
        running="text" in row,
    )


def _beside(row: Row) -> tuple[str, str, tuple[str, ...]]:
    """What stands before and after a row's input, and all that is learned as an answer."""
    if "text" in row:
        return "", "", ()
    if "messages" in row:
        turns = row["messages"]
        learned = tuple(turn["content"] for turn in turns if turn["role"] == "assistant")
        return _system(turns), turns[-1]["content"], learned
    before = "" if isinstance(row["prompt"], str) else _system(row["prompt"])
    answers = [_content(row[key]) for key in ("completion", "chosen", "rejected") if key in row]
    return before, " ".join(answers), (answers[0],)


def _system(messages: list[dict[str, str]]) -> str:
    return " ".join(message["content"] for message in messages if message["role"] == "system")


def _content(value: Any) -> str:
    return value if isinstance(value, str) else " ".join(message["content"] for message in value)


def _key(text: str, its_words: list[str]) -> str:
    """What two equal texts have in common: their words.

    Short texts keep the signs inside of and between their words: "3 + 4" is not "3 - 4".
    """
    if len(its_words) >= SHORTEST:
        return " ".join(its_words)
    return " ".join(map(_bare, _bare(fold(text)).split()))


def _bare(token: str) -> str:
    """Without punctuation and spaces at its ends; as it is where it holds nothing else."""
    start, end = 0, len(token)
    while start < end and unicodedata.category(token[start])[0] in "PZ":
        start += 1
    while end > start and unicodedata.category(token[end - 1])[0] in "PZ":
        end -= 1
    return token[start:end] or token
