"""Where test items stand in training rows: planted overlaps are found with their rows, near misses are not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meristem.data.matching import MOST_ROWS, NEARBY, OverlapSearch, Wanted
from meristem.data.ngrams import COMMON_ITEMS, SHORTEST, NgramIndex, words


def prose(count, seed):
    """Words that no other seed gives."""
    draw = random.Random(seed)
    return [f"w{seed}x{draw.randrange(10**6)}" for _ in range(count)]


def text(count, seed):
    return " ".join(prose(count, seed))


def search(items, rows, n=13):
    found = OverlapSearch(
        [
            item if isinstance(item, Wanted) else Wanted(str(i), "g", (item,), ("yes",))
            for i, item in enumerate(items)
        ],
        n,
    )
    assert found.add("d@v1", rows) == len(rows)
    return {match.item: match for match in found.found().values()}


def row(prompt, completion="no", name="r"):
    return {"id": name, "prompt": prompt, "completion": completion}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ｆｕｌｌ width, and ﬁne", "full WIDTH and fine"),
        ("naïve cafe\u0301: “yes”", "NAÏVE CAFÉ -- 'yes'"),
        ("a\u00a0b\tc\n d", "A, b; (c) d."),
        ("GROSSE Straße", "große strasse"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("snake_case", "snake case"),
        ("don’t", "don't"),
    ],
)
def test_the_same_words_however_they_are_written(one, other):
    if "GROSSE" in one:
        one = one.replace("GROSSE", "große")
    assert words(one) == words(other) != []


def test_scripts_without_spaces_have_a_word_per_character():
    assert words("我爱北京。テスト 2 wörter") == [*"我爱北京テスト", "2", "wörter"]


@given(st.text(st.characters(max_codepoint=127)))
def test_the_quick_way_for_ascii_gives_the_same_words(ascii_text):
    assert words(ascii_text) == words(ascii_text + " é")[:-1]


def brute(items, rows, n):
    """The definition: every window of every text against every window of every row."""

    def grams(some, k):
        return {tuple(some[i : i + k]) for i in range(len(some) - k + 1)}

    found = set()
    for i, item in enumerate(items):
        k = min(n, len(item)) if len(item) >= min(n, SHORTEST) else 0
        for r, some in enumerate(rows):
            if k and grams(item, k) & grams(some, k):
                found.add((r, i))
    return found


few = st.lists(st.sampled_from("abc"), max_size=14)


@settings(max_examples=200, deadline=None)
@given(st.lists(few, min_size=1, max_size=2), st.lists(few, max_size=4), st.sampled_from([3, 5, 9]))
def test_the_index_equals_the_definition(items, rows, n):
    index = NgramIndex(items, ["g"] * len(items), n)
    hits = index.scan(rows)
    assert {(hit.row, hit.text) for hit in hits} == brute(items, rows, n)
    assert (index.matched() <= index.sizes()).all()
    assert [bool(found) for found in index.matched()] == [
        any(hit.text == i for hit in hits) for i in range(len(items))
    ]


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    item = prose(30, 1)
    rows = [
        row(" ".join([*prose(5, 2), *item[4:16], *prose(5, 3)]), name="twelve"),
        row(" ".join([*prose(5, 4), *item[4:17], *prose(5, 5)]), name="thirteen"),
        row(text(12, 6), completion=" ".join(item[20:30]), name="ten"),
    ]
    (match,) = search([" ".join(item)], rows).values()
    assert (match.kind, match.rows, match.answer) == ("ngram", 1, False)
    assert [(first.data, first.row) for first in match.first] == [("d@v1", "thirteen")]
    assert match.share == pytest.approx(1 / 18)  # 30 words have 18 windows of 13
    assert search([" ".join(item)], rows, n=10).keys() == {"0"} and not search([" ".join(item)], rows[:1])


def test_no_n_gram_goes_from_one_row_into_the_next():
    item = prose(20, 1)
    rows = [{"id": "1", "text": " ".join(item[:10])}, {"id": "2", "text": " ".join(item[10:])}]
    assert not search([" ".join(item)], rows)


def test_a_text_shorter_than_n_is_looked_for_as_a_whole():
    item = prose(SHORTEST, 1)
    inside = row(" ".join([*prose(3, 2), *item, "more"]), name="inside")
    cut = row(" ".join([*prose(3, 2), *item[:-1]]), name="cut")
    assert search([" ".join(item)], [cut, inside])["0"].first[0].row == "inside"
    shorter = " ".join(item[1:])  # too few words to mean anything inside a longer text
    assert not search([shorter], [inside])
    assert search([shorter], [row(shorter.upper() + "?!")])["0"].kind == "exact"


def test_signs_count_in_short_texts_and_not_in_long_ones():
    assert not search(["3 + 4"], [row("3 - 4")]) and not search(["3+4=?"], [row("3-4=?")])
    assert search(["What is 3 + 4?"], [row("what is 3 + 4")])["0"].kind == "exact"
    long = text(20, 1)
    assert search([long], [row(long.replace(" ", ", ").upper() + "!")])["0"].kind == "exact"


def test_exact_beats_ngram_and_is_listed_first():
    item = text(20, 1)
    rows = [row(f"{item} and more", name=f"part-{i}") for i in range(9)] + [row(item, name="whole")]
    (match,) = search([item], rows).values()
    assert (match.kind, match.share, match.rows) == ("exact", 1.0, 10)
    assert [first.row for first in match.first] == ["whole", "part-0", "part-1", "part-2", "part-3"]
    assert len(match.first) == MOST_ROWS


@pytest.mark.parametrize(
    ("found", "answer"),
    [
        (lambda item: row(item, "Yes, it is."), True),
        (lambda item: row(item, "no"), False),
        (lambda item: row(f"{item} Answer yes or no.", "no"), False),  # the options are not the answer
        (
            lambda item: {
                "id": "r",
                "messages": [
                    {"role": "user", "content": item},
                    {"role": "assistant", "content": "yes"},
                    {"role": "user", "content": "why?"},
                    {"role": "assistant", "content": "so"},
                ],
            },
            True,
        ),
        (lambda item: {"id": "r", "prompt": item, "chosen": "yes", "rejected": "no"}, True),
        (lambda item: {"id": "r", "prompt": item, "chosen": "no", "rejected": "yes"}, False),
        (lambda item: {"id": "r", "text": f"{item} Yes."}, True),
        (lambda item: {"id": "r", "text": f"Yes. {item} {text(NEARBY + 1, 7)} yes"}, False),
        (
            lambda item: {
                "id": "r",
                "prompt": [{"role": "system", "content": item}, {"role": "user", "content": "go"}],
                "completion": [{"role": "assistant", "content": "yes"}],
            },
            True,
        ),
    ],
)
def test_input_with_its_answer_is_told_from_input_alone(found, answer):
    match = search([text(20, 1)], [found(text(20, 1))])["0"]
    assert match.answer is answer and match.first[0].answer is answer


def test_an_item_without_an_answer_says_so():
    wanted = Wanted("p", "g", (text(20, 1),))
    assert search([wanted], [row(text(20, 1))])["p"].answer is None


def test_what_many_items_share_tells_nothing():
    """An instruction before every item, and a passage under more than ten, are no contamination."""
    instruction, passage = text(20, 1), text(30, 2)
    items = [f"{instruction} {text(20, 100 + i)}" for i in range(8)]
    assert not search(items, [row(instruction), row(f"{instruction} {text(9, 3)}")])
    assert search(items, [row(f"{instruction} {text(20, 103)}")]).keys() == {"3"}
    filler = [Wanted(f"f{i}", "g", (text(20, 300 + i),)) for i in range(60)]
    shared = [
        Wanted(str(i), "g", (f"{passage} {text(5, 200 + i)}",)) for i in range(COMMON_ITEMS + 1)
    ] + filler
    assert not search(shared, [row(passage)])
    assert search(shared[1:], [row(passage)]).keys() == {str(i) for i in range(1, COMMON_ITEMS + 1)}


def test_an_item_of_common_text_alone_is_compared_as_a_whole():
    items = [Wanted(str(i), "g", (text(20, 1),)) for i in range(4)]
    found = OverlapSearch(items)
    assert found.searched() == [False] * 4
    found.add("d@v1", [row(text(20, 1)), row(text(20, 1) + " more")])
    assert [(match.kind, match.rows) for match in found.found().values()] == [("exact", 1)] * 4


def test_the_raw_input_counts_and_not_the_template_around_it():
    template, source = text(20, 1), text(20, 2)
    wanted = Wanted("t", "g", (source, f"{template} {source}"))
    assert not search([wanted], [row(template)])
    assert search([wanted], [row(f"Other words: {source}")])["t"].share == 1.0
    assert search([wanted], [row(f"{template} {source}")])["t"].kind == "exact"


def test_batches_change_nothing(monkeypatch):
    items = [text(20, i) for i in range(5)]
    rows = [row(f"{text(6, 50 + i)} {items[i % 5]}", name=str(i)) for i in range(40)]
    whole, steps = search(items, rows), []
    monkeypatch.setattr("meristem.data.matching._BATCH", 60)
    found = OverlapSearch([Wanted(str(i), "g", (item,), ("yes",)) for i, item in enumerate(items)])
    found.add("d@v1", rows, steps.append)
    assert {match.item: match for match in found.found().values()} == whole
    assert steps == sorted(steps) and steps[-1] == 40 and len(steps) > 10
