"""Stage ``cpt``: every token of every text is trained on, in rows of at most ``max_length``."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_model
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from meristem.config import MethodConfig, Recipe, resolve_recipe
from meristem.errors import BadInput, Clash
from meristem.methods import Method
from meristem.training import cpt
from meristem.training.continual import continual

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


def texts(trainer):
    """Token ids of each text, end included, as an unpacked trainer cuts it."""
    return [
        trainer.processing_class(row["text"])["input_ids"] + [trainer.processing_class.eos_token_id]
        for row in ROWS
    ]


def batch_of(trainer):
    """All blocks in one micro-batch, by TRL's own collator; without the tags that the seam adds."""
    batch = dict(trainer.data_collator(list(trainer.train_dataset)))
    assert not trainer.train_dataset.features.keys() & {"id", "task"}
    return batch


def test_joined_texts_are_one_stream_to_the_model(model, tmp_path):
    trainer = build(model, tmp_path, packing=True)
    batch = batch_of(trainer)
    stream = [token for text in texts(trainer) for token in text]
    real = batch["attention_mask"].bool()
    assert (
        batch["input_ids"][real].tolist() == stream == batch["labels"][real].tolist()
    )  # boundaries are predicted
    assert "position_ids" not in batch  # so that they run through the block
    block = batch["input_ids"][:1]
    end = block[0].tolist().index(trainer.processing_class.eos_token_id) + 1
    with torch.no_grad():
        whole = trainer.model(block, use_cache=False).logits[0, end:]
        alone = trainer.model(block[:, end:], use_cache=False).logits[0]
    assert (whole - alone).abs().max() > 1e-3  # the second text sees the first


def test_documents_are_kept_apart_in_labels_positions_and_attention(model, tmp_path):
    trainer = build(model, tmp_path, packing="documents")
    batch = batch_of(trainer)
    lengths = [n for block in trainer.train_dataset["seq_lengths"] for n in block]
    assert all(sum(block) <= 16 for block in trainer.train_dataset["seq_lengths"])
    assert batch["position_ids"][0].tolist() == [at for n in lengths for at in range(n)]
    starts = batch["position_ids"] == 0
    assert (batch["labels"][starts] == -100).all()
    assert (batch["labels"][~starts] == batch["input_ids"][~starts]).all()
    pieces = batch["input_ids"][0].split(lengths)
    cut = [text[at : at + 16] for text in texts(trainer) for at in range(0, len(text), 16)]
    assert sorted(piece.tolist() for piece in pieces) == sorted(cut)  # nothing dropped, whole where it fits
    assert any(len(block) > 1 for block in trainer.train_dataset["seq_lengths"])
    counted = (batch["labels"] != -100).sum().item()
    for attention in ("sdpa", "eager"):
        trainer.model.set_attn_implementation(attention)
        with torch.no_grad():
            packed = float(trainer.compute_loss(trainer.model, dict(batch)))
            alone = [trainer.model(piece[None], use_cache=False).logits[0, :-1] for piece in pieces]
            losses = [
                cross_entropy(logits, piece[1:], reduction="sum")
                for logits, piece in zip(alone, pieces, strict=True)
            ]
        assert packed == pytest.approx(float(sum(losses)) / counted, rel=1e-5)


class NeedsIds(Method):
    name = "needs-ids"
    columns = frozenset({"id", "task"})


@pytest.mark.parametrize("packing", [True, "documents"])
def test_packed_rows_have_no_ids_so_a_method_that_needs_them_is_refused(packing, model, tmp_path):
    options = SFTConfig(str(tmp_path), packing=True, max_length=16, use_cpu=True, bf16=False)
    with pytest.raises(Clash, match="needs-ids needs the id and task of each row, which packing drops"):
        continual(SFTTrainer, [NeedsIds()])(str(model), options, train_dataset=ROWS)
    trainer = build(
        model, tmp_path, packing=packing, methods=[MethodConfig(name="ewc", arguments={"samples": 2})]
    )
    trainer.train()
    assert trainer.sample_ids == [] and trainer.method_state()["ewc"]["json"]["tasks"] == ["law"]


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
