"""What a version with many MoE-CL experts costs to serve, beside plain PEFT with one LoRA: time, memory, loading.

    python -m benchmarks.expert_speed --data FOLDER --out benchmarks/results/expert-speed.json

FOLDER holds AG News (test.jsonl.gz with text and label). The experts are random (rank ``--rank`` on every linear layer,
and as far as time goes as good as trained ones); their prototypes are of real prompts, so that the router, which is part of
what is timed, sends every prompt of the set *mixed* to an expert of its own and those of the set *one* to a single
one. Both sides are engines of this project on one base (``meristem.engine.load``), plain PEFT being PEFT's own layers,
with a LoRA of the same rank and with one of twice that, which is what an expert exports to.

Every side is a process of its own, and they take turns: each does a piece of work while the others wait, then
the other way round, so what else the machine does meets them alike. A ratio is the median over the rounds (the first
left out); processor time stands beside wall time. Sides that the file has are measured again with them all.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.method_cost import heard
from meristem.ecosystem.sources import open_source
from meristem.experts_format import CONFIG, WEIGHTS, Document, ExpertEntry, RouterEntry
from meristem.methods.architecture.experts import Expert
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
    with nullcontext(args.model) if args.model else open_source("embedded") as model:
        with tempfile.TemporaryDirectory() as scratch:
            prompts = questions(args)
            folders = made(Path(scratch), Path(model), prompts, args)
            found = in_turns(folders, str(model), prompts, args)
    settings = {
        name: getattr(args, name) for name in ("rank", "prompts", "new_tokens", "rounds", "threads", "dtype")
    }
    report = {"settings": {**settings, "data": args.data.name}, "sides": found}
    write_file_durably(args.out, (json.dumps(report, indent=1) + "\n").encode())
    print(table(report))


def arguments() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: the embedded LLM)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=14, help="in each of the two sets, 14 at most")
    parser.add_argument("--new-tokens", type=int, default=24)
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
    common = {
        "model": model,
        "threads": args.threads,
        "dtype": args.dtype,
        "new_tokens": args.new_tokens,
        "prompts": prompts,
        "tasks": WORK,
    }
    workers, found = {}, {}
    try:
        for side, folder in folders.items():  # one loads at a time
            workers[side] = worker({**common, "folder": str(folder)})
            found[side] = {**heard(workers[side]), **{work: {"wall": [], "cpu": []} for work in WORK}}
        for number in range(args.rounds + 1):
            for work in WORK:
                for side in list(workers) if number % 2 else list(reversed(workers)):
                    took = heard(workers[side], work)
                    if number:
                        for clock in ("wall", "cpu"):
                            found[side][work][clock].append(round(took[clock], 4))
                    found[side][work]["experts"] = took["experts"]
                    found[side]["peak_mib"] = round(took["peak_kib"] / 1024)
            print(f"round {number} of {args.rounds}", file=sys.stderr)
    finally:
        for process in workers.values():
            process.terminate()
            process.wait()
    return found


def worker(orders: dict[str, Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.expert_speed_worker", json.dumps(orders)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ratio(side: dict[str, Any], base: dict[str, Any], work: str, clock: str) -> float:
    pairs = zip(side[work][clock], base[work][clock], strict=True)
    return statistics.median(mine / other for mine, other in pairs)


def table(report: dict[str, Any]) -> str:
    sides = report["sides"]
    lines = [
        "| | " + " | ".join(WORK) + " | loaded MiB | peak MiB | load s |",
        "|---" * (len(WORK) + 4) + "|",
    ]
    for name, side in sides.items():
        cells = [
            f"{ratio(side, sides[BASELINE], work, 'wall'):.2f} (cpu {ratio(side, sides[BASELINE], work, 'cpu'):.2f})"
            for work in WORK
        ]
        cells += [f"{side['loaded_mib']:.0f}", str(side["peak_mib"]), f"{side['load_cpu']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
