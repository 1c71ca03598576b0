"""Methods over a really quantized base (quanto, int8): an adapter on it trains, quantized weights themselves do not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import tiny_model
from tests.training.stream import rows, sft
from transformers import AutoModelForCausalLM, QuantoConfig

from meristem.errors import Clash
from meristem.methods import Method, available, build

TOUCH = {"prepare_model", "penalty", "gradients", "weights", "around"}
BASELINES = {"joint", "per-task", "seq-finetune"}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("quantized"))
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")

    def make():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuantoConfig(weights="int8"))
        assert base.is_quantized and type(base.model.layers[0].mlp.up_proj).__name__ == "QLinear"
        return get_peft_model(base, lora)

    return make


def train(folder, name, model):
    history = {} if name in BASELINES else {"A": rows(4)}
    made = sft(folder, [build(name)], rows(4, "B"), model=model, history=history, task="B", max_steps=2)
    made.train()
    return made


@pytest.mark.parametrize("name", available())
def test_an_adapter_on_a_quantized_base_trains_with_every_method(name, quantized, tmp_path):
    model = quantized()
    packed = {key: value.clone() for key, value in model.state_dict().items() if key.endswith("_data")}
    start = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    made = train(tmp_path, name, model)
    assert made.state.global_step == 2
    end = made.parameters()
    assert all(torch.isfinite(value).all() for value in end.values())
    assert any(not torch.equal(end[key], value) for key, value in start.items() if key in end)
    after = model.state_dict()
    assert packed and all(torch.equal(after[key], value) for key, value in packed.items())


@pytest.mark.parametrize("name", available())
def test_a_method_that_computes_with_weights_in_training_refuses_quantized_ones_by_name(
    name, quantized, tmp_path
):
    model = quantized()
    model.get_base_model().model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    if any(type(build(name)).overrides(hook) for hook in TOUCH):
        with pytest.raises(
            Clash, match=rf"^method {name} .*layers\.1\.mlp\.up_proj\.weight is quantized: train"
        ):
            train(tmp_path, name, model)
    else:
        assert train(tmp_path, name, model).state.global_step == 2


def test_rows_alone_go_with_any_weights():
    names = [name for name in available() if not any(type(build(name)).overrides(hook) for hook in TOUCH)]
    assert "experience-replay" in names and not {"ewc", "gpm", "o-lora", "lae", "mer"} & set(names)
    assert not any(Method.overrides(hook) for hook in TOUCH)
