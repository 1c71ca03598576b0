"""Does the router find the task of a prompt, and say so when it is of none that was learned?

    python benchmarks/router_confusion.py --data FOLDER --out benchmarks/results/router [--development]

Learned: ``mixed-4`` as ``meristem bench`` asks it, and a second set of opinions, SST-2, asked with the very question of
Amazon's. Each task's prototype is of training rows. Asked: test rows of each task, and text of sets that no task is
of, which is ``unknown``. ``raw``: all of it again without the question before the text, in prototypes and prompts alike.
Writes OUT/router.json, and the confusion matrix of the rule as PNG and SVG.

``--development``: the same measurement on the sets that the rule (depth 8, shrinkage 0.5, quantile 0.95) was chosen on,
none of which is among the others, at several depths; writes OUT/development.json.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lm_eval_parity import model_folder
from torch import Tensor
from torch.nn.functional import normalize

from meristem._quiet import quiet_libraries
from meristem.bench.plots.picture import STYLE, Picture, import_pyplot, saved
from meristem.bench.protocols import protocol
from meristem.data.jsonl import read_objects
from meristem.engine.load import Engine, load
from meristem.engine.prompts import encode_prompt
from meristem.methods.architecture.prototypes import (
    QUANTILE,
    SHRINKAGE,
    hidden_features,
    pool,
    summarise,
)

DEPTH = 8
DEVELOPMENT_DEPTHS = (0, 4, DEPTH)
TRAIN, TEST, WORDS = 100, 80, 32
_SUM, _MOOD = "Solve the problem; answer with a number.", "What does the writer feel?"


@dataclass(frozen=True)
class Source:
    """Where prompts lie: a folder's ``field``, of rows whose ``task`` is this one; ``question`` stands before them."""

    folder: str
    field: str
    question: str = ""
    task: str | None = None


def of_bench(data: Path, names: str) -> dict[str, Source]:
    """Tasks as ``meristem bench`` asks them."""
    found = {}
    for task in (protocol("mixed-8").task(name) for name in names.split()):
        labels = {row["label"] for _, row in read_objects(data / task.folder / "train.jsonl.gz")}
        question = task.question.format(options=", ".join(sorted(labels)))
        found[task.name] = Source(task.folder, "text", question)
    return found


def reported(data: Path) -> tuple[dict[str, Source], dict[str, Source]]:
    """What is learned, and what is not."""
    tasks = of_bench(data, "agnews amazon dbpedia mnli")
    feeling = tasks["amazon"].question
    tasks["sst2"] = Source("superni15", "input", feeling, "task363_sst2_polarity_classification")
    return tasks, {
        "gsm8k": Source("gsm8k", "question"),
        "medical": Source("corpus_medical_en", "text"),
        "legal": Source("corpus_legal_en", "text"),
        "humaneval": Source("humaneval", "prompt"),
        "scienceqa": Source("trace_scienceqa", "prompt"),
    }


