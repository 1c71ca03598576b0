"""What a recipe leaves open is settled by the version that it continues."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from meristem import experts_format
from meristem.config import Lora, Recipe
from meristem.ecosystem import versions
from meristem.ecosystem.folders import ADAPTER_CONFIG, CONFIG, EXPERTS_CONFIG
from meristem.ecosystem.records import Content
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput
from meristem.methods.base import Method
from meristem.methods.registry import load
from meristem.store.store import Store


def settled(store: Store, recipe: Recipe, parent: VersionEntry) -> Recipe:
    """``recipe`` with the LoRA that training from ``parent`` really has.

    An update continues its parent's adapter, whose shape is fixed: what the recipe leaves out is taken from it,
    and a field that says otherwise is refused (``BadInput``). A method that trains a fresh adapter takes what is
    left out from it as well. On full weights the defaults fill the gaps. Raises ``BadInput`` for a method that cannot
    go on with what ``parent`` is.
    """
    asked = recipe.lora or Lora()
    methods = {method.name: load(method.name) for method in recipe.methods}
    with store.database.read() as connection:
        content = versions.content_of(connection, parent.content)
        if content.base is None:
            return recipe.model_copy(update={"lora": asked})
        base = versions.content_of(connection, content.base)
        made = [v for v in versions.ancestors(connection, parent) if v.content == parent.content]
    _refuse_other_kind(store, content, parent, methods)
    layers = _layer_count(store, base)
    recipes = [v.record.recipe for v in made if v.record.recipe]
    stored = Recipe.from_document(store.document(recipes[0])).lora if recipes else None
    lineage = stored or _imported(*_shape(store, content), layers)
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


def _shape(store: Store, content: Content) -> tuple[str, dict[str, Any]]:
    """The adapter that is continued, or the newest expert, as PEFT describes it; and where that stands."""
    if content.kind != "experts":
        return ADAPTER_CONFIG, _json(store, content, ADAPTER_CONFIG)
    newest = experts_format.adapter_config(_experts(store, content).experts[-1])
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
