"""Metrics of generated text: how well a text agrees with one right answer, as a share from 0 to 1.

=============  =========================================================================================
exact_match    the text is the answer, white space at the ends aside (see ``TextRules``)
contains       the answer stands somewhere in the text
regex          the answer, a regular expression, is found in the text
numeric        the last number of the text is the answer, within ``tolerance``
json           share of the answer's fields that the text, a JSON object, has with the same value
token_f1       F1 of the words (Rajpurkar et al. 2016, SQuAD's official script)
rouge_l        F-measure of the longest common subsequence of words (Lin 2004; the package ``rouge-score``,
               without stemming). Its words are runs of a-z and 0-9: not for other alphabets
=============  =========================================================================================

Whoever has several right answers takes the best. Regular expressions are those of the package ``regex``.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from functools import cache
from typing import Any

import regex

from meristem.data.jsonl import Refused
from meristem.errors import BadInput

PATTERN_SECONDS = 1.0  # processor time of one search; a text is at most some thousand tokens
_GROUPED = "[0-9]{1,3}(?:[,'’\u2009\u202f][0-9]{3})+(?![0-9])"
# a sign behind a digit or letter is a dash: "5-10" ends in 10
_EXPONENT = "[eE][-+]?[0-9]{1,4}(?![0-9])"
NUMBER = re.compile(
    rf"(?:(?<![0-9A-Za-z.)])[-+−])?(?:{_GROUPED}|[0-9]+|(?=\.[0-9]))(?:\.[0-9]+)?(?:{_EXPONENT})?"
)
FENCED = re.compile(r"```[A-Za-z]*[ \t]*\n(.*?)```", re.DOTALL)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class TextRules:
    """What may differ between a text and an answer.

    ``normalize``: as SQuAD does, so case, ASCII punctuation, the articles a, an, the, and white space.
    ``tolerance``: the largest difference between two numbers that are the same.
    """

    ignore_case: bool = False
    ignore_punctuation: bool = False
    normalize: bool = False
    tolerance: float = 0.0

    def plain(self, text: str) -> str:
        if self.normalize:
            return squad_normalized(text)
        if self.ignore_case:
            text = text.lower()
        return (text.translate(_PUNCTUATION) if self.ignore_punctuation else text).strip()


def squad_normalized(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces: in this order, as the official script does."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def compiled(pattern: str, ignore_case: bool = False) -> Any:
    """``Refused`` with the position of the mistake."""
    try:
        return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)
    except regex.error as error:
        place = "" if error.pos is None else f" at position {error.pos}"
        raise Refused(f"the pattern {pattern!r} cannot be read: {error.msg}{place}") from None
    except (ValueError, RecursionError) as error:  # flags that exclude each other, thousands of brackets
        raise Refused(f"the pattern {pattern[:80]!r} cannot be read: {error}") from None


def search(pattern: str, text: str, ignore_case: bool = False) -> Any:
    """The first match or ``None``. ``BadInput`` after ``PATTERN_SECONDS``: a result must not depend on the machine."""
    try:
        return compiled(pattern, ignore_case).search(text, timeout=PATTERN_SECONDS)
    except TimeoutError:
        raise BadInput(
            f"the pattern {pattern!r} took more than {PATTERN_SECONDS:g} s on a text of {len(text)} characters; "
            "write it without nested repetition"
        ) from None
    except MemoryError:
        raise BadInput(f"the pattern {pattern!r} recurs without end; write it without (?R)") from None


def extracted(pattern: str, text: str) -> str | None:
    """The first group that took part in the first match, the whole match without groups, ``None`` without a match."""
    found = search(pattern, text)
    if found is None:
        return None
    groups = [group for group in found.groups() if group is not None]
    return str(groups[0] if groups else found[0])


def numbers(text: str) -> list[Decimal]:
    """Every number of ``text``; thousands may be separated by commas, apostrophes or thin spaces."""
    return [_decimal(found[0]) for found in NUMBER.finditer(text)]


def whole_number(text: str) -> Decimal | None:
    """``text`` as one number, or ``None``."""
    return _decimal(text.strip()) if NUMBER.fullmatch(text.strip()) else None


def _decimal(text: str) -> Decimal:
    return Decimal(re.sub("[,'’\u2009\u202f]", "", text.replace("−", "-")))


def json_object(text: str) -> dict[str, Any] | None:
    """``text``, or its first fenced code block, as a JSON object; ``None`` when it is none."""
    fenced = FENCED.search(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def exact_match(text: str, answer: str, rules: TextRules) -> float:
    return float(rules.plain(text) == rules.plain(answer))


def contains(text: str, answer: str, rules: TextRules) -> float:
    return float(rules.plain(answer) in rules.plain(text))


def regex_found(text: str, answer: str, rules: TextRules) -> float:
    return float(search(answer, text, rules.ignore_case) is not None)


def numeric(text: str, answer: str, rules: TextRules) -> float:
    found, wanted = numbers(text)[-1:], whole_number(answer)
    if not found or wanted is None:
        return 0.0
    try:
        return float(found[0] == wanted or abs(found[0] - wanted) <= Decimal(str(rules.tolerance)))
    except DecimalException:  # beyond any number that one can subtract
        return 0.0


def json_fields(text: str, answer: str, rules: TextRules) -> float:
    found, wanted = json_object(text), json.loads(answer)
    if found is None:
        return 0.0
    right = sum(key in found and _same(found[key], value, rules) for key, value in wanted.items())
    return right / len(wanted)


def token_f1(text: str, answer: str, rules: TextRules) -> float:
    said, wanted = squad_normalized(text).split(), squad_normalized(answer).split()
    if not said or not wanted:  # as SQuAD 2.0
        return float(said == wanted)
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def rouge_l(text: str, answer: str, rules: TextRules) -> float:
    return float(_rouge().score(answer, text)["rougeL"].fmeasure)


METRICS: dict[str, Callable[[str, str, TextRules], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "regex": regex_found,
    "numeric": numeric,
    "json": json_fields,
    "token_f1": token_f1,
    "rouge_l": rouge_l,
}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


def _same(found: Any, wanted: Any, rules: TextRules) -> bool:
    """Equal JSON values; 1 and 1.0 are, 1 and true are not."""
    if isinstance(found, str) and isinstance(wanted, str):
        return rules.plain(found) == rules.plain(wanted)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(
            _same(a, b, rules) for a, b in zip(found, wanted, strict=True)
        )
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[k], wanted[k], rules) for k in wanted)
    if isinstance(found, bool) or isinstance(wanted, bool):
        return found is wanted
    return bool(found == wanted)
