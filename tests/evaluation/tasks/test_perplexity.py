"""Bits per byte against the definition and against lm-evaluation-harness."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tests.engine.conftest import make_model, make_tokenizer
from tests.evaluation.tasks.conftest import results_of, task_of

from meristem.engine.identity import EngineSettings
from meristem.engine.load import wrap
from meristem.errors import BadInput
from meristem.evaluation.service import summary

TEXTS = ["Grüße, 世界!", "a", "".join(random.Random(0).choices("abcdefgh \n", k=700)), " spaces around "]
ROWS = [{"text": text, "slice": "short" if len(text) < 20 else "long"} for text in TEXTS]


def test_bits_per_byte_follow_the_definition(engine):
    rows = results_of(engine, "perplexity", ROWS[:2])
    for row, text in zip(rows, TEXTS, strict=False):
        ids = torch.tensor(
            [[1, *engine.tokenizer(text)["input_ids"]]]
        )  # 1: end of sequence; there is no beginning
        with torch.no_grad():
            logprobs = engine.model(ids).logits[0, :-1].double().log_softmax(-1)
        nats = -logprobs.gather(1, ids[0, 1:, None]).sum().item()
        assert row["detail"]["bits"] == pytest.approx(nats / math.log(2), rel=1e-6)
        assert row["detail"]["bytes"] == len(text.encode()) == row["detail"]["tokens"]
        assert row["score"] == pytest.approx(-nats / math.log(2) / len(text.encode()), rel=1e-6)
        assert row["unit"] == "bits_per_byte"
        assert (row["prediction"], row["answer"]) == ("", "")


def test_long_texts_score_as_in_lm_evaluation_harness(engine):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    model = huggingface.HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, device="cpu", batch_size=2)
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    theirs = model.loglikelihood_rolling(asked, disable_tqdm=True)
    ours = results_of(engine, "perplexity", ROWS)
    assert [-row["detail"]["bits"] * math.log(2) for row in ours] == pytest.approx(theirs, rel=1e-5)
    assert ours[2]["detail"]["tokens"] == 700 > engine.max_length
    assert "truncated" not in ours[2]["detail"]


def test_a_smaller_window_sees_less(engine):
    [wide], [narrow] = (results_of(engine, "perplexity", ROWS[2:3], window=w) for w in (None, 2))
    assert wide["detail"]["tokens"] == narrow["detail"]["tokens"] == 700
    assert wide["score"] != narrow["score"]
    with pytest.raises(ValueError, match="window"):
        task_of("perplexity", ROWS, window=1)


def test_the_summary_weighs_by_bytes(engine):
    rows = results_of(engine, "perplexity", ROWS)
    total = sum(row["detail"]["bits"] for row in rows) / sum(row["detail"]["bytes"] for row in rows)
    assert summary(rows)["bits_per_byte"] == {"t": pytest.approx(total, abs=1e-6)}
    assert summary(rows)["unit"] == "bits_per_byte"


def test_progress_counts_texts(engine):
    from meristem.evaluation.run import evaluate
    from meristem.evaluation.suites import Suite

    calls = []
    evaluate(engine, Suite("s", (task_of("perplexity", ROWS),)), lambda *call: calls.append(call))
    assert calls[-1] == (4, 4)
    assert all(0 <= done <= 4 for done, _ in calls)


def test_a_tokenizer_without_ends_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    engine = wrap(make_model(), tokenizer, EngineSettings(dtype="float32"))
    with pytest.raises(
        BadInput, match="task 't': item 'i0': the tokenizer has no beginning or end of sequence"
    ):
        results_of(engine, "perplexity", ROWS[:1])
