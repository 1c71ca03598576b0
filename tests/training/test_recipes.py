"""The LoRA of a recipe is the one that training really has: settled by the version that is continued."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint
from typing import get_args

import pytest
import torch
from tests import acme

import meristem as ms
from meristem.config import Lora, MethodConfig, Recipe, resolve_recipe
from meristem.ecosystem import checkouts, versions
from meristem.ecosystem.records import Plan
from meristem.errors import BadInput, MeristemError
from meristem.methods import Method, registry
from meristem.methods.trainers import STAGES
from meristem.training.adapters import trainable_model
from meristem.training.recipes import settled

SMALL = {"rank": 4, "alpha": 4, "layers": 0.5, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def small(origin, tmp_path_factory):
    """``support@v2`` carries an adapter with other than the default values."""
    import shutil

    folder = tmp_path_factory.mktemp("small") / "ws"
    shutil.copytree(origin, folder)
    ws = ms.Workspace.open(folder, actor="kim")
    ws.update("support", data=["a"], recipe={"max_steps": 2, "lora": SMALL})
    yield ws
    ws.close()


def test_on_full_weights_the_defaults_fill_the_gaps(small):
    first = small.version("support@v1")
    assert settled(small.store, Recipe(), first).lora == Lora()
    assert settled(small.store, Recipe(lora=Lora(rank=2)), first).lora == Lora(rank=2)


def test_what_a_recipe_leaves_out_is_as_in_the_lineage(small):
    second = small.version("support@v2")
    for asked in (
        {},
        {"lora": {}},
        {"lora": {"rank": 4}},
        {"lora": SMALL},
        {"lora": {**SMALL, "layers": 0.3}},
    ):
        assert settled(small.store, Recipe.model_validate(asked), second).lora == Lora(**SMALL)


@pytest.mark.parametrize(
    ("field", "value", "has"),
    [
        ("rank", 8, 4),
        ("alpha", 16, 4),
        ("layers", 1.0, 0.5),
        ("targets", "all-linear", r"\['q_proj', 'v_proj'\]"),
        ("dropout", 0.1, 0.0),
    ],
)
def test_a_field_that_the_adapter_cannot_follow_is_refused_with_both_values(small, field, value, has):
    asked = Recipe(lora=Lora(**{field: value}))
    with pytest.raises(BadInput, match=rf"recipe\.lora\.{field}: '?{value}'? asked for, .*@v2 .* has {has}"):
        settled(small.store, asked, small.version("support@v2"))


def test_an_adapter_from_elsewhere_is_read_from_its_own_configuration(small, tmp_path):
    folder = small.checkout("support@v2", tmp_path / "adapter").folder
    imported = small.add_model("mail", tier="application", base="support", source=str(folder))
    assert imported.record.recipe is None
    assert settled(small.store, Recipe(), imported).lora == Lora(**SMALL)
    same = small.add_model("chat", tier="application", base="support@v2")
    assert settled(small.store, Recipe(lora=Lora(**SMALL)), same).lora == Lora(**SMALL)


def test_the_plan_stores_what_was_settled_and_refuses_before_anything_is_stored(released, copy):
    folder = copy(released)
    ws = ms.Workspace.open(folder, actor="kim")
    before = acme.state(folder)
    with pytest.raises(BadInput, match=r"recipe\.lora\.rank: 4 asked for, but support@v2"):
        ws.update("support", data=["b"], recipe={"lora": {"rank": 4}})
    assert acme.state(folder) == before
    ws.signal("new-data", "support", data=["b"])
    recipe = ws.store.document(ws.plan("support").as_(Plan).recipe)
    assert recipe["lora"] == Lora().model_dump()
    ws.close()


@pytest.mark.parametrize(
    ("methods", "stage", "says"),
    [
        ([{"name": "o-lora"}], "ca", "o-lora works in stages cit, cpt, not in ca"),
        ([{"name": "joint"}, {"name": "ewc"}], "cit", "joint is a baseline"),
        ([{"name": "ewc", "arguments": {"strenght": 1}}], "cit", "no argument 'strenght'"),
    ],
)
def test_methods_that_cannot_work_are_refused_before_anything_is_stored(released, copy, methods, stage, says):
    folder = copy(released)
    before = acme.state(folder)
    ws = ms.Workspace.open(folder, actor="kim")
    with pytest.raises(MeristemError, match=says):
        ws.update("support", data=["b"], recipe={"methods": methods, "stage": stage})
    ws.close()
    assert acme.state(folder) == before


def test_stages_train_with_what_their_methods_are_checked_against():
    for stage, name in STAGES.items():
        assert hasattr(import_module(f"meristem.training.{stage}"), name)
    assert STAGES.keys() == set(get_args(Recipe.model_fields["stage"].annotation))


class Anew(Method):
    name = "anew"
    fresh_adapter = True


def test_a_method_may_ask_for_a_fresh_adapter_on_the_base(small, monkeypatch):
    """Of any shape, else of the lineage's; nothing of the version's own adapter is in it."""
    entry = EntryPoint("anew", f"{__name__}:Anew", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    asked = Recipe(methods=[MethodConfig(name="anew")])
    assert settled(small.store, asked, small.version("support@v2")).lora == Lora(**SMALL)
    recipe = resolve_recipe(
        {"methods": [{"name": "anew"}], "lora": {"rank": 3}, "max_steps": 1, "max_length": 64}
    )
    recipe = settled(small.store, recipe, small.version("support@v2"))
    assert recipe.lora == Lora(**{**SMALL, "rank": 3})
    with small.store.database.read() as connection:
        parent = versions.resolve(connection, "support@v2")
        base = versions.content_of(connection, parent.content).base
    here = checkouts.cached(small.store, parent.content)
    fresh, tokenizer = trainable_model(recipe, here.folder, here.base_folder, fresh=True)
    alone, _ = trainable_model(recipe, checkouts.cached(small.store, base).folder, None)
    torch.testing.assert_close(fresh.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert fresh.peft_config["default"].r == 3 and tokenizer.chat_template
    continued, _ = trainable_model(recipe, here.folder, here.base_folder)
    assert continued.peft_config["default"].r == 4
