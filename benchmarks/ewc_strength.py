"""How strong should EWC be? Two demo tasks, judged on held-out *training* rows, never on test items.

    python benchmarks/ewc_strength.py --out benchmarks/results/ewc-strength.json --strengths 0 50 500 1000 5000

Ticket routing is learned once on 240 of its 300 training rows; then order extraction with EWC at each strength.
Both are scored on the 60 rows of each task that were held out. One seed: this picks a default, it proves nothing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from meristem._quiet import quiet_libraries
from meristem.config import Lora, MethodConfig, Recipe
from meristem.data.formats import read_rows
from meristem.demo.story import DATA, TASKS
from meristem.ecosystem.sources import open_source
from meristem.engine.generate import generate
from meristem.engine.load import Engine, load
from meristem.engine.prompts import encode_options, encode_prompt
from meristem.engine.score import score_options
from meristem.training import cit

FIRST, SECOND = TASKS[:2]
TEAMS = ["billing", "shipping", "returns", "technical", "account", "sales"]
HELD_OUT = 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 50, 500, 1000, 5000])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = {t: [{**r, "task": t} for r in read_rows(DATA / f"{t}.train.jsonl")] for t in (FIRST, SECOND)}
    found: dict[str, Any] = {"held_out": HELD_OUT, "seed": 0, "rows": {}}
    with open_source("embedded") as base, tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        first = train(rows[FIRST], base, None, [], {}, Path(scratch) / "first")
        found["rows"]["before"] = scores(first, base, rows)
        for strength in args.strengths:
            method = MethodConfig(name="ewc", arguments={"strength": strength})
            history = {FIRST: rows[FIRST][:-HELD_OUT]}
            second = train(rows[SECOND], first, base, [method], history, Path(scratch) / f"ewc-{strength}")
            found["rows"][f"{strength:g}"] = scores(second, base, rows)
            print(f"{strength:g}", found["rows"][f"{strength:g}"], flush=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")


def train(
    rows: list[dict[str, Any]],
    folder: Path,
    base: Path | None,
    methods: list[MethodConfig],
    history: dict[str, list[dict[str, Any]]],
    out: Path,
) -> Path:
    recipe = Recipe(
        learning_rate=1e-3, epochs=2, lora=Lora(layers=0.5), methods=methods, checkpoint_steps=10**6
    )
    trainer = cit.build_trainer(
        recipe,
        folder=folder,
        base_folder=base,
        rows=rows[:-HELD_OUT],
        history=history,
        method_state=None,
        output=out,
        callbacks=[],
    )
    trainer.train()
    trainer.model.save_pretrained(out / "adapter")
    return out / "adapter"


def scores(adapter: Path, base: Path, rows: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    engine = load(adapter, base_folder=base)
    return {
        FIRST: share(routed(engine, rows[FIRST][-HELD_OUT:]), rows[FIRST][-HELD_OUT:]),
        SECOND: share(extracted(engine, rows[SECOND][-HELD_OUT:]), rows[SECOND][-HELD_OUT:]),
    }


def routed(engine: Engine, rows: list[dict[str, Any]]) -> list[str]:
    encoded = [encode_options(engine, row["prompt"], TEAMS) for row in rows]
    found = score_options(engine, [context for context, _ in encoded], [options for _, options in encoded])
    return [TEAMS[max(range(len(TEAMS)), key=lambda k: scores[k].logprob)] for scores in found]


def extracted(engine: Engine, rows: list[dict[str, Any]]) -> list[str]:
    made = generate(engine, [encode_prompt(engine, row["prompt"]) for row in rows], max_new_tokens=12)
    return [text.text.strip() for [text] in made]


def share(answers: list[str], rows: list[dict[str, Any]]) -> float:
    right = [a == r["completion"][0]["content"] for a, r in zip(answers, rows, strict=True)]
    return round(sum(right) / len(right), 4)


if __name__ == "__main__":
    main()
