"""Best-known settings: a file beside each method, from a folder of development runs.

    meristem bench run mixed-2 --dev --data FOLDER --out DIR --train 60 --test 60 --steps 24 \\
        --method sequential --method ewc:strength=100 --method ewc:strength=1000 ...
    python benchmarks/method_settings.py DIR

Of the specs of one method the one with the highest ACC over the stream is taken (mean over seeds), ties by BWT. That
rule was fixed before the runs. Runs on test items are refused, and so are runs of one folder
under different conditions. Several methods together (``a+b``) are left out: their settings are no method's own.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from meristem.bench import results, summary
from meristem.bench.lineup import BASELINES, SEQUENTIAL
from meristem.errors import BadInput
from meristem.methods.settings import RULE, SCHEMA, FoundBy, MethodSettings, Trial, path_of
from meristem.store.canonical import digest_document

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the --out of the runs")
    args = parser.parse_args()
    for found in settings_of(results.read_all(args.folder)):
        path = path_of(found.method)
        path.write_text(text_of(found), encoding="utf-8")
        print(f"{path}: {found.arguments}")


def settings_of(found: Sequence[Result]) -> list[MethodSettings]:
    """One for each method of which several specs were tried. Raises ``BadInput`` for runs that must not choose."""
    if tested := [result["name"] for result in found if result["settings"].get("split") != "development"]:
        raise BadInput(f"{tested[0]}: measured on test items; settings are chosen with `bench run --dev`")
    groups = {_conditions(result) for result in found}
    if len(groups) > 1:
        raise BadInput(f"{len(groups)} groups of runs under different conditions: keep those of one")
    specs: dict[str, list[Result]] = {}
    for result in found:
        specs.setdefault(result["method"], []).append(result)
    seeds = {spec: sorted(result["seed"] for result in runs) for spec, runs in specs.items()}
    if uneven := [spec for spec in specs if seeds[spec] != seeds[next(iter(specs))]]:
        raise BadInput(f"{uneven[0]}: other seeds than {next(iter(specs))}; run both with the same ones")
    methods: dict[str, list[str]] = {}
    for spec, runs in specs.items():
        used = runs[0]["settings"]["recipe"]["methods"]
        if spec not in BASELINES and len(used) == 1:
            methods.setdefault(used[0]["name"], []).append(spec)
    # One trial chooses nothing.
    return [_settings(name, own, specs) for name, own in sorted(methods.items()) if len(own) > 1]


def _settings(name: str, specs: Sequence[str], runs: dict[str, list[Result]]) -> MethodSettings:
    first = runs[specs[0]][0]
    settings, tried = first["settings"], [_trial(spec, runs[spec]) for spec in sorted(specs)]
    seeds = sorted(result["seed"] for result in runs[specs[0]])
    any_task = settings["data"][first["tasks"][0]]
    found = FoundBy(
        command=_command(first, seeds, tried),
        protocol=settings["protocol"],
        order=settings["order"],
        split="development",
        seeds=seeds,
        model=settings["model"]["source"],
        content=settings["model"]["content"],
        train_rows=any_task["train_rows"],
        items=any_task["test_items"],
        steps=settings["recipe"]["max_steps"],
        libraries=settings["code"],
        rule=RULE,
        sequential=_trial(SEQUENTIAL, runs[SEQUENTIAL]) if SEQUENTIAL in runs else None,
        tried=tried,
    )
    arguments = runs[found.best.method][0]["settings"]["recipe"]["methods"][0]["arguments"]
    return MethodSettings.model_validate(
        {"schema": SCHEMA, "method": name, "arguments": arguments, "found": found}
    )


def text_of(found: MethodSettings) -> str:
    head = "# Made by benchmarks/method_settings.py; docs/methods.md says how settings are chosen and used.\n"
    return head + yaml.safe_dump(found.to_document(), sort_keys=False, width=100)


def _trial(spec: str, runs: Sequence[Result]) -> Trial:
    acc, bwt = (sum(result[key] for result in runs) / len(runs) for key in ("acc", "bwt"))
    return Trial(method=spec, acc=round(acc, 4), bwt=round(bwt, 4))


def _command(result: Result, seeds: Sequence[int], tried: Sequence[Trial]) -> str:
    settings = result["settings"]
    data = settings["data"][result["tasks"][0]]
    words = ["meristem", "bench", "run", settings["protocol"], "--dev", "--orders", settings["order"]]
    words += ["--train", str(data["train_rows"]), "--test", str(data["test_items"])]
    if settings["recipe"]["max_steps"]:
        words += ["--steps", str(settings["recipe"]["max_steps"])]
    if settings["words"]:
        words += ["--words", str(settings["words"])]
    words += ["--seeds", ",".join(map(str, seeds)), "--model", settings["model"]["source"]]
    for trial in tried:
        words += ["--method", trial.method]
    return shlex.join(words) + " --data FOLDER --out DIR"


def _conditions(result: Result) -> str:
    return digest_document({**summary.conditions(result), "order": result["order"]})


if __name__ == "__main__":
    main()
