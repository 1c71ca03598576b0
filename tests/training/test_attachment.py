"""How the seam gets onto a trainer, what it gives a method there, and that it leaves nothing on a model."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from tests.tiny import new_model
from tests.training.stream import QUIET, plain, rows, sft, tokens
from transformers import Trainer, TrainingArguments

from meristem.errors import BadInput, Clash
from meristem.methods import EWC, ExperienceReplay, Method
from meristem.training.continual import continual


class Asks(Method):
    """Calls what it has not declared."""

    name = "asks"

    def __init__(self, how):
        self.how = how

    def loss(self, step):
        return step.loss_of(step.inputs) if self.how == "step.loss_of" else None

    def prepare_model(self, model, ctx):
        if self.how == "ctx.batches":
            ctx.batches()

    def finish(self, ctx):
        if self.how == "ctx.loss":
            ctx.loss({})
        if self.how == "ctx.rows":
            assert ctx.rows


@pytest.mark.parametrize("how", ["ctx.batches", "ctx.loss", "step.loss_of"])
def test_what_a_method_has_not_declared_it_is_not_given(how, tmp_path):
    with pytest.raises(
        Clash, match=r'^method asks asks .* declare it by needs = frozenset\(\{"likelihood"\}\)$'
    ):
        plain(tmp_path, [Asks(how)], tokens(rows(2)), max_steps=1).train()


def test_rows_that_stream_by_are_not_read_as_none(tmp_path):
    stream = Dataset.from_list(tokens(rows(2))).to_iterable_dataset()
    with pytest.raises(Clash, match=r"asks for ctx\.rows, and this run has a stream"):
        plain(tmp_path, [Asks("ctx.rows")], stream, max_steps=1).train()


class PassesOn(Trainer):
    """As users write them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


class AddsOne(PassesOn):
    def __init__(self, extra, *args, **kwargs):
        super().__init__(*args, **kwargs)


def test_arguments_are_found_behind_a_constructor_that_passes_them_on(tmp_path):
    options = {"history": {"A": tokens(rows(2))}, "task": "B"}
    args, data = TrainingArguments(**QUIET, output_dir=str(tmp_path), seed=7), tokens(rows(2, "B"))
    made = continual(PassesOn, [ExperienceReplay(ratio=0.5)])(new_model(), args, None, data, **options)
    assert made.context.seed == 7 and set(made.train_dataset["task"]) == {"A", "B"}
    adds = continual(AddsOne, [ExperienceReplay(ratio=0.5)])
    named = {"model": new_model(), "args": args, "train_dataset": data, **options}
    assert set(adds(1, **named).train_dataset["task"]) == {"A", "B"}
    with pytest.raises(BadInput, match="name them"):
        adds(1, new_model(), args, None, data)
    with pytest.raises(BadInput, match="got extra twice"):
        adds(1, extra=2, **named)


def test_a_model_that_would_be_built_anew_is_refused(tmp_path):
    args = TrainingArguments(**QUIET, output_dir=str(tmp_path))
    with pytest.raises(Clash, match="ewc cannot follow model_init: pass model="):
        continual(Trainer, [EWC()])(model_init=new_model, args=args, train_dataset=tokens(rows(2)))


class Term(Method):
    name = "term"

    def loss(self, step):
        return step.hidden.square().mean()


@pytest.mark.parametrize("ends", ["whole", "broken off"])
def test_a_model_that_is_kept_holds_neither_hook_nor_trainer(ends, tmp_path):
    class Breaks(Term):
        name = "breaks"

        def gradients(self, params):
            raise KeyboardInterrupt

    model = new_model()
    method = Term() if ends == "whole" else Breaks()
    made = sft(tmp_path, [method, EWC(samples=1)], rows(2), model=model, max_steps=1)
    with pytest.raises(KeyboardInterrupt) if ends == "broken off" else nullcontext():
        made.train()
    assert not any(part._forward_hooks for part in model.modules())
    gone = weakref.ref(made)
    del made
    gc.unfreeze()  # tests/conftest.py
    gc.collect()
    gc.freeze()
    assert gone() is None and model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 2, 259)
