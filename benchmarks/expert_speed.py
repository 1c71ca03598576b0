"""What a version with many MoE-CL experts costs to serve, beside plain PEFT with one LoRA: time, memory, loading.

    python -m benchmarks.expert_speed --data FOLDER --out benchmarks/results/expert-speed.json

FOLDER holds AG News (test.jsonl.gz with text and label). The experts are random (rank ``--rank`` on every linear layer,
and as far as time goes as good as trained ones); their prototypes are of real prompts, so that the router, which is part of
what is timed, sends every prompt of the set *mixed* to an expert of its own and those of the set *one* to a single
one. Both sides are engines of this project on one base (``meristem.engine.load``), plain PEFT being PEFT's own layers,
with a LoRA of the same rank and with one of twice that, which is what an expert exports to.

All engines are in one process and take turns, piece of work by piece of work and every other round the other way
round, so that what else the machine does meets them alike. A ratio is the median over the rounds, the first left
out; processor time stands beside wall time. Memory is what loading adds to the resident set, and the most that a
piece of work adds to that. Generation ignores stop tokens.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from meristem.ecosystem.sources import open_source
from meristem.engine.generate import generate
from meristem.engine.load import load
from meristem.engine.prompts import encode_options, encode_prompt
from meristem.engine.score import score_options
from meristem.experts_format import CONFIG, WEIGHTS, Document, ExpertEntry, RouterEntry
from meristem.methods.architecture.experts import Expert, of
from meristem.methods.architecture.prototypes import hidden_features
from meristem.methods.architecture.task_experts import state_of
from meristem.store.files import write_file_durably

QUESTION = "\nWhat is this news about: World, Sports, Business, Science or Technology?"
LABELS = ["World", "Sports", "Business", "Science or Technology"]
ALPHA = 16
BASELINE, DOUBLE = "PEFT, rank r", "PEFT, rank 2r"
SIDES = {  # tasks, depth of the router
    "1 task": (1, 8),
    "15 tasks": (15, 8),
    "100 tasks": (100, 8),
    "15 tasks, depth 4": (15, 4),
    "15 tasks, depth 0": (15, 0),
}
WORK = [f"{kind} {which}" for kind in ("score", "generate") for which in ("mixed", "one")]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    base = nullcontext(args.model) if args.model else open_source("embedded")
    with base as model, tempfile.TemporaryDirectory() as scratch:
        prompts = questions(args)
        folders = made(Path(scratch), Path(model), prompts, args)
        found = in_turns(folders, str(model), prompts, args)
    print(table(found))


def arguments() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: the embedded LLM)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=14, help="in each of the two sets, 14 at most")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", nargs="*", default=list(SIDES), help=f"of {list(SIDES)}")
    return parser.parse_args()


def questions(args: Any) -> dict[str, list[dict[str, Any]]]:
    """*one*: like the first one but for its last words, so that they are of one task; *mixed*: different ones."""
    with gzip.open(args.data / "test.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(args.prompts + 1), file, strict=False)]
    words = texts[0].split()
    alike = [" ".join([*words[:-2], f"number {at}"]) for at in range(args.prompts)]
    asked = {"one": alike, "mixed": texts[1:]}
    return {
        which: [{"prompt": text + QUESTION, "options": LABELS} for text in found]
        for which, found in asked.items()
    }


def made(
    scratch: Path, model_folder: Path, prompts: dict[str, list[dict[str, Any]]], args: Any
) -> dict[str, Path]:
    """The folder of each side."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    heads = {id(model.get_output_embeddings())}
    widths = {
        name: (layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and id(layer) not in heads
    }
    rows = [prompts["one"][0], *prompts["mixed"]]
    ids = [torch.tensor(tokenizer(row["prompt"]).input_ids) for row in rows]
    folders = {}
    for side in args.only:
        tasks, depth = SIDES[side]
        folders[side] = scratch / side.replace(" ", "-")
        save_experts(folders[side], widths, hidden_features(model, ids, depth), tasks, depth, args.rank)
    for side, rank in ((BASELINE, args.rank), (DOUBLE, 2 * args.rank)):
        folders[side] = scratch / f"lora-{rank}"
        config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=list(widths), init_lora_weights=False)
        peft = get_peft_model(model, config)
        peft.save_pretrained(folders[side])
        model = peft.unload()
    return {BASELINE: folders.pop(BASELINE), DOUBLE: folders.pop(DOUBLE), **folders}


