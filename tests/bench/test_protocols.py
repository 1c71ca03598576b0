"""The protocols as published, and prompts that do not leak which task it is."""

from __future__ import annotations

import pytest

from meristem.bench.protocols import PROTOCOLS, orders_of, protocol
from meristem.errors import BadInput


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_order_holds_every_task_once(name):
    found = PROTOCOLS[name]
    names = sorted(task.name for task in found.tasks)
    assert found.orders and len(set(found.orders.values())) == len(found.orders)
    assert all(sorted(order) == names for order in found.orders.values())


def test_the_published_orders():
    """Orders 1-3: O-LoRA and MoE-CL; orders 4-6: Progressive Prompts and O-LoRA."""
    assert PROTOCOLS["standard-4"].orders["3"] == ("yahoo", "amazon", "agnews", "dbpedia")
    long = PROTOCOLS["long-15"].orders
    assert {order: tasks[0] + " " + tasks[-1] for order, tasks in long.items()} == {
        "4": "mnli yahoo",
        "5": "multirc yahoo",
        "6": "yelp wic",
    }
    assert long["4"][8:11] == ("yelp", "amazon", "sst2") and long["5"][9:12] == ("sst2", "dbpedia", "agnews")
    mixed = PROTOCOLS["mixed-8"].orders
    assert mixed["2"] == mixed["1"][::-1] and mixed["3"][:4] == ("agnews", "dbpedia", "boolq", "copa")


def test_no_prompt_names_its_task_or_data_set():
    for found in PROTOCOLS.values():
        for task in found.tasks:
            words = {task.name, *task.folder.split("_")} - {"en", "py"}
            assert not [word for word in words if word in task.question.lower()], task


def test_orders_are_chosen_by_name():
    found = protocol("mixed-4")
    assert list(orders_of(found, [])) == ["1"] and list(orders_of(found, ["3", "1"])) == ["3", "1"]
    assert list(orders_of(found, ["all"])) == ["1", "2", "3"]
    with pytest.raises(BadInput, match="mixed-4 has no order '4'; it has 1, 2, 3, or say all"):
        orders_of(found, ["4"])
    with pytest.raises(BadInput, match="there is no protocol 'mixed4'; known are mixed-2, mixed-4, "):
        protocol("mixed4")
