"""Seconds per optimizer step on the embedded LLM: TRL alone, the seam, and each method on the seam.

    python benchmarks/step_time.py --out benchmarks/results/step-time.json

Batches of 8 rows of the demo's ticket routing, LoRA rank 8 on the top half of the layers, bf16. The variants are
run in turn, `--rounds` times over; the median of the steps (the first of each run left out) is reported, and the
one-time work around training (Fisher estimates) apart from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTTrainer

from meristem._quiet import quiet_libraries
from meristem.config import Lora, MethodConfig, Recipe
from meristem.data.formats import read_rows
from meristem.demo.story import DATA, TASKS
from meristem.ecosystem.sources import open_source
from meristem.engine.load import load_for_training
from meristem.training import cit
from meristem.training.adapters import lora_config

VARIANTS: dict[str, list[MethodConfig] | None] = {
    "TRL SFTTrainer alone": None,
    "seam, no method": [],
    "seam + experience-replay": [MethodConfig(name="experience-replay", arguments={"ratio": 0.3})],
    "seam + ewc": [MethodConfig(name="ewc", arguments={"strength": 50})],
}


class Clock(TrainerCallback):
    """Notes when each step began and ended."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter() - self.begun)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    around: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with open_source("embedded") as folder, quiet_libraries():
        for _ in range(args.rounds):
            for name, methods in VARIANTS.items():
                total, steps = measure(folder, methods, args.steps)
                found[name] += steps[1:]
                around[name].append(total - sum(steps))
    rows = {
        name: {
            "seconds per step": round(statistics.median(steps), 3),
            "one-time seconds": round(statistics.median(around[name]), 2),
            "steps measured": len(steps),
        }
        for name, steps in found.items()
    }
    args.out.write_text(json.dumps({"threads": args.threads, "rows": rows}, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


def measure(folder: Path, methods: list[MethodConfig] | None, steps: int) -> tuple[float, list[float]]:
    """Wall seconds of building and training, and the seconds of each step."""
    rows = [{**row, "task": TASKS[0]} for row in read_rows(DATA / f"{TASKS[0]}.train.jsonl")]
    old = [{**row, "task": TASKS[1]} for row in read_rows(DATA / f"{TASKS[1]}.train.jsonl")]
    recipe = Recipe(max_steps=steps, lora=Lora(layers=0.5), methods=methods or [])
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        started = time.perf_counter()
        if methods is None:
            trainer = plain(recipe, folder, rows, Path(output), clock)
        else:
            trainer = cit.build_trainer(
                recipe,
                folder=folder,
                base_folder=None,
                rows=rows,
                history={TASKS[1]: old},
                method_state=None,
                output=Path(output),
                callbacks=[clock],
            )
        trainer.train()
        return time.perf_counter() - started, clock.steps


def plain(recipe: Recipe, folder: Path, rows: list[dict[str, Any]], output: Path, clock: Clock) -> Any:
    set_seed(recipe.seed)
    model, tokenizer = load_for_training(folder, None, recipe.dtype)
    trainer = SFTTrainer(
        model=get_peft_model(model, lora_config(recipe.lora, model)),
        args=cit.training_arguments(recipe, output),
        train_dataset=Dataset.from_list([cit.as_prompt_completion(row) for row in rows]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


if __name__ == "__main__":
    main()