def save_experts(
    folder: Path, widths: dict[str, tuple[int, int]], features: Tensor, tasks: int, depth: int, rank: int
) -> None:
    """Random experts, the n-th with its prototype at the feature of the n-th prompt (the last ones far from all)."""
    draw = torch.Generator().manual_seed(tasks)
    entry = ExpertEntry(task="shared", rank=rank, alpha=ALPHA, targets=list(widths))
    spread = features.std(0).mean() / 20

    def factors() -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: (
                torch.randn(rank, d_in, generator=draw) / d_in**0.5,
                torch.randn(d_out, rank, generator=draw) / 100,
            )
            for name, (d_in, d_out) in widths.items()
        }

    def expert(at: int) -> Expert:
        far = torch.randn(features.shape[1], generator=draw) * features.std() * 10
        residuals = torch.randn(64, features.shape[1], generator=draw) * spread
        return Expert(
            entry.model_copy(update={"task": f"task {at}", "prompts": 64}),
            factors(),
            features[at].float() if at < len(features) else features[0].float() + far,
            {name: torch.randn(2, generator=draw) for name in widths},
            residuals - residuals.mean(0),
        )

    experts = [expert(at) for at in range(tasks)]
    router = RouterEntry(mode="top-1", metric="mahalanobis", depth=depth, shrinkage=0.5, quantile=None)
    document = Document(
        method="moe-cl", router=router, experts=[e.about for e in experts], shared=entry, gates="static"
    )
    folder.mkdir()
    (folder / CONFIG).write_bytes(document.body())
    shared = Expert(entry, factors(), torch.empty(0))
    save_file(state_of(experts, shared)["tensors"], folder / WEIGHTS)


def in_turns(
    folders: dict[str, Path], model: str, prompts: dict[str, list[dict[str, Any]]], args: Any
) -> dict[str, Any]:
    engines, found = {}, {}
    for side, folder in folders.items():
        gc.collect()
        before = memory("VmRSS")
        took, engines[side] = timed(partial(load, folder, base_folder=model, dtype=args.dtype))
        found[side] = {"load": took, "loaded_mib": round(memory("VmRSS") - before)}
        found[side] |= {work: {"wall": [], "cpu": [], "extra_mib": 0} for work in works(side)}
    for number in range(args.rounds + 1):
        for work in WORK:
            sides = [side for side in engines if work in works(side)]
            for side in sides if number % 2 else sides[::-1]:
                kind, which = work.split()
                before = memory("VmRSS", reset=True)
                took, _ = timed(partial(KINDS[kind], engines[side], prompts[which], args.new_tokens))
                one = found[side][work]
                one["experts"] = in_use(engines[side])
                one["extra_mib"] = max(one["extra_mib"], round(memory("VmHWM") - before))
                if number:
                    for clock, seconds in took.items():
                        one[clock].append(seconds)
        if number:
            keep(args, found)
        print(f"round {number} of {args.rounds}", file=sys.stderr)
    return found


def works(side: str) -> list[str]:
    """The depth of the router is compared on mixed prompts alone."""
    return [work for work in WORK if "depth" not in side or "mixed" in work]


def timed(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    began, busy = time.perf_counter(), time.process_time()
    found = run()
    return {
        "wall": round(time.perf_counter() - began, 4),
        "cpu": round(time.process_time() - busy, 4),
    }, found


def score(engine: Any, rows: list[dict[str, Any]], _: int) -> None:
    encoded = [encode_options(engine, row["prompt"], row["options"], "text") for row in rows]
    score_options(engine, [context for context, _ in encoded], [options for _, options in encoded])


def write(engine: Any, rows: list[dict[str, Any]], new_tokens: int) -> None:
    """The same number of tokens after each prompt, whatever is said."""
    prompts = [encode_prompt(engine, row["prompt"], "text") for row in rows]
    generate(replace(engine, stop_ids=()), prompts, max_new_tokens=new_tokens)


KINDS = {"score": score, "generate": write}


def in_use(engine: Any) -> int:
    """How many experts the latest batch was routed to."""
    attached = of(engine.model)
    return 0 if attached is None or attached.routing is None else len(attached.routing.active)


def memory(kind: str, reset: bool = False) -> float:
    """MiB resident now (VmRSS), or at most (VmHWM) since the last ``reset``."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024


def keep(args: Any, found: dict[str, Any]) -> None:
    names = ("rank", "prompts", "new_tokens", "rounds", "threads", "dtype")
    settings = {**{name: getattr(args, name) for name in names}, "data": args.data.name}
    write_file_durably(
        args.out, (json.dumps({"settings": settings, "sides": found}, indent=1) + "\n").encode()
    )


def ratio(side: dict[str, Any], base: dict[str, Any], work: str, clock: str) -> float:
    pairs = zip(side[work][clock], base[work][clock], strict=True)
    return statistics.median(mine / other for mine, other in pairs)


def table(sides: dict[str, Any]) -> str:
    """Times as multiples of the LoRA of the same rank."""
    lines = ["| | " + " | ".join([*WORK, "loaded MiB", "more at work MiB", "load s"]) + " |"]
    lines.append("|---" * (len(WORK) + 4) + "|")
    for name, side in sides.items():
        cells = [
            " (cpu ".join(f"{ratio(side, sides[BASELINE], work, clock):.2f}" for clock in ("wall", "cpu"))
            + ")"
            if work in side
            else ""
            for work in WORK
        ]
        extra = max(side[work]["extra_mib"] for work in WORK if work in side)
        cells += [str(side["loaded_mib"]), str(extra), f"{side['load']['cpu']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
