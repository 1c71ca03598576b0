"""What methods declare, held against what they do: two updates of each on a continued LoRA."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from tests.methods.adapters import adapter
from tests.training.stream import plain, rows, tokens, weights
from tests.training.trainers import CLASSES
from transformers import TrainerCallback

from meristem.cli.method import list_
from meristem.errors import BadInput
from meristem.methods import Context, available, build, registry
from meristem.methods.architecture.experts import Expert
from meristem.methods.architecture.moe_cl.adversary import Adversary
from meristem.methods.architecture.moe_cl.codes import Anchor
from meristem.methods.base import HOOKS, trainable
from meristem.methods.facts import DECLARED, TRAINERS, all_facts, facts
from meristem.methods.table import BEGIN, END, HEADINGS, cells, markdown, replaced

ROOT = Path(__file__).parents[2]
HOLDERS = dict | list | Expert | Adversary | Anchor
ARGUMENTS = {
    "experience-replay": {"ratio": 0.5, "capacity": 3},
    "mer": {"ratio": 0.5, "capacity": 3},
    "ewc": {"samples": 2},
    "gpm": {"threshold": 0.9, "samples": 2},
}


def numbers_in(value):
    """In all tensors that are kept under ``value``, however deep."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    if (is_dataclass(value) and not isinstance(value, type)) or isinstance(value, Adversary | Anchor):
        value = vars(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(numbers_in, parts))


class Held(TrainerCallback):
    """Numbers that the method holds in memory after a step, as multiples of the trained weights' size."""

    def __init__(self, method):
        self.method = method

    def on_step_end(self, args, state, control, model, **kwargs):
        size = sum(p.numel() for p in trainable(model).values())
        kept = [v for v in vars(self.method).values() if isinstance(v, HOLDERS)]
        self.copies = numbers_in(kept) / size + self.method.needs_before


class Update:
    """One update of two steps; ``texts`` tells the history of task A from another one."""

    def __init__(self, folder, name, task, before=None, state=True, history=None):
        method = build(name, ARGUMENTS.get(name))
        self.held = Held(method)
        model = adapter()
        if before and not method.fresh_adapter:
            model.load_state_dict(before.weights)
        trainer = plain(
            folder,
            [method],
            tokens(rows(4, task)),
            model=model,
            task=task,
            history=history or {},
            method_state=before.state if before and state else None,
            callbacks=[self.held],
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
        )
        trainer.train()
        self.weights, self.state = weights(model), copy.deepcopy(trainer.method_state())
        self.trained = sum(p.numel() for p in trainable(model).values())
        self.names = set(trainable(model))

    def same(self, other):
        [mine], [its] = self.state.values(), other.state.values()
        tensors = self.weights | mine["tensors"], other.weights | its["tensors"]
        same = tensors[0].keys() == tensors[1].keys() and mine["json"] == its["json"]
        return same and all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())

    @property
    def size(self):
        """Numbers in the adapter and the state, and kept rows."""
        [state] = self.state.values()
        kept = len(state["json"].get("buffer", {}).get("rows", ()))
        return self.trained + sum(v.numel() for v in state["tensors"].values()) + kept


def other_rows():
    return tokens([{**row, "prompt": row["prompt"].replace("A", "Z")} for row in rows(4, "A")])


