"""What a recipe leaves open is settled by the version that it continues."""

from __future__ import annotations

import json
import math
from typing import Any

from meristem.config import Lora, Recipe
from meristem.ecosystem import versions
from meristem.ecosystem.folders import ADAPTER_CONFIG, CONFIG
from meristem.ecosystem.records import Content
from meristem.ecosystem.versions import VersionEntry
from meristem.errors import BadInput, Clash
from meristem.methods.registry import load
from meristem.store.store import Store


def settled(store: Store, recipe: Recipe, parent: VersionEntry) -> Recipe:
    """``recipe`` with the LoRA that training from ``parent`` really has; none where all weights are trained.

    An update continues its parent's adapter, whose shape is fixed: what the recipe leaves out is taken from it,
    and a field that says otherwise is refused (``BadInput``). On full weights the defaults fill the gaps.
    """
    asked = recipe.lora or Lora()
    with store.database.read() as connection:
        content = versions.content_of(connection, parent.content)
        if recipe.weights == "full":
            _refuse_other_than_full(store, recipe, content, parent)
            return recipe
        if content.base is None:
            return recipe.model_copy(update={"lora": asked})
        base = versions.content_of(connection, content.base)
        made = [v for v in versions.ancestors(connection, parent) if v.content == parent.content]
    layers = _layer_count(store, base)
    recipes = [v.record.recipe for v in made if v.record.recipe]
    stored = Recipe.from_document(store.document(recipes[0])).lora if recipes else None
    lineage = stored or _imported(_json(store, content, ADAPTER_CONFIG), layers)
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
        if load(method.name).replaces_architecture:  # and the version keeps its parent's configuration
            raise Clash(
                f"method {method.name} adds to a model or rebuilds it, and weights: full trains it as it is: leave one "
                "of them out"
            )
    if content.kind != "full":
        raise BadInput(
            f"recipe.weights: full trains a version that is full weights, and {parent.label} is of kind {content.kind}: "
            "leave weights out to continue it, or merge it into its base and `meristem model commit` the result first"
        )
    if "quantization_config" in _json(store, content, CONFIG):
        raise BadInput(
            f"recipe.weights: full cannot train the quantized weights of {parent.label}: leave weights out, or commit "
            "the model in bf16 first"
        )


def _comparable(lora: Lora, field: str, layers: int) -> Any:
    value = getattr(lora, field)
    if field == "layers":
        return math.ceil(layers * value)
    return sorted(value) if isinstance(value, list) else value


def _imported(config: dict[str, Any], layers: int) -> Lora:
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
        raise BadInput(f"{ADAPTER_CONFIG}: not a LoRA that can be continued ({error})") from error


def _layer_count(store: Store, content: Content) -> int:
    config = _json(store, content, CONFIG)
    return int(config.get("text_config", config).get("num_hidden_layers", 1))


def _json(store: Store, content: Content, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read_blob(content.files[name]))
    return found
