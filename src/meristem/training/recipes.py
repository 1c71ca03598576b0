"""What a recipe leaves open is settled by the version that it continues."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection

from meristem import experts_format
from meristem.config import Lora, MethodConfig, Recipe, resolve_recipe
from meristem.ecosystem import versions
from meristem.ecosystem.folders import ADAPTER_CONFIG, CONFIG, EXPERTS_CONFIG
from meristem.ecosystem.records import Asset, Content
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, Clash
from meristem.methods import clashes
from meristem.methods.base import Method
from meristem.methods.registry import build, load
from meristem.methods.trainers import KNOWN, STAGES
from meristem.store.store import Store


def settled(store: Store, recipe: Recipe, parent: VersionEntry) -> Recipe:
    """``recipe`` with the LoRA and, on the infinite schedule, the phase that training from ``parent`` really has.

    ``BadInput`` where the recipe says otherwise than the line that it continues, or a method cannot be built;
    ``Clash`` for methods that do not go together, or not with the stage.
    """
    methods = [build(method.name, method.arguments) for method in recipe.methods]
    trainer = STAGES[recipe.stage]
    clashes.refuse(methods, trainer, KNOWN[trainer], recipe.stage)
    return _with_schedule(store, _with_lora(store, recipe, parent), parent)


def continued(store: Store, recipe: Recipe, champion: VersionEntry, data: Collection[str]) -> VersionEntry:
    """The version that an update of ``champion`` with ``data`` (digests) trains: as a rule ``champion`` itself.

    One that was annealed for a release is left aside when ``recipe`` goes on with the infinite schedule: training
    continues from the version it was annealed from. ``BadInput`` when that one would miss data of the annealing.
    """
    if recipe.schedule != "infinite" or recipe.phase == "start" or _fresh(recipe):
        return champion
    with store.database.read() as connection:
        parent, annealed_on = champion, set()
        while _was_annealed(store, parent):
            annealed_on |= {*parent.record.data}
            parent = versions.by_digest(connection, parent.record.parents[0])
        learned = {digest for v in versions.ancestors(connection, parent) for digest in v.record.data}
    if missed := annealed_on - learned - {*data}:
        names = ", ".join(sorted(Asset.from_document(store.document(d)).name for d in missed))
        raise BadInput(
            f"{champion.label} was annealed for a release and its data {names} is new in it: schedule infinite goes "
            f"on from {parent.label}, so give {names} again beside the new data, or begin anew with phase: start"
        )
    return parent


def _was_annealed(store: Store, version: VersionEntry) -> bool:
    """By an update of its own line; a model that was added on annealed weights begins a line of its own."""
    made_by = version.record.recipe
    return made_by is not None and Recipe.from_document(store.document(made_by)).phase == "anneal"


def _recipe_of(store: Store, connection: Connection, version: VersionEntry) -> Recipe | None:
    """The recipe that made the weights of ``version``, in its own line or in that of the model it was added from."""
    made = [v for v in versions.ancestors(connection, version) if v.content == version.content]
    recipes = [v.record.recipe for v in made if v.record.recipe]
    return Recipe.from_document(store.document(recipes[0])) if recipes else None


def _with_schedule(store: Store, recipe: Recipe, parent: VersionEntry) -> Recipe:
    """On the infinite schedule a line starts once, and goes on at the constant rate that it started with.

    A fresh adapter always starts: none of its weights has been warmed up.
    """
    if recipe.schedule != "infinite":
        return recipe
    fresh = _fresh(recipe)
    if fresh and recipe.phase in ("continue", "anneal"):
        raise BadInput(
            f"recipe.phase: {recipe.phase} goes on at the rate of weights that are trained already, and method {fresh} "
            "trains a fresh adapter: leave phase out"
        )
    with store.database.read() as connection:
        line = _recipe_of(store, connection, parent)
    held = line.constant_rate if line is not None and line.phase != "anneal" else None
    phase = recipe.phase or ("start" if held is None or fresh else "continue")
    if phase == "start":
        if recipe.constant_rate is None:
            raise BadInput(
                "recipe.constant_rate: missing; schedule infinite cools down to it and holds it from update to "
                "update: give a rate below learning_rate"
            )
        return _checked(recipe, phase=phase, decay_share=None, final_rate=None)
    if held is None:
        raise BadInput(
            f"recipe.phase: {phase} goes on at the constant rate of the parent, and {parent.label} has none: it was "
            "not trained on the infinite schedule, or annealed; begin with phase: start"
        )
    if recipe.constant_rate not in (None, held):
        raise BadInput(
            f"recipe.constant_rate: {recipe.constant_rate} asked for, but {parent.label} is continued, whose line "
            f"holds {held}: leave constant_rate out, or begin anew with phase: start"
        )
    unused = {"warmup_share": 0.0, "cooldown_share": None}
    if phase == "continue":
        unused |= {"decay_share": None, "final_rate": None}
    return _checked(recipe, phase=phase, constant_rate=held, **unused)


def _fresh(recipe: Recipe) -> str | None:
    """The method of ``recipe`` that trains a fresh adapter, if one does."""
    return next((method.name for method in recipe.methods if load(method.name).fresh_adapter), None)


def _checked(recipe: Recipe, **fields: Any) -> Recipe:
    return resolve_recipe(dict(recipe), fields)


def _with_lora(store: Store, recipe: Recipe, parent: VersionEntry) -> Recipe:
    """``recipe`` with the LoRA that training from ``parent`` really has; none where all weights are trained.

    An update continues its parent's adapter, whose shape is fixed: what the recipe leaves out is taken from it,
    and a field that says otherwise is refused (``BadInput``). A method that trains a fresh adapter takes what is
    left out from it as well. On full weights the defaults fill the gaps. Raises ``BadInput`` for a method that cannot
    go on with what ``parent`` is.
    """
    asked = recipe.lora or Lora()
    methods = {method.name: load(method.name) for method in recipe.methods}
    with store.database.read() as connection:
        content = versions.content_of(connection, parent.content)
        if recipe.weights == "full":
            _refuse_other_than_full(store, recipe, content, parent)
            return recipe
        if content.base is None:
            return recipe.model_copy(update={"lora": asked})
        base = versions.content_of(connection, content.base)
        line = _recipe_of(store, connection, parent)
    _refuse_other_kind(store, content, parent, methods)
    layers = _layer_count(store, base)
    where, shape = _shape(store, content)
    lineage = _imported(where, shape, layers)
    if line and line.lora:  # as it was asked for; a method may have made the adapter larger since
        lineage = line.lora.model_copy(update={"rank": lineage.rank, "alpha": lineage.alpha})
    if any(method.fresh_adapter for method in methods.values()):
        own = {field: getattr(asked, field) for field in asked.model_fields_set}
        return recipe.model_copy(update={"lora": lineage.model_copy(update=own)})
    for field in sorted(asked.model_fields_set):
        wanted, has = _comparable(asked, field, layers), _comparable(lineage, field, layers)
        if wanted != has:
            raise BadInput(
                f"recipe.lora.{field}: {getattr(asked, field)!r} asked for, but {parent.label} is continued and its "
                f"adapter has {getattr(lineage, field)!r}: leave {field} out, or start from a version without adapter"
            )
    return recipe.model_copy(update={"lora": lineage})


def _refuse_other_than_full(store: Store, recipe: Recipe, content: Content, parent: VersionEntry) -> None:
    for method in recipe.methods:
        kind = load(method.name)
        if (
            kind.replaces_architecture or kind.fresh_adapter
        ):  # and the version keeps its parent's configuration
            raise Clash(
                f"method {method.name} needs an adapter or rebuilds the model, and weights: full trains it as it is: leave one "
                "of them out"
            )
    if content.kind != "full":
        raise BadInput(
            f"recipe.weights: full trains a version that is full weights, and {parent.label} is of kind {content.kind}: "
            "leave weights out to continue it"
            + (
                ", or `meristem model commit` its merge with the base first"
                if content.kind == "adapter"
                else ""
            )
        )
    if "quantization_config" in _json(store, content, CONFIG):
        raise BadInput(
            f"recipe.weights: full cannot train the quantized weights of {parent.label}: leave weights out, or commit "
            "the model in bf16 first"
        )


def _refuse_other_kind(
    store: Store, content: Content, parent: VersionEntry, methods: dict[str, type[Method]]
) -> None:
    """Experts are gone on with by the method that made them, and by no other; nor does it by anything else."""
    if content.kind == "experts":
        maker = _experts(store, content).method
        if maker not in methods:
            told = f"method {', '.join(methods)}" if methods else "no method"
            raise BadInput(
                f"{parent.label} is a set of experts made by {maker}, and {told} would train past them: "
                f"update it with --method {maker}, or start from a version without experts"
            )
        return
    for name, method in methods.items():
        if method.content == "experts":
            raise BadInput(
                f"method {name} keeps an expert per task, and {parent.label} is one adapter, which would be "
                "dropped: start from a version without adapter"
            )


def _experts(store: Store, content: Content) -> experts_format.Document:
    return experts_format.parse(EXPERTS_CONFIG, store.read_blob(content.files[EXPERTS_CONFIG]))


def maker_of(store: Store, version: VersionEntry) -> MethodConfig | None:
    """The method that alone goes on with ``version``, with its arguments if the line knows them; None for any method."""
    with store.database.read() as connection:
        content = versions.content_of(connection, version.content)
        line = _recipe_of(store, connection, version)
    if content.kind != "experts":
        return None
    name = _experts(store, content).method
    known = [method for method in (line.methods if line else []) if method.name == name]
    return known[0] if known else MethodConfig(name=name)


def _shape(store: Store, content: Content) -> tuple[str, dict[str, Any]]:
    """The adapter that is continued, or the newest expert, as PEFT describes it; and where that stands."""
    if content.kind != "experts":
        return ADAPTER_CONFIG, _json(store, content, ADAPTER_CONFIG)
    last = _experts(store, content).experts[-1]
    newest = {**experts_format.adapter_config(last), "lora_alpha": last.alpha}
    names = newest["target_modules"]
    which = sorted({int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))})
    short = sorted({name.rpartition(".")[2] for name in names})
    return EXPERTS_CONFIG, {**newest, "target_modules": short, "layers_to_transform": which or None}


def _comparable(lora: Lora, field: str, layers: int) -> Any:
    value = getattr(lora, field)
    if field == "layers":
        return math.ceil(layers * value)
    return sorted(value) if isinstance(value, list) else value


def _imported(where: str, config: dict[str, Any], layers: int) -> Lora:
    """The shape of an adapter that was trained elsewhere, from its PEFT configuration."""
    which, targets = config.get("layers_to_transform"), config.get("target_modules")
    count = layers if which is None else len(which) if isinstance(which, list) else 1
    try:
        return Lora(
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=sorted(targets) if isinstance(targets, list) else [str(targets)],
            layers=count / layers,
        )
    except (KeyError, ValueError) as error:
        raise BadInput(f"{where}: not a LoRA that can be continued ({error})") from error


def _layer_count(store: Store, content: Content) -> int:
    config = _json(store, content, CONFIG)
    return int(config.get("text_config", config).get("num_hidden_layers", 1))


def _json(store: Store, content: Content, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read_blob(content.files[name]))
    return found