@pytest.mark.parametrize("name", available())
def test_old_rows_memory_and_growth_are_as_declared(name, tmp_path):
    declared = facts(name)
    one, other = {"A": tokens(rows(4, "A"))}, {"A": other_rows()}
    first = Update(tmp_path, name, "A")

    def second(**given):
        return Update(tmp_path, name, "B", first, **given)

    with_state = second(history=one)
    assert with_state.same(second(history=one))  # else the lines below would say nothing
    reads = {
        "anew": not second(history=one, state=False).same(second(history=other, state=False)),
        "always": not with_state.same(second(history=other)),
    }
    assert reads == {"anew": declared.old_data != "none", "always": declared.old_data == "all"}

    method = build(name, ARGUMENTS.get(name))
    method.load_state_dict(copy.deepcopy(first.state[name]))
    new = tokens(rows(4, "B"))
    assert (len(method.prepare_data(new, Context("B"))) > len(new)) is (declared.old_data == "sample")

    of_weights = {key.partition(".")[2] for key in first.state[name]["tensors"]} & first.names
    assert not of_weights or build(name).weight_state
    grown = with_state.size - first.size
    assert (grown > 0) is bool(declared.grows) or (declared.fresh_adapter and declared.grows), grown
    [state] = first.state.values()
    numbers = sum(v.numel() for v in state["tensors"].values())
    lasting = numbers / with_state.trained if declared.grows else 0
    assert math.ceil(max(0, round(with_state.held.copies - lasting, 6))) == declared.weight_copies


@pytest.mark.parametrize("name", [n for n, f in all_facts().items() if f.task_id == "none" and not f.alone])
def test_a_method_without_task_id_works_on_tasks_without_names(name, tmp_path):
    """The second of two nameless updates ends elsewhere than fine-tuning without the method."""
    ends = []
    for methods in ([build(name, ARGUMENTS.get(name))], []):
        model, state = adapter(), None
        for task in "AB":
            nameless = [
                {k: v for k, v in row.items() if k not in ("id", "task")} for row in tokens(rows(4, task))
            ]
            options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
            trainer = plain(tmp_path, methods, nameless, model=model, method_state=state, **options)
            trainer.train()
            model, state = trainer.model, trainer.method_state()
        ends.append(weights(model))
    assert any(
        value.shape != ends[1][k].shape or not torch.equal(value, ends[1][k]) for k, value in ends[0].items()
    )


def test_the_sources_say_what_the_classes_say():
    for name, found in all_facts().items():
        loaded = registry.load(name)
        assert {key: getattr(found, key) for key in DECLARED} == {
            key: getattr(loaded, key) for key in DECLARED
        }
        assert found.hooks == tuple(hook for hook in HOOKS if loaded.overrides(hook))
        assert found.about == available()[name]
    code = "import sys; from meristem.methods.table import markdown; assert markdown() and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_class_that_cannot_be_read_is_loaded(monkeypatch):
    """Bases or values that are made at run time."""
    from importlib.metadata import EntryPoint

    entry = EntryPoint("made", "tests.methods.made_at_run_time:Made", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    found = facts("made")
    assert found.claims == ("less-forgetting",) and found.stages == {"cit"} and found.hooks == ("penalty",)
    assert found.about == "Made at run time."


@pytest.mark.parametrize("module", ["tests.methods.raises_at_import", "tests.methods.no_such_module"])
def test_a_method_that_cannot_be_loaded_is_listed_with_the_reason(module, monkeypatch, capsys):
    from importlib.metadata import EntryPoint

    entries = [
        EntryPoint("broken", f"{module}:Broken", registry.GROUP),
        EntryPoint("ewc", "meristem.methods.regularization.ewc:EWC", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    assert list(all_facts()) == ["ewc"]
    list_(as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert shown["ewc"]["needs"] == ["likelihood"]
    assert shown["broken"]["error"].startswith(f"method 'broken' ({module}:Broken) cannot be loaded: ")
    list_(as_json=False)
    assert "broken" in capsys.readouterr().out


def test_trainers_of_the_table_are_those_of_the_seam():
    assert list(TRAINERS) == [trainer.__name__ for trainer, _ in CLASSES.values()]


def test_the_table_of_the_documentation_is_the_generated_one():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert replaced(text, markdown()) == text, "run: python -m meristem.methods.table docs/methods.md"
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb\n", "new\n") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    with pytest.raises(BadInput, match="no such lines"):
        replaced(f"{END} {BEGIN}", "new")


def test_every_cell_is_one_line_of_plain_text():
    for name, found in all_facts().items():
        for cell in cells(name, found).values():
            assert cell and not re.search(r"[|\n]", cell)
    assert cells("ewc", facts("ewc")).keys() == HEADINGS.keys()
