"""Every pair of registered methods on every trainer: two steps with both effects, or a refusal by name before them;
on one trainer also the update after that, with what the first one left.

New methods are in as soon as they are registered; ``ARGUMENTS`` makes small ones of those whose defaults are large.
"""

from itertools import combinations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import new_model
from tests.training.stream import weights
from tests.training.trainers import CLASSES, data, make, new_reward_model

from meristem.errors import Clash
from meristem.methods import Method, available, build
from meristem.methods.base import HOOKS
from meristem.methods.facts import facts
from meristem.training.continual import continual

ARGUMENTS = {"experience-replay": {"ratio": 0.5}, "ewc": {"samples": 1}, "gpm": {"threshold": 0.5}}
PAIRS = [*((name,) for name in available()), *combinations(available(), 2)]
LORA = {"r": 8, "target_modules": ["q_proj"]}


def watched(name, calls, acted):
    """The method with a note in ``calls`` of every hook that runs; in ``acted`` when it added to the objective."""
    method = build(name, ARGUMENTS.get(name))

    def note(hook):
        inner = getattr(method, hook)

        def run(*args, **kwargs):
            calls.add((name, hook))
            result = inner(*args, **kwargs)
            if hook in ("loss", "penalty") and result is not None:
                calls.add((name, hook, "logged"))
                if float(result.detach()) != 0:
                    acted.add((name, hook))
            elif hook == "prepare_data" and len(result) != len(args[0]):
                acted.add((name, hook))
            return result

        return run

    for hook in HOOKS:
        if method.overrides(hook):
            setattr(method, hook, note(hook))
    return method


def trained(kind, folder, names):
    """``(weights, acted)`` of two steps with these methods, or the one line that refused them before the first."""
    calls: set = set()
    acted: set = set()
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "task": "B"}
    options |= {"history": {"A": data(kind, 2)}, "logging_strategy": "steps", "logging_steps": 1}
    methods = [watched(name, calls, acted) for name in names]
    given = data(kind, 4 if kind == "distillation" else 2, "B")  # it trains on full batches only
    try:
        trainer = make(kind, folder, methods, given, model=lora(kind), **options)
    except Clash as clash:
        return str(clash)
    trainer.train()
    assert trainer.state.global_step == 2
    hooks = {(m.label, hook) for m in methods for hook in HOOKS if type(m).overrides(hook)}
    assert {call for call in calls if len(call) == 2} == hooks
    logged = {
        key for entry in trainer.state.log_history for key in entry if key.endswith(("/loss", "/penalty"))
    }
    assert logged == {f"{call[0]}/{call[1]}" for call in calls if len(call) == 3}
    if kind == "sft" and len(names) == 2:
        goes_on(folder, names, trainer)
    return weights(trainer.model), {name for name, _ in acted}


def goes_on(folder, names, before):
    """The next update takes the weights and the state of this one, and learns."""
    methods = [build(name, ARGUMENTS.get(name)) for name in names]
    model = lora("sft") if any(method.fresh_adapter for method in methods) else before.model
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "method_state": before.method_state()}
    trainer = make("sft", folder, methods, data("sft", 2, "C"), model=model, task="C", **options)
    start = weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(value, start[key]) for key, value in weights(trainer.model).items()), names


def lora(kind):
    model = new_reward_model() if kind == "reward" else new_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(
            model, LoraConfig(**LORA, task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
        )


@pytest.mark.parametrize("kind", CLASSES)
def test_each_pair_trains_with_both_effects_or_is_refused_by_name(kind, tmp_path):
    alone = {}
    for number, names in enumerate(PAIRS):
        found = trained(kind, tmp_path / str(number), names)
        if isinstance(found, str):
            assert any(name in found for name in names) and "\n" not in found
        elif len(names) == 2:
            for one, other in (names, names[::-1]):
                if other in found[1]:  # ``one`` alone came out elsewhere
                    assert any(not torch.equal(v, alone[one][0].get(k, v)) for k, v in found[0].items()), (
                        names
                    )
        if len(names) == 1:
            alone[names[0]] = found
            assert isinstance(found, str) is (CLASSES[kind][0].__name__ not in facts(names[0]).trainers)


def test_every_registered_method_has_a_trainer():
    for name in available():
        method = build(name, ARGUMENTS.get(name))
        assert isinstance(method, Method) and any(fits(trainer, method) for trainer, _ in CLASSES.values()), (
            name
        )


def fits(trainer, method):
    try:
        continual(trainer, [method])
    except Clash:
        return False
    return True


@pytest.mark.parametrize(
    "names", [("ewc", "o-lora"), ("lae", "mocl"), ("gpm", "param-isolation"), ("lae", "o-lora")]
)
def test_a_state_of_weights_goes_with_no_method_that_trains_others(names):
    with pytest.raises(
        Clash, match=f"{names[0]} remembers the weights in training, and {names[1]} trains other"
    ):
        continual(CLASSES["sft"][0], [build(name) for name in names])
