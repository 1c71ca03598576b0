import copy
import json
import subprocess
import sys

import pytest

from meristem import methods
from meristem.errors import BadInput
from meristem.methods import Method, available, build, parse, registry


class Sample(Method):
    name = "sample"

    def __init__(self, first, second=2, **more):
        self.first = first

    def penalty(self, params):
        return None


def test_arguments_are_captured_with_defaults_and_copied():
    value = {"deep": [1]}
    method = Sample(value, extra=5)
    value["deep"].append(2)
    assert method.arguments() == {"first": {"deep": [1]}, "second": 2, "extra": 5}
    assert copy.deepcopy(method).arguments() == method.arguments()
    assert Method().arguments() == {}


def test_a_subclass_that_forwards_records_its_own_arguments():
    class Narrow(Sample):
        def __init__(self, width=3):
            super().__init__(first=width, second=9)

    assert Narrow(width=4).arguments() == {"width": 4}


def test_overrides_is_asked_of_the_class():
    assert Sample.overrides("penalty") and not Sample.overrides("loss")
    assert not Method.overrides("penalty")


def test_a_method_is_rebuilt_by_name_and_arguments():
    for text in ("ewc:strength=50,gamma=0.9", "experience-replay:buffer=reservoir,ratio=0.25"):
        method = parse(text)
        stored = json.loads(json.dumps(method.arguments()))
        again = build(method.name, stored)
        assert type(again) is type(method) and again.arguments() == method.arguments()
    assert parse("ewc:strength=50,gamma=0.9").arguments() == {"strength": 50, "samples": 64, "gamma": 0.9}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ewd", "did you mean 'ewc'"),
        ("zzz", "known are ewc, experience-replay"),
        ("ewc:strenght=5", "did you mean 'strength'"),
        ("ewc:strength=-1", "strength=-1"),
        ("ewc:strength=nan", "strength=nan"),
        ("ewc:gamma=lots", "gamma='lots'"),
        ("ewc:samples=0", "samples=0"),
        ("ewc:strength", "is not key=value"),
        ("ewc:strength=1,strength=2", "given twice"),
        ("experience-replay:ratio=1", "ratio=1"),
        ("experience-replay:buffer=heap", "must be one of reservoir, task-balanced"),
        ("experience-replay:capacity=0", "capacity=0"),
        ("joint:best", "'joint' has no best-known settings yet: give its arguments, or leave 'best' out"),
        ("ewd:best", "did you mean 'ewc'"),
        ("ewc:best=1", "has no argument 'best'"),
        ("ewc:bets", "'bets' is not key=value"),
    ],
)
def test_wrong_names_arguments_and_values_are_one_line(text, says):
    with pytest.raises(BadInput) as caught:
        parse(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_that_is_no_method_is_refused(monkeypatch):
    from importlib.metadata import EntryPoint

    entry = EntryPoint("odd", "pathlib:Path", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(BadInput, match="not a meristem Method"):
        build("odd")


def test_listing_gives_descriptions_and_loads_no_torch():
    assert "quadratic penalty" in available()["ewc"]
    assert "earlier tasks" in available()["experience-replay"]
    code = (
        "import sys, meristem.methods as m; m.available(); dir(m); "
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules); "
        "from meristem.methods import EWC; assert EWC.name == 'ewc' and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_registered_method_says_what_it_is():
    for name in available():
        found = registry.load(name)
        assert found.name == name and found.stages and "State:" in found.__doc__
        assert found.claims or found.alone  # a lower bound promises nothing
    with pytest.raises(AttributeError):
        methods.NoSuchMethod  # noqa: B018
