"""MoE-CL's default: one exact low-rank product, experts that stay, a game that sees every task, and the claims."""

import pytest
from tests.methods.adapters import assert_forgets_less, assert_resumes

from meristem.methods.architecture.moe_cl import MoECL


def test_interrupted_resumed_and_carried_it_ends_in_the_same_bits(tmp_path):
    (state,) = assert_resumes(lambda: [MoECL()], tmp_path).values()
    assert [e["task"] for e in state["json"]["experts"]] == ["A", "B"] and "gates.1" in state["tensors"]


@pytest.mark.parametrize("arguments", [{}])
def test_it_forgets_less_than_one_lora_trained_on(arguments, tmp_path):
    assert_forgets_less(lambda: [MoECL(**arguments)], tmp_path, rank=4, first=True, named=True)
