"""One process of ``expert_speed``: an engine that scores or generates whenever it is told to.

Its orders are one JSON argument; every line of its input names a task, and what that took is a JSON document a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.method_cost_worker import peak_kib, tell
from meristem._quiet import quiet_libraries
from meristem.engine.generate import generate
from meristem.engine.load import load
from meristem.engine.prompts import encode_options, encode_prompt
from meristem.engine.score import score_options
from meristem.methods.architecture.experts import of

Row = dict[str, Any]


def main() -> None:
    orders = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    torch.set_num_threads(orders["threads"])
    with quiet_libraries():
        before = resident_mib()
        began, busy = time.perf_counter(), time.process_time()
        engine = load(orders["folder"], base_folder=orders["model"], dtype=orders["dtype"])
        tell(
            answers,
            {
                "load_wall": time.perf_counter() - began,
                "load_cpu": time.process_time() - busy,
                "loaded_mib": resident_mib() - before,
            },
        )
        tasks = {name: prepared(engine, *name.split(), orders) for name in orders["tasks"]}
        for line in sys.stdin:
            began, busy = time.perf_counter(), time.process_time()
            tasks[line.strip()]()
            took = {"wall": time.perf_counter() - began, "cpu": time.process_time() - busy}
            tell(answers, {**took, "peak_kib": peak_kib(), "experts": in_use(engine)})


def prepared(engine: Any, kind: str, which: str, orders: dict[str, Any]) -> Callable[[], Any]:
    """Scores the options of the prompts ``which``, or generates ``new_tokens`` after each."""
    rows: list[Row] = orders["prompts"][which]
    if kind == "score":
        found = [encode_options(engine, row["prompt"], row["options"], "text") for row in rows]
        contexts, options = [context for context, _ in found], [o for _, o in found]
        return lambda: score_options(engine, contexts, options)
    prompts = [encode_prompt(engine, row["prompt"], "text") for row in rows]
    endless = type(engine)(**{**vars(engine), "stop_ids": ()})  # the same number of steps, whatever is said
    return lambda: generate(endless, prompts, max_new_tokens=orders["new_tokens"])


def in_use(engine: Any) -> int:
    """How many experts the latest batch was routed to."""
    attached = of(engine.model)
    return 0 if attached is None or attached.routing is None else len(attached.routing.active)


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
