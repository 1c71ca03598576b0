"""Stage ``cit``: what is refused once the rows are tokenized."""

from __future__ import annotations

import pytest
from tests import acme
from tests.tiny import tiny_model

from meristem.config import MethodConfig, Recipe
from meristem.errors import BadInput
from meristem.training import cit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def build(model, folder, rows, history=None, **settings):
    recipe = Recipe(dtype="float32", batch_size=4, max_steps=1, **settings)
    return cit.build_trainer(
        recipe,
        folder=model,
        base_folder=None,
        rows=[{"task": "a", **row} for row in rows],
        history=history or {},
        method_state=None,
        output=folder,
        callbacks=[],
    )


def test_rows_that_would_be_cut_are_refused_by_id(model, tmp_path):
    """The limit is exact: the longest row (chat template included) is the number that the message asks for."""
    rows = acme.training_rows("a")
    rows[3]["prompt"], rows[5]["prompt"] = "A" * 60, "A" * 70
    found = build(model, tmp_path, rows).train_dataset
    lengths = {name: len(ids) for name, ids in zip(found["id"], found["input_ids"], strict=True)}
    longest = lengths["a-fig"]
    named = rf"2 rows .* max_length 64, .*: a-dam \({lengths['a-dam']} tokens\), a-fig \({longest} tokens\); raise"
    with pytest.raises(BadInput, match=rf"{named} max_length in the recipe to {longest}, or"):
        build(model, tmp_path, rows, max_length=64)
    with pytest.raises(BadInput, match=r"1 rows .*: a-fig "):
        build(model, tmp_path, rows, max_length=longest - 1)
    trainer = build(model, tmp_path, rows, max_length=longest)
    assert len(trainer.train_dataset) == len(rows) and trainer.args.max_length == longest


def test_three_ids_are_named_at_most(model, tmp_path):
    with pytest.raises(BadInput, match=r"16 rows .*: a-ash \(.*, a-bay \(.*, a-cod \(\d+ tokens\), \.\.\.; "):
        build(model, tmp_path, acme.training_rows("a"), max_length=8)


def test_replayed_rows_are_held_to_the_same_limit(model, tmp_path):
    old = [{"id": "old", "task": "z", "prompt": "Z" * 90, "completion": "1"}]
    replay = [MethodConfig(name="experience-replay", arguments={"ratio": 0.5})]
    with pytest.raises(BadInput, match=r"1 rows .*: old \("):
        build(model, tmp_path, acme.training_rows("a"), {"z": old}, max_length=64, methods=replay)
    assert build(model, tmp_path, acme.training_rows("a"), {"z": old}, max_length=64)  # not replayed
