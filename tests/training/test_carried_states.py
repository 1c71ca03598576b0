"""What an update goes on with of its parent: the state that still fits, and the shape that the adapter has."""

from __future__ import annotations

import pytest

import meristem as ms
from meristem.config import MethodConfig, Recipe
from meristem.ecosystem.records import Asset
from meristem.errors import BadInput
from meristem.training import updates
from meristem.training.method_states import still_fitting
from meristem.training.recipes import settled

STATES = {name: {"tensors": {}, "json": {}} for name in ("ewc", "gpm", "lae", "o-lora", "mer", "gone")}
OTHERS = {"mer", "gone"}  # rows; a method that is no longer installed


@pytest.mark.parametrize(
    ("methods", "adapter", "kept"),
    [
        ([], True, set(STATES)),
        (["ewc"], True, set(STATES)),
        (["o-lora"], True, OTHERS | {"o-lora"}),
        (["param-isolation"], True, OTHERS),
        (["per-task"], True, OTHERS),
        ([], False, OTHERS),
    ],
)
def test_state_of_other_weights_ends_where_they_do(methods, adapter, kept):
    recipe = Recipe(methods=[MethodConfig(name=name) for name in methods])
    assert set(still_fitting(STATES, recipe, adapter)) == kept


def test_all_weights_go_on_with_the_state_of_all_weights():
    assert set(still_fitting(STATES, Recipe(weights="full"), False)) == set(STATES)


def test_a_line_through_methods_that_change_its_adapter(origin, copy):
    """EWC, O-LoRA twice, per-task, O-LoRA: every state is of the adapter beside it, every shape the adapter's own."""
    ws = ms.Workspace.open(copy(origin), actor="kim")
    data = [ws.asset("dataset", "a").digest]

    def settle(parent, *methods, **fields):
        asked = {"methods": methods, "max_steps": 1, "warmup_share": 0.0, "dtype": "float32", **fields}
        return settled(ws.store, Recipe.model_validate(asked), parent)

    def learn(parent, method, **fields):
        recipe = settle(parent, method, **fields)
        entry = updates.open_update(ws.store, "kim", parent=parent, data=data, recipe=recipe)
        made = updates.run(ws.store, "kim", entry)
        state = made.record.assets.get("method-state")
        return made, recipe.lora.rank, Asset.from_document(ws.store.document(state)).facts["methods"]

    o_lora = {"name": "o-lora"}
    first, rank, states = learn(
        ws.version("support@v1"), {"name": "ewc", "arguments": {"samples": 1}}, lora={"rank": 2, "alpha": 4}
    )
    assert (rank, states) == (2, ["ewc"])
    second, rank, states = learn(first, o_lora)
    assert (rank, states) == (2, ["o-lora"])
    third, rank, states = learn(second, o_lora)
    assert (rank, states) == (4, ["o-lora"])  # of the adapter that it began with
    assert settle(third, o_lora).lora == settle(third, o_lora, lora={"rank": 6, "alpha": 12}).lora
    with pytest.raises(BadInput, match=r"recipe\.lora\.rank: 2 asked for, .* adapter has 6"):
        settle(third, o_lora, lora={"rank": 2})
    alone, _, states = learn(third, {"name": "per-task"}, lora={"rank": 3, "alpha": 6})
    assert states == ["per-task"]
    _, rank, states = learn(alone, o_lora)
    assert (rank, states) == (3, ["o-lora", "per-task"])
    ws.close()
