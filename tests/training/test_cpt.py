"""Stage ``cpt``: every token of every text is trained on, in rows of at most ``max_length``."""

from __future__ import annotations

import pytest
from tests.tiny import tiny_model

from meristem.config import MethodConfig, Recipe, resolve_recipe
from meristem.errors import BadInput
from meristem.training import cpt

ROWS = [{"id": f"t{n}", "task": "law", "text": f"Section {n}. " + "abc " * n} for n in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def build(model, output, *, rows=ROWS, history=None, **settings):
    recipe = Recipe(stage="cpt", dtype="float32", batch_size=4, max_steps=2, max_length=16, **settings)
    return cpt.build_trainer(
        recipe,
        folder=model,
        base_folder=None,
        rows=rows,
        history=history or {},
        method_state=None,
        output=output,
        callbacks=[],
    )


def test_a_long_text_becomes_rows_that_hold_all_of_it(model, tmp_path):
    trainer = build(model, tmp_path)
    tokenizer = trainer.processing_class
    found: dict[str, list[int]] = {}
    for name, tokens in zip(trainer.train_dataset["id"], trainer.train_dataset["input_ids"], strict=True):
        assert len(tokens) <= 16
        found.setdefault(name, []).extend(tokens)
    ends = tokenizer.eos_token_id
    assert found == {row["id"]: [*tokenizer(row["text"])["input_ids"], ends] for row in ROWS}
    assert set(trainer.train_dataset["task"]) == {"law"} and trainer.args.max_length == 16
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert (batch["labels"] == batch["input_ids"]).all()  # loss on every token
    trainer.train()
    assert trainer.state.global_step == 2


def test_packed_texts_fill_blocks(model, tmp_path):
    plain, packed = build(model, tmp_path), build(model, tmp_path, packing=True)
    tokens = sum(len(ids) for ids in plain.train_dataset["input_ids"])
    lengths = [len(ids) for ids in packed.train_dataset["input_ids"]]
    assert sum(lengths) == tokens and set(lengths[:-1]) == {16}
    packed.train()
    assert packed.state.global_step == 2


def test_replay_and_ewc_work_on_texts(model, tmp_path):
    old = [{**row, "id": f"old-{row['id']}", "task": "code"} for row in ROWS]
    methods = [
        MethodConfig(name="experience-replay", arguments={"ratio": 0.5}),
        MethodConfig(name="ewc", arguments={"samples": 2}),
    ]
    trainer = build(model, tmp_path, history={"code": old}, methods=methods)
    assert set(trainer.train_dataset["task"]) == {"law", "code"}
    trainer.train()
    assert set(trainer.method_state()) == {"experience-replay", "ewc"}


def test_rows_without_text_are_refused(model, tmp_path):
    with pytest.raises(BadInput, match="row x: stage cpt needs text"):
        build(model, tmp_path, rows=[{"id": "x", "task": "t", "prompt": "a", "completion": "b"}])


def test_packing_is_a_key_of_stage_cpt_and_absent_from_other_recipes():
    with pytest.raises(BadInput, match="only stage cpt packs"):
        resolve_recipe({"packing": True})
    assert "packing" not in Recipe().document()
    packing = resolve_recipe({"stage": "cpt", "packing": True})
    assert packing.document()["packing"] is True and Recipe.from_document(packing.document()) == packing
