"""From what a user asks to the runs, and through them: checked whole before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from meristem.bench import lineup, material, results
from meristem.bench.lineup import Conditions, MethodSpec, Run
from meristem.bench.material import Material, Sizes, Stocked
from meristem.bench.protocols import Hub, Protocol, orders_of, protocol
from meristem.bench.runner import Bench
from meristem.bench.sources import sources_of
from meristem.config import EvaluationSettings, load_recipe, resolve_recipe
from meristem.ecosystem import models
from meristem.ecosystem.sources import EMBEDDED
from meristem.engine.identity import EngineSettings, engine_document
from meristem.errors import BadInput
from meristem.evaluation.service import Evaluator
from meristem.store.store import Store
from meristem.training.updates import code_versions

Progress = Callable[[str, int, int, str], None]
INPUT = "input"


@dataclass(frozen=True)
class Request:
    """A ``bench run`` as it was asked for."""

    protocol: str
    methods: tuple[str, ...] = (lineup.SEQUENTIAL,)
    data: Path | None = None
    tasks: tuple[str, ...] = ()
    orders: tuple[str, ...] = ()
    seeds: tuple[str, ...] = ("0",)
    train: int = 100
    test: int = 100
    model: str = EMBEDDED
    steps: int | None = None
    epochs: float | None = None
    recipe: Path | None = None
    words: int | None = None
    device: str = "cpu"
    development: bool = False


@dataclass(frozen=True)
class Checked:
    """A request that can be carried out, as far as can be known without touching data or model."""

    request: Request
    protocol: Protocol
    methods: list[MethodSpec]
    orders: dict[str, tuple[str, ...]]
    seeds: list[int]
    sources: dict[str, Path | Hub]
    overrides: dict[str, Any]
    sizes: Sizes
    evaluation: EvaluationSettings


def check(request: Request) -> Checked:
    """Raises ``BadInput`` for whatever is unknown, missing or contradicts itself."""
    chosen = protocol(request.protocol)
    overrides = _overrides(request)
    resolved = resolve_recipe(chosen.recipe, overrides)
    if resolved.stage != chosen.stage:
        raise BadInput(f"{request.recipe}: stage {resolved.stage}; {chosen.name} is of stage {chosen.stage}")
    if resolved.methods:
        raise BadInput(f"{request.recipe}: a benchmark's methods are given with --method, not in the recipe")
    words = chosen.words if request.words is None else request.words or None
    return Checked(
        request=request,
        protocol=chosen,
        methods=[lineup.read_method(text, chosen.stage) for text in request.methods],
        orders=orders_of(chosen, list(request.orders)),
        seeds=_seeds(request.seeds),
        sources=sources_of(chosen, request.data, _named(request.tasks)),
        overrides=overrides,
        sizes=Sizes(request.train, request.test, words, request.development),
        evaluation=_evaluation(request.device),
    )


def prepare(checked: Checked, out: Path) -> dict[str, Material]:
    """Every task's rows and items, sampled; their files lie in ``out``."""
    split = "-dev" if checked.sizes.development else ""
    folder = out / INPUT / f"{checked.protocol.name}{split}-{checked.sizes.train}-{checked.sizes.test}"
    return material.prepare(checked.protocol, checked.sources, checked.sizes, folder)


def runs(
    checked: Checked, materials: dict[str, Material], content: str | None, evaluation: EvaluationSettings
) -> list[Run]:
    """``content``: the digest of the base model, None while it is not in the store."""
    if evaluation.device != checked.request.device:
        raise BadInput(
            f"this folder's meristem.yaml evaluates on {evaluation.device}, --device says "
            f"{checked.request.device}; give another --out, or change one of them"
        )
    settings = EngineSettings(
        dtype=evaluation.dtype, device=evaluation.device, batch_tokens=evaluation.batch_tokens
    )
    conditions = Conditions(
        protocol=checked.protocol,
        materials=materials,
        model=_model_name(checked.request.model),
        content=content,
        words=checked.sizes.words,
        development=checked.sizes.development,
        engine=engine_document(settings),
        code=code_versions(),
    )
    return lineup.runs(conditions, checked.methods, checked.orders, checked.seeds, checked.overrides)


def base_content(store: Store, model: str) -> str | None:
    """The digest of the base model if the store has it already."""
    with store.database.read() as connection:
        if _model_name(model) not in {found.name for found in models.all_models(connection)}:
            return None
        return models.versions.resolve(connection, _model_name(model)).content


def execute(
    checked: Checked,
    materials: dict[str, Material],
    out: Path,
    store: Store,
    actor: str,
    evaluator: Evaluator,
    progress: Progress | None,
) -> Iterator[tuple[Run, results.Result, bool]]:
    """Every run with its result, and whether it was there before. What is refused is refused before any training."""
    report = progress or (lambda what, done, total, note: None)
    name = _model_name(checked.request.model)
    base = models.add(
        store,
        actor,
        name,
        "foundation",
        checked.request.model,
        None,
        lambda done, total: report(f"store {name}", done, total, ""),
        lambda done, total: report(f"fetch {name}", done, total, ""),
    )
    planned = runs(checked, materials, base.content, evaluator_settings(evaluator))
    known = {run.name: results.find(out, run) for run in planned}
    stocked: dict[str, Stocked] = {}
    if None in known.values():
        stocked = {task: material.stock(store, actor, found) for task, found in materials.items()}
    bench = Bench(store, actor, base.model, stocked, evaluator, progress)
    for at, run in enumerate(planned):
        report("runs", at, len(planned), run.name)
        found = known[run.name]
        if found is None:
            results.write(out, run, bench.execute(run))
        yield run, found or results.read(results.path_of(out, run)), found is not None
    report("runs", len(planned), len(planned), "")


def evaluator_settings(evaluator: Evaluator) -> EvaluationSettings:
    found = evaluator.settings
    return EvaluationSettings.model_validate(
        {"dtype": found.dtype, "device": found.device, "batch_tokens": found.batch_tokens}
    )


def _overrides(request: Request) -> dict[str, Any]:
    overrides = load_recipe(request.recipe) if request.recipe else {}
    if request.steps is not None and request.epochs is not None:
        raise BadInput("--steps and --epochs both say how long to train; give one")
    if request.steps is not None:
        overrides["max_steps"] = request.steps
    if request.epochs is not None:
        overrides |= {"epochs": request.epochs, "max_steps": None}
    if request.device != "cpu":
        overrides["device"] = request.device
    return overrides


def _evaluation(device: str) -> EvaluationSettings:
    try:
        return EvaluationSettings(device=device)
    except ValidationError as error:
        raise BadInput(f"--device {device}: {error.errors()[0]['ctx']['error']}") from error


def _seeds(texts: tuple[str, ...]) -> list[int]:
    bad = [text for text in texts if not re.fullmatch(r"[0-9]{1,9}", text)]
    if bad or not texts:
        raise BadInput(f"--seeds {', '.join(bad) or 'is empty'}: give whole numbers, e.g. 0,1,2")
    return list(dict.fromkeys(int(text) for text in texts))


def _named(texts: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not (name and equals and source):
            raise BadInput(f"--task {text}: write NAME=FOLDER or NAME=hf:ORG/NAME")
        found[name] = source
    return found


def _model_name(source: str) -> str:
    """The base model's name in the store: ``embedded``, or the folder's name."""
    name = source if source == EMBEDDED else Path(source).resolve().name
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:64] or "base"
