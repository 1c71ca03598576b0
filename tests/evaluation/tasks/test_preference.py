"""Margins against the definition, and the sequences against those that DPO trains on."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from tests.engine.conftest import make_model, make_tokenizer
from tests.evaluation.tasks.conftest import results_of, task_of

from meristem.data.jsonl import Refused
from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap
from meristem.errors import BadInput
from meristem.evaluation.tasks.preference import reply_tokens

ROWS = [
    {"prompt": "Say hello", "chosen": "Hello there, friend", "rejected": "No"},
    {"prompt": "2+2?", "chosen": "4", "rejected": "five"},
    {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "chosen": "aa",
        "rejected": "ab",
    },
]


def logprob(engine, prompt, reply):
    ids = engine.tokenizer(prompt + reply, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = len(engine.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logprobs = engine.model(ids).logits[0, :-1].double().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()


@pytest.mark.parametrize("scoring", ["plain", "length"])
def test_margin_and_accuracy(engine, scoring):
    margins = results_of(engine, "preference", ROWS, metric="margin", scoring=scoring)
    shares = results_of(engine, "preference", ROWS, scoring=scoring)
    for margin, share, row in zip(margins, shares, ROWS, strict=True):
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        prompt = engine.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        values = [logprob(engine, prompt, row[key] + "<end>") for key in ("chosen", "rejected")]
        if scoring == "length":
            values = [v / len(row[key]) for v, key in zip(values, ("chosen", "rejected"), strict=True)]
        assert margin["score"] == pytest.approx(values[0] - values[1], rel=1e-4, abs=1e-4)
        assert share["score"] == float(values[0] > values[1])
        assert share["prediction"] == row["chosen" if values[0] > values[1] else "rejected"]
        assert margin["detail"] == share["detail"]
        assert margin["answer"] == row["chosen"]
        assert (margin["unit"], share.get("unit")) == ("nats", None)
    assert {row["score"] for row in shares} == {0.0, 1.0} or scoring == "length"


@pytest.mark.parametrize("chat", [True, False])
def test_the_sequences_are_those_of_trl(tmp_path, chat):
    from trl import DPOConfig, DPOTrainer

    engine = wrap(make_model(), make_tokenizer(chat), EngineSettings(dtype="float32"))
    task = task_of("preference", ROWS[:2])
    if chat:
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                **{key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")},
            }
            for row in ROWS[:2]
        ]
    else:  # as text, an answer follows its prompt after a space
        rows = [
            {"prompt": row["prompt"], **{key: f" {row[key]}" for key in ("chosen", "rejected")}}
            for row in ROWS[:2]
        ]
    trainer = DPOTrainer(
        make_model(),
        ref_model=make_model(),
        args=DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(chat),
    )
    for item, theirs in zip(task.items, trainer.train_dataset, strict=True):
        prompt, [chosen, rejected] = reply_tokens(engine, task, item)
        assert (prompt, chosen, rejected) == tuple(
            theirs[key] for key in ("prompt_ids", "chosen_ids", "rejected_ids")
        )


def test_a_long_prompt_is_refused_or_cut_on_the_declared_side(engine):
    rows = [{**ROWS[1], "prompt": "x" * 300}]
    with pytest.raises(BadInput, match=r"task 't': item 'i0': 3\d\d tokens, but there is room"):
        results_of(engine, "preference", rows)
    [row] = results_of(engine, "preference", rows, {"truncation": "left"})
    assert row["detail"]["truncated"] > 50


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, '"rejected" must be'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, '"chosen" and "rejected" are equal'),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, '"rejected" must be'),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "answer": "b"}, "unknown keys"),
    ],
)
def test_items_that_are_refused(row, message):
    with pytest.raises(Refused, match=message):
        task_of("preference", [row])


def test_rows_are_json(engine):
    rows = results_of(engine, "preference", ROWS)
    assert json.loads(json.dumps(rows)) == rows
