"""The demo's data: right sizes, no leaks, no duplicates, and not solvable by a regular expression or key words."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

import pytest

from meristem.data.formats import normalized_text, read_rows
from meristem.data.overlap import leaks
from meristem.demo.story import DATA, TASKS
from meristem.evaluation.suite_files import load_suite


def texts(task: str, split: str) -> list[tuple[str, str]]:
    """``(message, answer)`` pairs of a split."""
    rows = [json.loads(line) for line in (DATA / f"{task}.{split}.jsonl").read_text().splitlines()]
    if split == "test":
        return [(row["text"], row["answer"]) for row in rows]
    return [(r["prompt"][-1]["content"].split("\n\n", 1)[1], r["completion"][0]["content"]) for r in rows]


@pytest.mark.parametrize("task", TASKS)
def test_sizes_and_no_duplicates(task: str) -> None:
    rows = read_rows(DATA / f"{task}.train.jsonl")
    suite = load_suite(DATA / f"{task}.suite.yaml")
    assert len(rows) == 300
    assert suite.size == 200
    every = [normalized_text(row) for row in rows] + [normalized_text(row) for row in suite.test_rows()]
    assert len(set(every)) == 500


@pytest.mark.parametrize("task", TASKS)
def test_no_test_item_stands_in_training_and_no_six_words_are_shared(task: str) -> None:
    assert (
        leaks(read_rows(DATA / f"{task}.train.jsonl"), load_suite(DATA / f"{task}.suite.yaml").test_rows())
        == []
    )

    def grams(split: str) -> set[tuple[str, ...]]:
        words = [re.findall(r"[a-z0-9']+", text.lower()) for text, _ in texts(task, split)]
        return {tuple(w[i : i + 6]) for w in words for i in range(len(w) - 5)}

    assert not grams("train") & grams("test")


@pytest.mark.parametrize("task", ["ticket-routing", "policy-compliance"])
def test_no_keyword_rule_solves_it(task: str) -> None:
    """The best single word of each message, by its precision on the training rows, is right in under 60 %."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text, answer in texts(task, "train"):
        for word in set(re.findall(r"[a-z']+", text.lower())):
            counts[word][answer] += 1
    rules = {
        word: (best[0][1] / c.total(), best[0][1], best[0][0])
        for word, c in counts.items()
        if (best := c.most_common(1))[0][1] >= 3
    }
    right = 0
    for text, answer in texts(task, "test"):
        found = [rules[w] for w in set(re.findall(r"[a-z']+", text.lower())) if w in rules]
        right += bool(found) and max(found)[2] == answer
    assert right / 200 < 0.60


PATTERNS = [
    r"\b[A-Z]{0,3}-?\d{4,8}[A-Z]?\b",
    r"\b(?=\w*\d)[\w-]{5,9}\b",
    r"(?i)order(?: number| no\.?| #)?\s*[:#]?\s*([\w-]*\d[\w-]*)",
    r"\b\d{5,8}\b",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
def test_no_regular_expression_solves_order_extraction(pattern: str, which: int) -> None:
    right = 0
    for text, answer in texts("order-extraction", "test"):
        found = re.findall(pattern, text)
        right += (found[which] if found else "none") == answer
    assert right / 200 < 0.70


def test_answers_of_order_extraction_are_copied_from_the_message() -> None:
    for split in ("train", "test"):
        for text, answer in texts("order-extraction", split):
            assert answer == "none" or text.count(answer) == 1
