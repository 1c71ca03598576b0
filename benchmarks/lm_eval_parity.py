"""Same answers as lm-evaluation-harness: the same model object, the same items, float32.

    python benchmarks/lm_eval_parity.py --data FOLDER [--model FOLDER] --out benchmarks/results/lm-eval-parity.json

FOLDER holds the sets named in ``SETS`` (``<set>/test.jsonl.gz``). Each set becomes a ``multiple_choice`` task that
lm-eval runs by its own evaluator, once on plain text and once through the chat template, and is scored by
``meristem.engine`` from the same messages. Reported are both accuracies, the items whose choice differs (each with
the margin between the two choices: what differs within float32 rounding is a tie), and the largest difference of a
log-likelihood. In a chat lm-eval counts the line break that ends the prompt to each option, so the log-likelihoods of
an item are compared less that of its first option.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from meristem._quiet import quiet_libraries
from meristem.ecosystem.sources import EMBEDDED, open_source
from meristem.engine.load import Engine, load
from meristem.engine.prompts import encode_options
from meristem.engine.score import score_options

SETS = {
    "mtl5_agnews": "{text}\nTopic:",
    "mtl5_amazon": "{text}\nSentiment:",
    "mtl5_dbpedia": "{text}\nCategory:",
    "arc_challenge": "Question: {question}\nAnswer:",
}
ITEMS = {"mtl5_agnews": 200, "mtl5_amazon": 160, "mtl5_dbpedia": 100, "arc_challenge": 140}
FORMATS = {"text": 1.0, "chat": 0.25}  # share of ITEMS
TIE = 1e-4  # nats


@dataclass(frozen=True)
class Question:
    prompt: str
    options: list[str]
    answer: int


def read_questions(data: Path, name: str, count: int) -> list[Question]:
    """The first ``count`` rows of the test split; a set with ``label`` has its labels as options."""
    with gzip.open(data / name / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    labels = sorted({row["label"] for row in rows if "label" in row})
    return [
        Question(
            SETS[name].format(**row),
            labels or row["choices"],
            labels.index(row["label"]) if labels else int(row["answer"]),
        )
        for row in rows[:count]
    ]


@contextlib.contextmanager
def model_folder(given: Path | None) -> Iterator[Path]:
    """``given``, or the embedded LLM."""
    with open_source(str(given) if given else EMBEDDED) as folder:
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: the embedded LLM")
    parser.add_argument("--share", type=float, default=1.0, help=f"of the items: {ITEMS}")
    parser.add_argument("--batch-size", type=int, default=8, help="lm-eval's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with model_folder(options.model) as folder:
        engine = load(folder, dtype="float32")
        for format, share in FORMATS.items():
            for name, items in ITEMS.items():
                questions = read_questions(options.data, name, max(4, round(items * options.share * share)))
                rows.append(compare(engine, name, format, questions, options.batch_size))
                options.out.write_text(json.dumps(summary(rows), indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in summary(rows).items() if key != "sets"}, indent=1))


def compare(
    engine: Engine, name: str, format: str, questions: list[Question], batch_size: int
) -> dict[str, Any]:
    began = time.perf_counter()
    ours = our_scores(engine, format, questions)
    between = time.perf_counter()
    theirs, accuracy = their_scores(engine, format, questions, batch_size)
    differing, furthest = [], 0.0
    for at, (left, right) in enumerate(zip(ours, theirs, strict=True)):
        furthest = max(
            furthest, *(abs((a - left[0]) - (b - right[0])) for a, b in zip(left, right, strict=True))
        )
        if choice(left) != choice(right):
            margins = [abs(scores[choice(left)] - scores[choice(right)]) for scores in (left, right)]
            differing.append({"item": at, "margins": margins, "tie": min(margins) < TIE})
    row = {
        "set": name,
        "format": format,
        "items": len(questions),
        "options": max(len(question.options) for question in questions),
        "accuracy": sum(choice(s) == q.answer for s, q in zip(ours, questions, strict=True)) / len(questions),
        "lm_eval_accuracy": accuracy,
        "differing_choices": differing,
        "largest_difference_nats": furthest,
        "seconds": round(between - began, 1),
        "lm_eval_seconds": round(time.perf_counter() - between, 1),
    }
    print(json.dumps(row), flush=True)
    return row


def choice(scores: list[float]) -> int:
    """The first of the highest, as the task type ``choice`` and lm-eval's ``acc`` take it."""
    return max(range(len(scores)), key=lambda k: (scores[k], -k))


def our_scores(engine: Engine, format: str, questions: list[Question]) -> list[list[float]]:
    encoded = [encode_options(engine, q.prompt, q.options, format) for q in questions]  # type: ignore[arg-type]
    found = score_options(engine, [context for context, _ in encoded], [options for _, options in encoded])
    return [[score.logprob for score in scores] for scores in found]


def their_scores(
    engine: Engine, format: str, questions: list[Question], batch_size: int
) -> tuple[list[list[float]], float]:
    """Per-item log-likelihoods and lm-eval's own accuracy."""
    from datasets import Dataset
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    rows = [{"prompt": q.prompt, "choices": q.options, "gold": q.answer} for q in questions]
    task = ConfigurableTask(
        config={
            "task": "local",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        }
    )
    model = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=batch_size, device="cpu")
    found = simple_evaluate(
        model=model, tasks=[task], bootstrap_iters=0, apply_chat_template=format == "chat", log_samples=True
    )
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    scores = [[float(logprob) for logprob, _ in sample["filtered_resps"]] for sample in samples]
    return scores, float(found["results"]["local"]["acc,none"])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    items = sum(row["items"] for row in rows)
    differing = [difference for row in rows for difference in row["differing_choices"]]
    return {
        "versions": {name: metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
        "dtype": "float32",
        "items": items,
        "same_choices": 1 - len(differing) / items,
        "same_accuracy": all(abs(row["accuracy"] - row["lm_eval_accuracy"]) < 1e-9 for row in rows),
        "differences_that_are_no_tie": sum(not difference["tie"] for difference in differing),
        "largest_difference_nats": max(row["largest_difference_nats"] for row in rows),
        "sets": rows,
    }


if __name__ == "__main__":
    main()
