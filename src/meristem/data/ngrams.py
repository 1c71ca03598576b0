"""Word n-grams of a few texts, indexed by hash, and where they stand in a stream of other texts.

The rule is that of GPT-3 (Brown et al. 2020, sections 4 and C): n words in a row, without case and punctuation, n = 13;
a text that is shorter is one n-gram as a whole. ``SHORTEST`` is their least n, below which texts collide by chance.

An n-gram is a 64-bit polynomial hash of its words' numbers, so two different ones are taken for the same with a
probability of about (n-grams of the texts) x (n-grams of the stream) / 2^64: 5e-8 at 1e5 x 1e7.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHORTEST = 8
COMMON_ITEMS = 10

# Scripts without spaces between words: there a character counts as a word.
_ONE = r"\u3040-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ONE}]|[^\W_{_ONE}]+")
_INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF])
_SPACED = {code: " " for code in range(128) if not chr(code).isalnum()}
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it loses no bit

Words = Sequence[str]
Array = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def words(text: str) -> list[str]:
    """The words of ``text`` in NFKC, case-folded, without punctuation; a Chinese or Japanese character is a word."""
    if text.isascii():
        return text.lower().translate(_SPACED).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).casefold())


class Hit(NamedTuple):
    """Text number ``text`` shares n-grams with row number ``row`` of a batch; the last ends before word ``end``."""

    row: int
    text: int
    end: int


class NgramIndex:
    """The n-grams of ``texts`` (each a list of words), and which of them were found so far.

    ``groups[i]`` names the group of text i. An n-gram that stands in more than ``COMMON_ITEMS`` texts, or in at least
    three and more than half of its group, is common: an instruction, a template, a shared passage. It tells nothing
    about the text and is left out. Memory grows with ``texts`` alone.
    """

    def __init__(self, texts: Sequence[Words], groups: Sequence[str], n: int):
        self.n = n
        self._numbers: dict[str, int] = {}  # word -> number from 1; 0 is every other word
        coded = [np.array([self._number(word) for word in text], np.int64) for text in texts]
        grams = [_Grams(coded, groups, length, n) for length in sorted({*map(self._length, coded)} - {0})]
        self._grams = [found for found in grams if len(found.hashes)]
        self._texts = len(texts)

    def sizes(self) -> Array:
        """Number of n-grams that are looked for, per text: 0 for one that is too short or all common."""
        return self._sum(lambda grams: np.bincount(grams.owners, minlength=self._texts))

    def matched(self) -> Array:
        """Number of them that were found, per text."""
        return self._sum(lambda grams: np.bincount(grams.owners[grams.found], minlength=self._texts))

    def scan(self, rows: Sequence[Words]) -> list[Hit]:
        """Every (row, text) that share an n-gram, in the order of rows, then texts."""
        known = self._numbers
        numbers: list[int] = []
        starts = [0]
        for row in rows:
            numbers += [known.get(word, 0) for word in row]
            numbers.append(0)  # no n-gram goes from one row into the next
            starts.append(len(numbers))
        coded, edges = np.array(numbers, np.int64), np.array(starts, np.int64)
        ends: dict[tuple[int, int], int] = {}
        for grams in self._grams:
            for row_number, text, end in self._pairs(*grams.look_up(coded), edges):
                key = row_number, text
                ends[key] = max(end + grams.length, ends.get(key, 0))
        return [Hit(*key, ends[key]) for key in sorted(ends)]

    def _pairs(self, places: Array, owners: Array, edges: Array) -> list[tuple[int, int, int]]:
        """Each (row, text) once, with the place in its row where the last of its n-grams begins."""
        rows = np.searchsorted(edges, places, "right") - 1
        order = np.lexsort((places, owners, rows))
        places, owners, rows = places[order], owners[order], rows[order]
        differs = (np.diff(rows) != 0) | (np.diff(owners) != 0)
        last = np.append(np.flatnonzero(differs), len(rows) - 1) if len(rows) else np.array([], np.int64)
        starts = places[last] - edges[rows[last]]
        return list(zip(rows[last].tolist(), owners[last].tolist(), starts.tolist(), strict=True))

    def _number(self, word: str) -> int:
        return self._numbers.setdefault(word, len(self._numbers) + 1)

    def _length(self, coded: Array) -> int:
        return _gram_length(len(coded), self.n)

    def _sum(self, count: Callable[[_Grams], Array]) -> Array:
        total = np.zeros(self._texts, np.int64)
        for grams in self._grams:
            total += count(grams)
        return total


def _gram_length(size: int, n: int) -> int:
    """n; the whole text where that is shorter; 0 where it is too short to mean anything."""
    return n if size >= n else size if size >= min(SHORTEST, n) else 0


class _Grams:
    """All n-grams of one length, sorted by hash: ``hashes[i]`` stands in text ``owners[i]``."""

    def __init__(self, coded: Sequence[Array], groups: Sequence[str], length: int, n: int):
        self.length = length
        mine = [i for i, numbers in enumerate(coded) if _gram_length(len(numbers), n) == length]
        found = [np.unique(_hashes(coded[i], length)) for i in mine]
        hashes = np.concatenate(found)
        owners = np.repeat(np.array(mine, np.int64), [len(some) for some in found])
        order = np.lexsort((owners, hashes))
        self.hashes, self.owners = hashes[order], owners[order]
        kept = ~self._common(groups, mine)
        self.hashes, self.owners = self.hashes[kept], self.owners[kept]
        self.found = np.zeros(len(self.hashes), bool)
        self._filter = np.zeros(
            1 << 20, bool
        )  # most n-grams are not here: one look instead of a binary search
        self._filter[_low_bits(self.hashes)] = True

    def look_up(self, coded: Array) -> tuple[Array, Array]:
        """Places in ``coded`` and the texts whose n-gram begins there; what is found is noted."""
        hashes = _hashes(coded, self.length)
        unknown = np.concatenate(([0], np.cumsum(coded == 0)))
        before, after = unknown[: len(hashes)], unknown[self.length : self.length + len(hashes)]
        places = np.flatnonzero(before == after)
        places = places[self._filter[_low_bits(hashes[places])]]
        first = np.searchsorted(self.hashes, hashes[places], "left")
        count = np.searchsorted(self.hashes, hashes[places], "right") - first
        entries = np.repeat(first + count - np.cumsum(count), count) + np.arange(count.sum())
        self.found[entries] = True
        return np.repeat(places, count), self.owners[entries]

    def _common(self, groups: Sequence[str], mine: Sequence[int]) -> NDArray[np.bool_]:
        names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
        of_text = np.array([names[name] for name in groups], np.int64)
        sizes = np.bincount(of_text)
        _, gram, total = np.unique(self.hashes, return_inverse=True, return_counts=True)
        group = of_text[self.owners]
        _, pair, within = np.unique(gram * len(names) + group, return_inverse=True, return_counts=True)
        often = within[pair]
        most = (often >= 3) & (2 * often > sizes[group])
        return (total[gram] > COMMON_ITEMS) | most


def _hashes(coded: Array, length: int) -> Hashes:
    """Hash of the ``length`` words that begin at each place: sum of value(word j) x FACTOR^(length - 1 - j)."""
    values = _scattered(coded.astype(np.uint64))
    count = max(0, len(coded) - length + 1)
    total = np.zeros(count, np.uint64)
    for j in range(length):
        total = total * _FACTOR + values[j : j + count]
    return total


def _scattered(x: Hashes) -> Hashes:
    """SplitMix64's finalizer: neighbouring numbers become unrelated values."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _low_bits(hashes: Hashes) -> Array:
    return (hashes >> np.uint64(44)).astype(np.int64)
