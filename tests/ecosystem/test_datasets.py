"""Data sets as assets: a file in, the same rows out, bytes checked."""

from __future__ import annotations

import json

import pytest

from meristem.data.datasets import ROWS_FILE, by_task, load_rows, read_dataset
from meristem.errors import BadInput, Tampered


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def put(store, name, path):
    body, facts = read_dataset(name, path)
    stored = store.put([body])
    with store.transaction("kim") as tx:
        tx.add_blobs(stored)
    return {ROWS_FILE: body.digest}, facts


def test_rows_come_back_with_ids_and_tasks(store, tmp_path):
    rows = [
        {"prompt": "one\u2028line \x85 still", "completion": "\u00e9\u4e2d\U0001f600"},
        {"id": "x", "task": "other", "prompt": "p", "completion": "c\r\n\td"},
    ]
    files, facts = put(store, "tickets", write(tmp_path / "f.jsonl", rows))
    back = load_rows(store, files)
    assert back == [{"id": "f-1", "task": "tickets", **rows[0]}, rows[1]]
    assert {key: facts[key] for key in ("rows", "shape", "tasks")} == {
        "rows": 2,
        "shape": "prompt-completion",
        "tasks": {"other": 1, "tickets": 1},
    }
    assert {task: len(part) for task, part in by_task(back).items()} == {"tickets": 1, "other": 1}


def test_the_same_rows_written_differently_are_the_same_data(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, _ = read_dataset("t", write(tmp_path / "a" / "f.jsonl", [{"text": "\u00e9", "id": "1"}]))
    (tmp_path / "b" / "f.jsonl").write_text('{ "id":"1",  "text":"\u00e9" }', encoding="utf-8")
    two, _ = read_dataset("t", tmp_path / "b" / "f.jsonl")
    assert one.digest == two.digest != read_dataset("u", tmp_path / "b" / "f.jsonl")[0].digest


def test_bad_rows_are_refused_with_their_line(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(BadInput, match=r"f\.jsonl:2: "):
        read_dataset("t", path)


def test_altered_rows_are_never_loaded(store, tmp_path):
    files, _ = put(store, "t", write(tmp_path / "f.jsonl", [{"text": "a"}]))
    (pack,) = store.packs.root.glob("*.safetensors")
    pack.write_bytes(pack.read_bytes().replace(b'"a"', b'"b"'))
    with pytest.raises(Tampered):
        load_rows(store, files)
