"""Data files: what is read, and every refusal with its file, line and remedy."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meristem.data.formats import fold, normalized_text, prompt_messages, read_rows, shape_of
from meristem.data.overlap import leaks
from meristem.errors import BadInput

PAIR = {"prompt": "q", "completion": "a"}
CHAT = {"messages": [{"role": "user", "content": "Hi  THERE"}, {"role": "assistant", "content": "yes"}]}
TEXT = {"text": "words"}
PREFERENCE = {"prompt": "q", "chosen": "a", "rejected": "b"}


def write(folder, rows, name="d.jsonl"):
    path = folder / name
    body = rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(gzip.compress(body) if name.endswith(".gz") else body)
    return path


@pytest.mark.parametrize(
    ("row", "shape"),
    [(CHAT, "messages"), (PAIR, "prompt-completion"), (TEXT, "text"), (PREFERENCE, "preference")],
)
@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz"])
def test_shapes_and_ids(tmp_path, row, shape, name):
    rows = read_rows(write(tmp_path, [row, {**row, "id": 7, "task": "t", "slice": "s", "label": 3}], name))
    assert shape_of(rows) == shape
    assert rows[0] == {**row, "id": "d-1"}
    assert rows[1] == {**row, "id": "7", "task": "t", "slice": "s", "label": 3}


def test_blank_lines_keep_line_numbers_and_a_byte_order_mark_is_dropped(tmp_path):
    rows = read_rows(write(tmp_path, b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b"}'))
    assert [row["id"] for row in rows] == ["d-1", "d-3"]


def test_prompts_and_normalised_text(tmp_path):
    turn = [{"role": "system", "content": "Be kind."}, *CHAT["messages"]]
    row = {"messages": turn}
    assert prompt_messages(row) == turn[:-1]
    assert normalized_text(row) == "hi there"
    assert normalized_text({"prompt": " Hi\n there"}) == "hi there"
    assert normalized_text({"prompt": turn[:-1]}) == "hi there"
    assert prompt_messages(PAIR) == [{"role": "user", "content": "q"}]
    assert prompt_messages(TEXT) == []
    assert normalized_text(TEXT) == "words"


def m(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


ROW_REFUSALS = [
    ({"text": ""}, '"text" is empty'),
    ({"text": 3}, '"text" must be a string, not a number'),
    ({"prompt": "q"}, "fit no shape; a row is"),
    ({"prompt": "q", "completion": "a", "extra": 1}, "fit no shape"),
    ({"prompt": "q", "completion": "  "}, '"completion" is empty'),
    ({"prompt": "", "completion": "a"}, '"prompt" is empty'),
    ({"prompt": m(("user", "q")), "completion": "a"}, "both be strings"),
    ({"prompt": m(("user", "q")), "completion": m(("user", "a"))}, "must end with an assistant"),
    ({"prompt": m(("user", "q")), "completion": []}, "an empty list"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, '"rejected" is empty'),
    ({"messages": []}, "an empty list"),
    ({"messages": "x"}, "not a string"),
    ({"messages": m(("user", "q"))}, "must end with an assistant"),
    ({"messages": m(("assistant", "q"))}, "no message before"),
    ({"messages": m(("user", "q"), ("assistant", " "))}, "content of message 2"),
    ({"messages": m(("bot", "q"))}, "role 'bot'"),
    ({"messages": [{"role": "user"}]}, '"role", "content"'),
    ({"text": "a", "id": True}, '"id" must be'),
    ({"text": "a", "id": " "}, '"id" must be'),
    ({"text": "a", "task": 1}, '"task" must be a string'),
    ({"text": "a", "label": [1]}, '"label" must be'),
    ({"text": "a", "id": 2**60}, "integer above"),
    ({"text": "a\x00b"}, "NUL"),
    ({"text": "a\ud800"}, "surrogate"),
]


@pytest.mark.parametrize(("row", "message"), ROW_REFUSALS)
def test_row_refusals_name_file_and_line(tmp_path, row, message):
    path = write(tmp_path, [TEXT, row])
    with pytest.raises(BadInput) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


FILE_REFUSALS = [
    (b"", None, "empty"),
    (b"\n\n", None, "empty"),
    (b'{"text": "a"}\n\xff\xfe\n', 2, "not UTF-8 at byte 0"),
    (b'{"text": "a"}\n' * 16 + b"{oops}\n", 17, "not JSON"),
    (b'["text"]\n', 1, "not a JSON object"),
    (b'{"text": "a", "label": NaN}\n', 1, "NaN"),
    (b'{"text": "a", "label": -Infinity}\n', 1, "-Infinity"),
    (b'{"text": "a", "label": 1e999}\n', 1, "not a finite number"),
    (b'{"text": "a", "text": "b"}\n', 1, "'text' stands twice"),
    (b"[" * 100_000 + b"\n", 1, "nested too deeply"),
    (b'{"text": "' + b"a" * (1 << 20) + b'"}\n', 1, "longer than 1 MiB"),
    (b'{"text": "a", "label": ' + b"1" * 5000 + b"}\n", 1, "not JSON"),
    (b'{"text": "a", "id": "x"}\n{"text": "b"}\n{"text": "c", "id": "x"}\n', 3, "already used on line 1"),
    (b'{"text": "a", "id": "d-2"}\n{"text": "b"}\n', 2, "already used on line 1"),
    (b'{"text": "a"}\n{"prompt": "q", "completion": "a"}\n', 2, "line 1 is text; one file holds one shape"),
]


@pytest.mark.parametrize(("body", "line", "message"), FILE_REFUSALS)
def test_file_refusals(tmp_path, body, line, message):
    path = write(tmp_path, body)
    with pytest.raises(BadInput) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert message in str(caught.value)


def test_strings_and_messages_do_not_mix(tmp_path):
    chat = {"prompt": m(("user", "q")), "completion": m(("assistant", "a"))}
    with pytest.raises(BadInput, match=r":2: a prompt-completion \(messages\) row, but line 1 is"):
        read_rows(write(tmp_path, [PAIR, chat]))


def test_missing_wrong_suffix_and_damaged_gzip(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(BadInput, match="no such file"):
        (tmp_path / "folder.jsonl").mkdir()
        read_rows(tmp_path / "folder.jsonl")
    with pytest.raises(BadInput, match=r"not a \.jsonl"):
        read_rows(write(tmp_path, [TEXT], "d.csv"))
    whole = gzip.compress(b'{"text": "a"}\n' * 50)
    for body in (b"no gzip", whole[:-9], whole[:20] + b"\x00\x01" + whole[22:]):
        (tmp_path / "d.jsonl.gz").write_bytes(body)
        with pytest.raises(BadInput, match="damaged gzip"):
            read_rows(tmp_path / "d.jsonl.gz")
    with pytest.raises(BadInput, match="no rows"):
        shape_of([])


def test_leaks_by_normalised_input():
    train = [
        {"id": "a", "prompt": "What is  UP?", "completion": "x"},
        {"id": "b", "messages": m(("system", "s"), ("user", "what is up?"), ("assistant", "y"))},
        {"id": "c", "text": "Topic of: raw"},
        {"id": "d", "prompt": "raw", "completion": "x"},
        {"id": "e", "prompt": "other", "completion": "x"},
    ]
    test = [
        {"id": "1", "prompt": "what is up?"},
        {"id": "2", "messages": m(("user", "Topic of: raw")), "source": "RAW"},
        {"id": "3", "prompt": "unseen"},
    ]
    assert leaks(train, test) == [("a", "1"), ("b", "1"), ("c", "2"), ("d", "2")]


@given(st.lists(st.text(max_size=6)), st.lists(st.text(min_size=1, max_size=6)))
def test_leaks_equal_the_pairwise_definition(train, test):
    rows = [{"id": f"r{i}", "prompt": text, "completion": "x"} for i, text in enumerate(train)]
    items = [{"id": f"t{i}", "prompt": text} for i, text in enumerate(test)]
    pairs = {(r["id"], t["id"]) for r in rows for t in items if fold(r["prompt"]) == fold(t["prompt"]) != ""}
    assert set(leaks(rows, items)) == pairs
