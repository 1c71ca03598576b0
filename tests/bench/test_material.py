"""Sources and samples: the same rows for every run, test apart from training, texts cut as declared."""

from __future__ import annotations

import json

import pytest
from tests.bench import tiny_stream

from meristem.bench import dialogues, material, sources
from meristem.bench.material import Sizes
from meristem.bench.protocols import Hub, Task
from meristem.errors import BadInput, EnvironmentFailure

TINY = tiny_stream.TINY


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_texts(data, split):
    task = TINY.task("red")
    return [row["text"] for row in sources.read_split(task, data / task.folder, split, TINY.shape)]


def prepared(data, folder, protocol=TINY, **sizes):
    chosen = Sizes(**{"train": 8, "test": 6, "words": None, **sizes})
    return material.prepare(protocol, sources.sources_of(protocol, data, {}), chosen, folder)


def test_the_sample_is_plain_and_always_the_same(tiny_data, tmp_path):
    first, again = prepared(tiny_data, tmp_path / "1"), prepared(tiny_data, tmp_path / "2")
    assert [m.to_document() for m in first.values()] == [m.to_document() for m in again.values()]
    assert first["red"].to_document()["train_rows"] == 8 and first["red"].dropped == 0
    row = lines(tmp_path / "1/red.train.jsonl")[0]
    assert row["prompt"].startswith("Answer with a digit: 1, 7.\n\nred ") and row["completion"] in "17"
    assert prepared(tiny_data, tmp_path / "3", train=9)["red"].train.digest != first["red"].train.digest


def test_training_rows_that_are_test_items_after_the_cut_are_left_out(tmp_path):
    """Cut to two words, half of the training texts are test items; none of these may be trained on."""
    rows = {
        split: [
            {"text": f"a {n if split == 'test' else n % 8} {split}", "label": f"{n % 2}"} for n in range(16)
        ]
        for split in ("train", "test")
    }
    for name in tiny_stream.ANSWERS:
        (tmp_path / "data" / name).mkdir(parents=True)
        for split, found in rows.items():
            text = "".join(json.dumps(row) + "\n" for row in found)
            (tmp_path / "data" / name / f"{split}.jsonl").write_text(text)
    made = prepared(tmp_path / "data", tmp_path / "in", train=2, words=2)
    tested = {item["text"] for item in lines(tmp_path / "in/red.test.jsonl")}
    trained = {row["prompt"].split("\n\n")[1] for row in lines(tmp_path / "in/red.train.jsonl")}
    assert not tested & trained and made["red"].dropped > 0
    with pytest.raises(BadInput, match=r"task red: training has .* rows, 15 were asked for; ask for fewer"):
        prepared(tmp_path / "data", tmp_path / "in", train=15, words=2)


def test_text_keeps_its_white_space_and_dialogues_their_end(tiny_data, tmp_path):
    assert material._cut({"text": "def f():\n    return 1\n\nx"}, 3) == {"text": "def f():\n    return"}
    row = {
        "prompt": "Human: one two\n\nAssistant: three\n\nHuman: four five six\n\nAssistant:",
        "chosen": "yes of course",
        "rejected": "no",
    }
    user = {"role": "user", "content": "four five six"}
    assert material._cut(row, 2) == {
        "prompt": [{"role": "user", "content": "five six"}],
        "chosen": "yes of",
        "rejected": "no",
    }
    assert material._cut(row, 4)["prompt"] == [user]  # "three" alone would begin with the assistant
    whole = material._cut(row, None)["prompt"]
    assert [turn["role"] for turn in whole] == ["user", "assistant", "user"] and whole[-1] == user
    assert dialogues.messages_of("no transcript") == [{"role": "user", "content": "no transcript"}]
    prepared(tiny_data, tmp_path, tiny_stream.PAIRS)
    pair = lines(tmp_path / "red.train.jsonl")[0]
    assert pair["chosen"][0]["role"] == "assistant" and pair["prompt"][-1]["role"] == "user"
    assert set(lines(tmp_path / "red.test.jsonl")[0]) == {"messages", "chosen", "rejected"}


def test_pairs_that_a_cut_makes_equal_are_left_out():
    row = {"prompt": "p", "chosen": "the same start, then good", "rejected": "the same start, then bad"}
    assert not material._usable(material._cut(row, 3)) and material._usable(material._cut(row, None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "nowhere", "--data .*nowhere: no such folder"),
        (
            lambda d: (d / "empty").mkdir() or d / "empty",
            "empty/red: no such folder; task red needs its train",
        ),
    ],
)
def test_a_missing_folder_is_named(tmp_path, make, message):
    with pytest.raises(BadInput, match=message):
        sources.sources_of(TINY, make(tmp_path), {})


def test_sources_given_one_by_one(tiny_data, tmp_path):
    found = sources.sources_of(TINY, tiny_data, {"red": str(tmp_path), "blue": "hf:org/name:config"})
    assert found == {"red": tmp_path, "blue": Hub("org/name", "config")}
    with pytest.raises(BadInput, match="--task green: tiny-2 has no such task; it has red, blue"):
        sources.sources_of(TINY, tiny_data, {"green": str(tmp_path)})
    with pytest.raises(
        BadInput, match="task red: no public copy is known; give --data FOLDER or --task red="
    ):
        sources.sources_of(TINY, None, {})


def test_damaged_splits_are_named(tmp_path):
    task = Task("red", "red")
    with pytest.raises(BadInput, match=r"no train\.jsonl or train\.jsonl\.gz; task red needs it"):
        sources.read_split(task, tmp_path, "train", "choice")
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": 3}\n')
    with pytest.raises(BadInput, match=r'train.jsonl:1: .*a row needs "label", a string'):
        sources.read_split(task, tmp_path, "train", "choice")


def test_a_data_set_through_the_datasets_library(tmp_path, monkeypatch):
    """A local folder stands in for the hub: ``load_dataset`` reads both alike."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"title": "t", "body": "b", "topic": 4}\n')
    (folder / "test.jsonl").write_text('{"title": "u", "body": "c", "topic": 5}\n')
    hub = Hub(str(folder), text="{title}: {body}", label="topic")
    task = Task("red", "red", hub=hub)
    assert sources.read_split(task, hub, "test", "choice") == [{"text": "u: c", "label": "5"}]
    with pytest.raises(BadInput, match="has no column 'text'"):
        sources.read_split(task, hub, "test", "text")
    with pytest.raises(EnvironmentFailure, match=r"task red: hf:.* cannot be loaded .*--task red=FOLDER"):
        sources.read_split(task, Hub(str(tmp_path / "none")), "test", "text")


def test_development_items_come_from_the_training_rows_that_are_left_out(tiny_data, tmp_path):
    def texts(folder):
        tested = {item["text"] for item in lines(tmp_path / folder / "red.test.jsonl")}
        return tested, {r["prompt"].split("\n\n")[1] for r in lines(tmp_path / folder / "red.train.jsonl")}

    rows = {split: set(all_texts(tiny_data, split)) for split in ("train", "test")}
    prepared(tiny_data, tmp_path / "dev", development=True)
    tested, trained = texts("dev")
    assert tested <= rows["train"] and trained <= rows["train"]
    assert not tested & trained and not tested & rows["test"]