def development(data: Path) -> tuple[dict[str, Source], dict[str, Source]]:
    """As :func:`reported`, of other sets: with two pairs that are asked alike."""
    return {
        **of_bench(data, "boolq wic copa qqp"),
        "svamp": Source("svamp", "question", _SUM),
        "mawps": Source("mawps", "question", _SUM),
        "sentiment140": Source("superni15", "input", _MOOD, "task1687_sentiment140_classification"),
        "emotion": Source("superni15", "input", _MOOD, "task875_emotion_classification"),
    }, {
        "mbpp": Source("mbpp", "text"),
        "finance": Source("corpus_finance_en", "text"),
        "xstest": Source("xstest", "prompt"),
        "hotpotqa": Source("hotpotqa_closed", "question"),
        "fomc": Source("trace_fomc", "prompt"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: the embedded LLM")
    parser.add_argument("--development", action="store_true", help="the sets that the rule was chosen on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    with model_folder(asked.model) as folder, quiet_libraries():
        engine = load(folder, dtype="float32")
        found: dict[str, Any] = {}
        if asked.development:
            tasks, strange = development(asked.data)
            found |= {"asked": measure(engine, asked.data, tasks, strange, DEVELOPMENT_DEPTHS)}
        else:
            tasks, strange = reported(asked.data)
            plain = {name: replace(source, question="") for name, source in tasks.items()}
            found |= {
                "asked": measure(engine, asked.data, tasks, strange),
                "raw": measure(engine, asked.data, plain, strange),
                "served in bfloat16": in_bfloat16(engine, load(folder), asked.data, tasks),
                "halves of amazon": halves(engine, asked.data, tasks["amazon"]),
                "milliseconds": times(engine, asked.data, tasks["agnews"]),
            }
    about = {"depth": DEPTH, "shrinkage": SHRINKAGE, "quantile": QUANTILE, "train": TRAIN, "test": TEST}
    file = asked.out / ("development.json" if asked.development else "router.json")
    file.write_text(json.dumps({"rule": about, **found}, indent=1) + "\n")
    if not asked.development:
        pyplot = import_pyplot()
        with pyplot.rc_context(STYLE):
            matrix = found["asked"][f"prototypes, depth {DEPTH}"]["matrix"]
            saved(picture(pyplot, matrix, list(tasks)), asked.out, "router")


# ---- prompts ---------------------------------------------------------------------------------------------------


def prompts(data: Path, source: Source, split: str) -> tuple[str, ...]:
    """A sample of the split, cut as ``mixed-4`` cuts its texts; a test text is in no training prompt."""
    before = f"{source.question}\n\n" if source.question else ""
    found = texts(data, source, split)
    if split == "train":
        asked = set(texts(data, source, "test"))
        found = [text for text in found if text not in asked]
    drawn = random.Random(split).sample(found, TRAIN if split == "train" else TEST)
    return tuple(before + text for text in drawn)


def texts(data: Path, source: Source, split: str) -> list[str]:
    """Each once."""
    rows = (row for _, row in read_objects(data / source.folder / f"{split}.jsonl.gz"))
    kept = (row[source.field] for row in rows if source.task in (None, row.get("task")))
    return list(dict.fromkeys(" ".join(text.split()[:WORDS]) for text in kept))


@cache
def featured(engine: Engine, asked: tuple[str, ...], depth: int) -> Tensor:
    return hidden_features(engine.model, [torch.tensor(encode_prompt(engine, text)) for text in asked], depth)


# ---- rules -----------------------------------------------------------------------------------------------------


def measure(
    engine: Engine,
    data: Path,
    tasks: dict[str, Source],
    strange: dict[str, Source],
    depths: Sequence[int] = (0, DEPTH),
) -> dict[str, Any]:
    train = {task: prompts(data, source, "train") for task, source in tasks.items()}
    test = {task: prompts(data, source, "test") for task, source in tasks.items()}
    other = {name: prompts(data, source, "test") for name, source in strange.items()}
    found = {}
    for depth in depths:
        read = [
            {name: featured(engine, asked, depth) for name, asked in part.items()}
            for part in (train, test, other)
        ]
        for name, make in (("cosine", cosine), ("prototypes", prototypes)):
            key = f"{name}, depth {depth}"
            found[key] = confusion(make(list(read[0].values())), read[1], read[2])
            found[key]["each task as the stranger"] = strangers(make, read[0], read[1])
            print(key, found[key]["summary"], flush=True)
    return found


Rule = Callable[[Tensor, bool], Tensor]  # (batch, width), may it be unknown -> weights (batch, tasks)


def prototypes(train: list[Tensor]) -> Rule:
    pooled = pool([summarise(rows) for rows in train])
    return lambda rows, unknown: pooled.weigh(rows, unknown=unknown)


def cosine(train: list[Tensor]) -> Rule:
    """Cosine to the mean direction, as ``param-isolation`` routes; unknown below the 5 % quantile of a task's own."""
    vectors = torch.stack([normalize(normalize(rows, dim=1).mean(0), dim=0) for rows in train])
    least = torch.stack(
        [(normalize(rows, dim=1) @ v).quantile(1 - QUANTILE) for rows, v in zip(train, vectors, strict=True)]
    )

    def weigh(rows: Tensor, unknown: bool) -> Tensor:
        best, which = (normalize(rows, dim=1) @ vectors.T).max(1)
        weights = torch.eye(len(vectors))[which]
        return weights * (best >= least[which])[:, None] if unknown else weights

    return weigh


def confusion(rule: Rule, test: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    """Row: what is asked; column: what it is routed to, the last one ``unknown``. Counts of prompts."""
    rows = {name: counts(rule, found) for name, found in (test | other).items()}
    own = {task: counted[at] for at, (task, counted) in enumerate(zip(test, rows.values(), strict=False))}
    plain = [rule(found, False).argmax(1).eq(at).sum().item() for at, found in enumerate(test.values())]
    asked = sum(len(found) for found in test.values())
    return {
        "summary": {
            "accuracy where nothing is unknown": round(sum(plain) / asked, 4),
            "accuracy": round(sum(own.values()) / asked, 4),
            "called unknown wrongly": round(sum(rows[task][-1] for task in test) / asked, 4),
            "unseen found": round(
                sum(rows[name][-1] for name in other) / sum(len(found) for found in other.values()), 4
            ),
        },
        "matrix": rows,
    }


def counts(rule: Rule, rows: Tensor) -> list[int]:
    weights = rule(rows, True)
    return [*weights.sum(0).int().tolist(), int((weights.sum(1) == 0).sum())]


def strangers(
    make: Callable[[list[Tensor]], Rule], train: dict[str, Tensor], test: dict[str, Tensor]
) -> dict[str, float]:
    """Share called unknown of each task's prompts by the router that never learned it; of the two sets of opinions
    the other one stays learned."""
    return {
        task: round(counts(make([t for name, t in train.items() if name != task]), rows)[-1] / len(rows), 4)
        for task, rows in test.items()
    }


# ---- what else is asked ----------------------------------------------------------------------------------------


def in_bfloat16(engine: Engine, served: Engine, data: Path, tasks: dict[str, Source]) -> dict[str, float]:
    """Prototypes of the model in float32, prompts through it in bfloat16, as it is served."""
    rule = prototypes([featured(engine, prompts(data, each, "train"), DEPTH) for each in tasks.values()])
    found = [counts(rule, featured(served, prompts(data, each, "test"), DEPTH)) for each in tasks.values()]
    asked = TEST * len(tasks)
    return {
        "accuracy": round(sum(row[at] for at, row in enumerate(found)) / asked, 4),
        "called unknown wrongly": round(sum(row[-1] for row in found) / asked, 4),
    }


def halves(engine: Engine, data: Path, source: Source) -> float:
    """Share of prompts given to the right one of two tasks that are two halves of one set: chance is 0.5."""
    train, test = (featured(engine, prompts(data, source, split), DEPTH) for split in ("train", "test"))
    rule = prototypes([train[::2], train[1::2]])
    right = [rule(test[at::2], False)[:, at].sum().item() for at in (0, 1)]
    return round(sum(right) / len(test), 4)


def times(engine: Engine, data: Path, source: Source) -> dict[str, float]:
    """For one batch of 16 prompts of equal length, the best of five."""
    asked = sorted(prompts(data, source, "test"), key=len)[32:48]
    rows = [torch.tensor(encode_prompt(engine, text)) for text in asked]
    length = min(len(row) for row in rows)
    rows = [row[:length] for row in rows]
    draw = torch.Generator().manual_seed(0)
    width = engine.model.get_input_embeddings().weight.shape[1]
    tasks = {n: pool([summarise(torch.randn(64, width, generator=draw)) for _ in range(n)]) for n in (4, 100)}
    features = hidden_features(engine.model, rows, DEPTH)
    ids = torch.stack(rows)
    timed: dict[str, Callable[[], Any]] = {
        f"whole model, {length} tokens": lambda: engine.model(ids, logits_to_keep=1, use_cache=False),
        f"to depth {DEPTH}": lambda: hidden_features(engine.model, rows, DEPTH),
        **{f"weights over {n} tasks": partial(pooled.weigh, features) for n, pooled in tasks.items()},
    }
    with torch.no_grad():
        return {name: round(1000 * min(clocked(run) for _ in range(5)), 2) for name, run in timed.items()}


def clocked(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# ---- picture ---------------------------------------------------------------------------------------------------


def picture(pyplot: Any, rows: dict[str, list[int]], tasks: list[str]) -> tuple[Any, Picture]:
    shares = [[count / sum(row) for count in row] for row in rows.values()]
    figure, axis = pyplot.subplots(figsize=(5.6, 6.4))
    axis.imshow(shares, cmap="Blues", vmin=-0.1, vmax=1, aspect="auto")
    for y, row in enumerate(shares):
        right = y if y < len(tasks) else len(tasks)
        for x, share in enumerate(row):
            axis.text(
                x,
                y,
                f"{100 * share:.0f}" if share else "·",
                ha="center",
                va="center",
                fontsize=9,
                color="#ffffff" if share > 0.5 else "#1b2733",
                weight="bold" if x == right else "normal",
            )
    axis.set_xticks(range(len(tasks) + 1), [*tasks, "unknown"], rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axis.set_xlabel("routed to")
    axis.set_ylabel("asked")
    axis.grid(False)
    axis.tick_params(length=0)
    axis.axhline(len(tasks) - 0.5, color="#ffffff", lw=4)
    axis.axvline(len(tasks) - 0.5, color="#ffffff", lw=4)
    for side in axis.spines.values():
        side.set_visible(False)
    caption = (
        "Row: what is asked, below the line text of no task that was learned; column: where the router sends it, in % of "
        f"{TEST} prompts. Bold: right."
    )
    return figure, Picture("confusion", "Tasks told apart", caption)


if __name__ == "__main__":
    main()
