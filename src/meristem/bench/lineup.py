"""The runs of a benchmark: method x order x seed, each with everything that decides its result.

Two baselines follow no order: ``per-task`` trains each task alone from the start, ``joint`` all tasks at once. They run
once per seed, whatever the orders. The methods of these names do the same inside one line of updates, task after task;
here they stand for the bounds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from meristem.bench.material import Material
from meristem.bench.protocols import Protocol
from meristem.config import Recipe, resolve_recipe
from meristem.errors import BadInput
from meristem.methods.registry import BEST, parse
from meristem.store.canonical import PREFIX, digest_document

SEQUENTIAL, PER_TASK, JOINT = "sequential", "per-task", "joint"
BASELINES = (SEQUENTIAL, PER_TASK, JOINT)
SEQ_FINETUNE = "seq-finetune"  # the method that has no hook: the same run under another name
NO_ORDER = "any"
SCHEMA = "meristem/bench-run/v1"


@dataclass(frozen=True)
class MethodSpec:
    """``spec`` as it is written in results, e.g. ``experience-replay:ratio=0.3+ewc:strength=50``."""

    spec: str
    methods: tuple[dict[str, Any], ...]

    @property
    def follows_an_order(self) -> bool:
        return self.spec not in (PER_TASK, JOINT)

    @property
    def slug(self) -> str:
        """``spec`` as a part of a file name."""
        return re.sub(r"[^a-z0-9.=+-]+", "_", self.spec.lower())


def read_method(text: str, stage: str) -> MethodSpec:
    """A baseline, a method spec, or several joined by ``+``.

    Raises ``BadInput`` for an unknown name or argument, and for a method that does not work in ``stage``.
    """
    given = re.split(r"\+(?=[A-Za-z])", "".join(text.split()))  # not 1e+3
    parts = [SEQUENTIAL if part == SEQ_FINETUNE else _spelled(_written_out(part)) for part in given]
    spec = "+".join(parts)
    if spec in BASELINES:
        return MethodSpec(spec, ())
    for part in parts:
        if part in BASELINES:
            raise BadInput(f"method '{text}': {part} is a baseline and goes with no other method")
    built = [parse(part) for part in parts]
    for method in built:
        if stage not in method.stages:
            raise BadInput(
                f"method {method.label} works in stages {', '.join(sorted(method.stages))}, not in {stage}"
            )
    return MethodSpec(spec, tuple({"name": m.label, "arguments": m.arguments()} for m in built))


def _written_out(part: str) -> str:
    """``NAME:best`` as the arguments that it stands for today: a result's name outlives a settings file."""
    name, _, rest = part.partition(":")
    if BEST not in rest.split(","):
        return part
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in parse(part).arguments().items())


def _spelled(part: str) -> str:
    """One spelling per method: arguments in order, numbers as short as they go (``strength=50.0`` is ``50``)."""
    name, colon, rest = part.partition(":")
    return (
        name
        + colon
        + ",".join(sorted(re.sub(r"(?<==)[0-9.eE+-]+$", _number, one) for one in rest.split(",")))
    )


def _number(found: re.Match[str]) -> str:
    try:
        return f"{float(found[0]):.12g}"
    except ValueError:
        return found[0]


@dataclass(frozen=True)
class Conditions:
    """What all runs share: the same model, data, engine and code. ``content``: the model's, None while unknown."""

    protocol: Protocol
    materials: Mapping[str, Material]
    model: str
    content: str | None
    words: int | None
    engine: dict[str, Any]
    code: dict[str, str]
    development: bool = False


@dataclass(frozen=True)
class Run:
    """One line of training: ``tasks`` in the order learned (for ``per-task`` and ``joint`` the protocol's)."""

    protocol: str
    order: str
    tasks: tuple[str, ...]
    method: MethodSpec
    seed: int
    recipe: Recipe
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        split = "-dev" if "split" in self.settings else ""
        return f"{self.protocol}{split}-{self.order}-{self.method.slug}-seed{self.seed}"

    @property
    def digest(self) -> str:
        return digest_document(self.settings)

    @property
    def line(self) -> str:
        """The name of its model in the store; other settings give another line."""
        short = re.sub(r"[^a-z0-9._-]+", "-", self.name)[:54].strip("-")
        return f"{short}-{self.digest.removeprefix(PREFIX)[:8]}"


def runs(
    conditions: Conditions,
    methods: Iterable[MethodSpec],
    orders: Mapping[str, tuple[str, ...]],
    seeds: Iterable[int],
    overrides: dict[str, Any],
) -> list[Run]:
    """Every run once, seed by seed, so that a benchmark cut short has whole comparisons."""
    found: dict[str, Run] = {}
    chosen = list(methods)
    for seed in seeds:
        for order, tasks in orders.items():
            for method in chosen:
                run = _run(conditions, method, order, tasks, seed, overrides)
                found.setdefault(run.name, run)
    return list(found.values())


def _run(
    conditions: Conditions,
    method: MethodSpec,
    order: str,
    tasks: tuple[str, ...],
    seed: int,
    overrides: dict[str, Any],
) -> Run:
    protocol = conditions.protocol
    if not method.follows_an_order:
        order, tasks = NO_ORDER, tuple(task.name for task in protocol.tasks)
    own = {"seed": seed, "methods": list(method.methods)}
    recipe = resolve_recipe(protocol.recipe, overrides, own)
    settings = {
        "schema": SCHEMA,
        "protocol": protocol.name,
        "order": order,
        "tasks": list(tasks),
        "words": conditions.words,
        "method": method.spec,
        "seed": seed,
        "recipe": recipe.document(),
        "model": {"source": conditions.model, "content": conditions.content},
        "data": {name: conditions.materials[name].to_document() for name in sorted(tasks)},
        "engine": conditions.engine,
        "code": conditions.code,
    }
    if (
        conditions.development
    ):  # results on test items keep the digest that they had before there was a choice
        settings["split"] = "development"
    return Run(protocol.name, order, tasks, method, seed, recipe, settings)
