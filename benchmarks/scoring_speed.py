"""Items per second of option scoring: this engine, lm-evaluation-harness, and the encode-once floor.

    python benchmarks/scoring_speed.py --data FOLDER [--model FOLDER] --out benchmarks/results/scoring-speed.json

The same items (text format, bf16, the same threads), each side in a process of its own, in the order A B B A; medians.
Timed is all that follows loading: from prompts and options as text to scores (tokenization included; lm-eval from
ready ``Instance`` objects, so without its task building). lm-eval runs at the best batch size of ``BATCH_SIZES``,
found on a few of the items first. ``auto`` is left out: on a CPU it tries 512 rows with logits at every position.

The floor is the time that the model's backbone (no head, no mask) needs for the tokens that must be encoded once:
each context, and of each option all tokens but the last, common beginnings once. It is measured as forwards of the
shapes of this engine's batches with the padding taken out: rows x mean length of the batch's rows.
Peak memory is ``ru_maxrss`` of the process.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval_parity import Question, model_folder, read_questions

BATCH_SIZES = (1, 4, 8, 16)
ITEMS = {"mtl5_agnews": 160, "mtl5_dbpedia": 70}
WANTED = {"mtl5_agnews": 1.8, "mtl5_dbpedia": 5.0}
FLOOR = 1.25


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder; default: the embedded LLM")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help=f"of the items: {ITEMS}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with model_folder(options.model) as folder:
        if options.side:
            print(
                json.dumps(SIDES[options.side.split(":")[0]](options, folder, *options.side.split(":")[1:]))
            )
            return
        rows = [measure(options, folder, name) for name in ITEMS]
    report = {
        "versions": {name: metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
        "machine": {"processor": platform.machine(), "threads": options.threads},
        "dtype": "bfloat16",
        "sets": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table(rows)


def measure(options: argparse.Namespace, folder: Path, name: str) -> dict[str, Any]:
    tried = child(options, folder, f"batch-sizes:{name}")
    best = max(tried, key=tried.__getitem__)
    sides = ("ours", "theirs", "theirs", "ours")
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
    for side in sides:
        found[side].append(child(options, folder, f"{side}:{name}:{best}"))
    ours, theirs = (
        {key: statistics.median(run[key] for run in found[side]) for key in found[side][0]} for side in found
    )
    items = count(options, name)
    return {
        "set": name,
        "items": items,
        "options": int(ours["options"]),
        "items_per_second": items / ours["seconds"],
        "lm_eval_items_per_second": items / theirs["seconds"],
        "lm_eval_batch_size": int(best),
        "lm_eval_tried": tried,
        "times_lm_eval": theirs["seconds"] / ours["seconds"],
        "times_lm_eval_wanted": WANTED[name],
        "over_floor": ours["seconds"] / ours["floor"],
        "over_floor_wanted": FLOOR,
        "by_processor_time": {  # what other work on the machine disturbs least
            "times_lm_eval": theirs["cpu_seconds"] / ours["cpu_seconds"],
            "over_floor": ours["cpu_seconds"] / ours["floor_cpu"],
        },
        "floor_tokens": int(ours["floor_tokens"]),
        "floor_tokens_per_second": ours["floor_tokens"] / ours["floor"],
        "peak_mib": ours["peak_mib"],
        "lm_eval_peak_mib": theirs["peak_mib"],
        "runs": found,
    }


def child(options: argparse.Namespace, folder: Path, side: str) -> Any:
    command = [sys.executable, __file__, "--data", options.data, "--model", folder, "--side", side]
    command += ["--threads", options.threads, "--share", options.share]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def count(options: argparse.Namespace, name: str) -> int:
    return max(8, round(ITEMS[name] * options.share))


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(options: argparse.Namespace, folder: Path, name: str, _: str) -> dict[str, float]:
    import torch

    from meristem.engine.load import load
    from meristem.engine.prompts import encode_options
    from meristem.engine.score import score_options

    torch.set_num_threads(options.threads)
    engine = load(folder)
    questions = read_questions(options.data, name, count(options, name))

    def score(part: list[Question]) -> None:
        encoded = [encode_options(engine, q.prompt, q.options, "text") for q in part]
        score_options(engine, [context for context, _ in encoded], [found for _, found in encoded])

    score(questions[:8])
    began, busy = time.perf_counter(), time.process_time()
    score(questions)
    seconds, cpu, memory = time.perf_counter() - began, time.process_time() - busy, peak()
    tokens, floor, floor_cpu = encode_once(engine, questions)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mib": memory,
        "options": len(questions[0].options),
        "floor": floor,
        "floor_cpu": floor_cpu,
        "floor_tokens": tokens,
    }


def encode_once(engine: Any, questions: list[Question]) -> tuple[int, float, float]:
    """Tokens that must be encoded once, and the seconds (wall, processor) that the backbone takes for them."""
    import torch

    from meristem.engine import score
    from meristem.engine.prompts import encode_options
    from meristem.engine.rows import tree_rows

    encoded = [encode_options(engine, q.prompt, q.options, "text") for q in questions]
    rows = tree_rows([(tuple(context), option) for context, found in encoded for option in found])
    batches = score._plan(engine, rows, True).batches
    shapes = [(len(batch), round(sum(rows[at].width for at in batch) / len(batch))) for batch in batches]
    backbone = engine.model.get_decoder()
    with torch.inference_mode():
        backbone(input_ids=torch.randint(100, 9000, shapes[0]), use_cache=False)
        began, busy = time.perf_counter(), time.process_time()
        for shape in shapes:
            backbone(input_ids=torch.randint(100, 9000, shape), use_cache=False)
        return sum(row.width for row in rows), time.perf_counter() - began, time.process_time() - busy


def harness(options: argparse.Namespace, folder: Path, batch_size: int) -> Any:
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(options.threads)
    return HFLM(pretrained=str(folder), dtype="bfloat16", device="cpu", batch_size=batch_size)


def requests(questions: list[Question]) -> list[Any]:
    from lm_eval.api.instance import Instance

    pairs = [(q.prompt, f" {option}") for q in questions for option in q.options]
    return [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]


def theirs(options: argparse.Namespace, folder: Path, name: str, batch_size: str) -> dict[str, float]:
    model = harness(options, folder, int(batch_size))
    questions = read_questions(options.data, name, count(options, name))
    model.loglikelihood(requests(questions[:8]), disable_tqdm=True)
    asked = requests(questions)
    began, busy = time.perf_counter(), time.process_time()
    model.loglikelihood(asked, disable_tqdm=True)
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak()}


def batch_sizes(options: argparse.Namespace, folder: Path, name: str) -> dict[str, float]:
    """lm-eval's items per second at each batch size, on a few items."""
    model = harness(options, folder, 1)
    questions = read_questions(options.data, name, max(4, count(options, name) // 8))
    model.loglikelihood(requests(questions[:4]), disable_tqdm=True)
    found = {}
    for size in BATCH_SIZES:
        model.batch_size_per_gpu = size
        began = time.perf_counter()
        model.loglikelihood(requests(questions), disable_tqdm=True)
        found[str(size)] = len(questions) / (time.perf_counter() - began)
    return found


SIDES: dict[str, Callable[..., Any]] = {"ours": ours, "theirs": theirs, "batch-sizes": batch_sizes}


def table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'set':14} {'options':>7} {'items/s':>8} {'lm-eval':>8} {'times':>6} {'floor x':>8} {'MiB':>6} {'lm-eval':>8}"
    )
    for row in rows:
        print(
            f"{row['set']:14} {row['options']:7} {row['items_per_second']:8.1f} {row['lm_eval_items_per_second']:8.1f} "
            f"{row['times_lm_eval']:6.2f} {row['over_floor']:8.2f} {row['peak_mib']:6.0f} {row['lm_eval_peak_mib']:8.0f}"
        )


if __name__ == "__main__":
    main()
