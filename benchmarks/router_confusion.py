"""Does the router find the task of a prompt, and say so when it is of none that was learned?

    python benchmarks/router_confusion.py --data FOLDER --out benchmarks/results/router

Learned: ``mixed-4`` as ``meristem bench`` asks it, and a second set of opinions, SST-2, asked with the very question of
Amazon's. Each task's prototype is of training rows. Asked: test rows of each task, and text of sets that no task is
of, which is ``unknown``. ``raw``: all of it again without the question before the text, in prototypes and prompts alike.

The rule (depth 8, shrinkage 0.5, quantile 0.95) was chosen on other sets: BoolQ, WiC, COPA, QQP, SVAMP, MAWPS, two sets
of short messages; unseen: MBPP, Fed minutes, XSTest, HotpotQA, TRACE's FOMC. Writes FOLDER/router.json, and the
confusion matrix of the rule as PNG and SVG.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
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
TRAIN, TEST, WORDS = 100, 80, 32
SST2 = "task363_sst2_polarity_classification"
UNSEEN = {  # set -> the field that is asked
    "gsm8k": "question",
    "corpus_medical_en": "text",
    "corpus_legal_en": "text",
    "humaneval": "prompt",
    "trace_scienceqa": "prompt",
}
Sets = dict[str, dict[str, list[str]]]  # task -> split -> prompts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: the embedded LLM")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    with model_folder(asked.model) as folder, quiet_libraries():
        engine = load(folder, dtype="float32")
        found = {form: measure(engine, asked.data, form == "asked") for form in ("asked", "raw")}
        found["asked"]["served in bfloat16"] = in_bfloat16(engine, load(folder), asked.data)
        found |= {"times": times(engine, asked.data), "halves of amazon": halves(engine, asked.data)}
    about = {"depth": DEPTH, "shrinkage": SHRINKAGE, "quantile": QUANTILE, "train": TRAIN, "test": TEST}
    (asked.out / "router.json").write_text(json.dumps({"rule": about, **found}, indent=1) + "\n")
    pyplot = import_pyplot()
    with pyplot.rc_context(STYLE):
        saved(picture(pyplot, found["asked"]["rules"][f"prototypes, depth {DEPTH}"]), asked.out, "router")


# ---- prompts ---------------------------------------------------------------------------------------------------


def learned(data: Path, question: bool) -> Sets:
    """Training and test prompts of every task; a test text is in no training prompt."""
    found, feeling = {}, ""
    for task in protocol("mixed-4").tasks:
        rows = {split: texts(data / task.folder / f"{split}.jsonl.gz", "text") for split in ("train", "test")}
        labels = {row["label"] for _, row in read_objects(data / task.folder / "train.jsonl.gz")}
        before = task.question.format(options=", ".join(sorted(labels)))
        feeling = before if task.name == "amazon" else feeling
        found[task.name] = prompts(rows, before if question else "")
    opinions = {
        split: texts(data / "superni15" / f"{split}.jsonl.gz", "input", lambda row: row["task"] == SST2)
        for split in ("train", "test")
    }
    return {**found, "sst2": prompts(opinions, feeling if question else "")}


def unseen(data: Path) -> dict[str, list[str]]:
    return {
        name: sample(texts(data / name / "test.jsonl.gz", field), TEST, 1) for name, field in UNSEEN.items()
    }


def texts(path: Path, field: str, keep: Callable[[Any], bool] = lambda row: True) -> list[str]:
    """Each once, cut as ``mixed-4`` cuts its texts."""
    cut = (" ".join(row[field].split()[:WORDS]) for _, row in read_objects(path) if keep(row))
    return list(dict.fromkeys(cut))


def prompts(rows: dict[str, list[str]], question: str) -> dict[str, list[str]]:
    test = sample(rows["test"], TEST, 1)
    train = sample([text for text in rows["train"] if text not in set(rows["test"])], TRAIN, 0)
    before = f"{question}\n\n" if question else ""
    return {"train": [before + text for text in train], "test": [before + text for text in test]}


def sample(rows: Sequence[str], count: int, seed: int) -> list[str]:
    return random.Random(seed).sample(rows, count)


def featured(engine: Engine, asked: Sequence[str], depth: int) -> Tensor:
    return hidden_features(engine.model, [torch.tensor(encode_prompt(engine, text)) for text in asked], depth)


# ---- rules -----------------------------------------------------------------------------------------------------


def measure(engine: Engine, data: Path, question: bool) -> dict[str, Any]:
    sets, strange = learned(data, question), unseen(data)
    rules: dict[str, Any] = {}
    for depth in (0, DEPTH):
        train = {task: featured(engine, split["train"], depth) for task, split in sets.items()}
        test = {task: featured(engine, split["test"], depth) for task, split in sets.items()}
        other = {name: featured(engine, rows, depth) for name, rows in strange.items()}
        for rule, make in (("cosine", cosine), ("prototypes", prototypes)):
            found = confusion(make(list(train.values())), test, other)
            found["each task as the stranger"] = strangers(make, train, test)
            rules[f"{rule}, depth {depth}"] = found
            print("asked" if question else "raw", rule, depth, found["summary"], flush=True)
    return {"tasks": list(sets), "rules": rules}


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


def in_bfloat16(engine: Engine, served: Engine, data: Path) -> dict[str, float]:
    """Prototypes of the model in float32, prompts through it in bfloat16, as it is served."""
    sets = learned(data, True)
    rule = prototypes([featured(engine, split["train"], DEPTH) for split in sets.values()])
    found = [counts(rule, featured(served, split["test"], DEPTH)) for split in sets.values()]
    asked = TEST * len(sets)
    return {
        "accuracy": round(sum(row[at] for at, row in enumerate(found)) / asked, 4),
        "called unknown wrongly": round(sum(row[-1] for row in found) / asked, 4),
    }


def halves(engine: Engine, data: Path) -> float:
    """Share of Amazon prompts given to the right one of two tasks that are two halves of Amazon: chance is 0.5."""
    split = learned(data, True)["amazon"]
    train, test = (featured(engine, split[name], DEPTH) for name in ("train", "test"))
    rule = prototypes([train[::2], train[1::2]])
    right = [rule(test[at::2], False)[:, at].sum().item() for at in (0, 1)]
    return round(sum(right) / len(test), 4)


def times(engine: Engine, data: Path) -> dict[str, float]:
    """Milliseconds for one batch of 16 prompts of like length, the best of five."""
    asked = sorted(learned(data, True)["agnews"]["test"], key=len)[32:48]
    rows = [torch.tensor(encode_prompt(engine, text)) for text in asked]
    length = min(len(row) for row in rows)
    rows = [row[:length] for row in rows]
    draw = torch.Generator().manual_seed(0)
    width = engine.model.get_input_embeddings().weight.shape[1]
    tasks = {n: pool([summarise(torch.randn(64, width, generator=draw)) for _ in range(n)]) for n in (4, 100)}
    features = hidden_features(engine.model, rows, DEPTH)
    ids = torch.stack(rows)
    timed = {
        f"whole model, {length} tokens": lambda: engine.model(ids, logits_to_keep=1, use_cache=False),
        f"to depth {DEPTH}": lambda: hidden_features(engine.model, rows, DEPTH),
        **{f"weights over {n} tasks": (lambda p=p: p.weigh(features)) for n, p in tasks.items()},
    }
    with torch.no_grad():
        return {name: round(1000 * min(clocked(run) for _ in range(5)), 2) for name, run in timed.items()}


def clocked(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# ---- picture ---------------------------------------------------------------------------------------------------


def picture(pyplot: Any, found: dict[str, Any]) -> tuple[Any, Picture]:
    rows = found["matrix"]
    tasks = list(rows)[: -len(UNSEEN)]
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
        "Row: what is asked, the last five of no task that was learned; column: where the router sends it, in % of "
        f"{TEST} prompts. Bold: right."
    )
    return figure, Picture("confusion", "Tasks told apart", caption)


if __name__ == "__main__":
    main()
