"""``meristem.yaml`` and recipes: what loads, what is refused with its place, and how settings are laid over another."""

from __future__ import annotations

import pytest

from meristem import config
from meristem.config import Recipe, WorkspaceConfig, load_config, load_recipe, resolve_recipe
from meristem.errors import BadInput
from meristem.release import gates

HEAD = "schema: meristem/workspace/v1\n"


@pytest.fixture
def load(tmp_path):
    def read(text, loader=load_config):
        path = tmp_path / "meristem.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return loader(path)

    return read


def test_the_template_loads_and_every_gate_of_it_can_be_built(load):
    settings = load(config.TEMPLATE).for_model("support")
    names = [gate.gate for gate in settings.gates]
    assert names == ["improvement", "non_inferiority", "negative_flips", "contamination"]
    for gate in settings.gates:
        gates.build(gate.gate, gate.arguments)
    assert (settings.approvals, settings.attempts, settings.recipe) == (0, 2, {})


def test_the_smallest_file_takes_the_defaults(load):
    loaded = load(HEAD)
    assert loaded.evaluation == config.EvaluationSettings()
    assert loaded.for_model("any") == config.ModelSettings()


def test_a_model_overrides_key_by_key_and_its_recipe_one_level_deeper(load):
    loaded = load(
        HEAD
        + """
defaults:
  attempts: 3
  gates: [{gate: improvement, suites: new}]
  recipe: {epochs: 1, batch_size: 4, lora: {rank: 2}}
models:
  support:
    gates: []
    recipe: {epochs: 2, lora: {alpha: 4}}
"""
    )
    own, other = loaded.for_model("support"), loaded.for_model("other")
    assert (own.gates, own.attempts) == ([], 3)
    assert own.recipe == {"epochs": 2, "batch_size": 4, "lora": {"alpha": 4}}
    assert other.recipe == {"epochs": 1, "batch_size": 4, "lora": {"rank": 2}}
    assert len(other.gates) == 1


def test_the_policy_is_the_part_that_judges(load):
    text = (
        HEAD
        + "defaults: {approvals: 1, attempts: 9, gates: [{gate: non_inferiority, suites: [a], margin: 0.1}]}"
    )
    assert load(text).for_model("m").policy() == {
        "schema": "meristem/policy/v1",
        "gates": [{"gate": "non_inferiority", "suites": ["a"], "margin": 0.1}],
        "approvals": 1,
    }


REFUSED = {
    "unknown key": (HEAD + "colour: red", "colour: unknown key"),
    "unknown key of a model": (HEAD + "models: {support: {gate: []}}", r"models\.support\.gate: unknown key"),
    "unknown recipe key": (HEAD + "defaults: {recipe: {epoch: 3}}", r"defaults\.recipe\.epoch: unknown key"),
    "no schema": ("evaluation: {}", "schema: missing"),
    "another schema": ("schema: meristem/workspace/v2", r"schema: .*found 'meristem/workspace/v2'"),
    "wrong type": (HEAD + "defaults: {attempts: many}", r"defaults\.attempts: .*valid integer"),
    "out of range": (HEAD + "defaults: {attempts: 0}", r"defaults\.attempts: .*greater than or equal to 1"),
    "wrong choice": (HEAD + "evaluation: {dtype: int4}", r"evaluation\.dtype: .*'bfloat16', 'float32'"),
    "a gate without a name": (
        HEAD + "defaults: {gates: [{margin: 1}]}",
        r"defaults\.gates\.0\.gate: missing",
    ),
    "odd suites": (HEAD + "defaults: {gates: [{gate: g, suites: old}]}", r"defaults\.gates\.0\.suites"),
    "a recipe that is nothing": (HEAD + "defaults:\n  recipe:\n", r"defaults\.recipe: .*dictionary"),
    "a recipe that is text": (HEAD + "models: {a: {recipe: fast}}", r"models\.a\.recipe: .*dictionary"),
    "a model that is nothing": (HEAD + "models: {a: }", r"models\.a: .*dictionary"),
    "infinite": (HEAD + "defaults: {recipe: {learning_rate: .inf}}", r"learning_rate: .*finite number"),
    "not a number": (HEAD + "defaults: {recipe: {weight_decay: .nan}}", "weight_decay: .*finite number"),
    "an import path": (HEAD + "x: !!python/object/apply:os.system [ls]", ":2: not valid YAML"),
    "a list": ("[1]", "expected keys and values"),
    "empty": ("", "expected keys and values"),
    "not YAML": (HEAD + "\nmodels: {a: [}", ":3: not valid YAML"),
    "a tab": (HEAD + "\tmodels: {}", ":2: not valid YAML"),
    "a key twice": (
        HEAD + "defaults:\n  gates: [{gate: improvement}]\n  gates: []\n",
        ":4: .*'gates' stands twice",
    ),
    "not UTF-8": (b"schema: \xff", "not UTF-8"),
    "a control character": (b"schema: \x07", "not valid YAML"),
    "deep": ("[" * 5000, "not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_in_one_line_with_its_place(load, tmp_path, text, message):
    with pytest.raises(BadInput, match=message) as refused:
        load(text)
    assert str(refused.value).startswith(str(tmp_path / "meristem.yaml"))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(BadInput, match="no such file"):
        load_config(tmp_path / "meristem.yaml")
    with pytest.raises(BadInput, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("{gate: improvment}", "unknown gate 'improvment'; gates here: .*improvement"),
        ("{gate: improvement, margin: 0.1}", "gate improvement: margin: "),
        ("{gate: non_inferiority}", "gate non_inferiority: margin: "),
        ("{gate: non_inferiority, margin: 5 points}", "gate non_inferiority: margin: "),
        ("{gate: non_inferiority, margin: .nan}", "gate non_inferiority: margin: "),
    ],
)
def test_a_gate_s_arguments_are_checked_when_it_is_built(load, gate, message):
    (settings,) = load(HEAD + f"defaults: {{gates: [{gate}]}}").for_model("m").gates
    with pytest.raises(BadInput, match=message):
        gates.build(settings.gate, settings.arguments)


def test_a_recipe_file_is_overrides_of_the_default(load):
    fields = load(
        "schema: meristem/recipe/v1\nlearning_rate: 5e-4\nmethods: [{name: ewc, arguments: {strength: 2}}]",
        load_recipe,
    )
    recipe = resolve_recipe({"epochs": 1, "learning_rate": 1}, fields)
    assert (recipe.learning_rate, recipe.epochs, recipe.methods[0].arguments) == (5e-4, 1, {"strength": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 1", "epoch: unknown key"),
        ("lora: {rank: 0}", r"lora\.rank"),
        ("schema: meristem/recipe/v9", "reads meristem/recipe/v1"),
        ("methods: [ewc]", r"methods\.0"),
    ],
)
def test_a_bad_recipe_file_is_refused(load, text, message):
    with pytest.raises(BadInput, match=message):
        load(text, load_recipe)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "cpu:0", ""])
def test_a_device_is_one_that_torch_knows(load, device):
    message = f"device: a device is cpu, cuda, cuda:N .* or mps .found '{device}'"
    with pytest.raises(BadInput, match=message):
        load(f"device: '{device}'", load_recipe)
    with pytest.raises(BadInput, match=f"evaluation.{message}"):
        load(HEAD + f"evaluation: {{device: '{device}'}}")
    for known in ("cpu", "cuda", "cuda:1", "mps"):
        assert resolve_recipe({"device": known}).device == known


def test_a_recipe_survives_its_document():
    recipe = resolve_recipe(
        {"lora": {"rank": 4, "targets": ["q_proj"]}, "methods": [{"name": "ewc"}], "seed": 3}
    )
    assert Recipe.from_document(recipe.document()) == recipe
    with pytest.raises(BadInput, match=r"recipe\.batch_size"):
        resolve_recipe({"batch_size": 0})


def test_yaml_s_own_merging_is_not_a_key_twice(load):
    text = (
        HEAD
        + "defaults: &base {attempts: 3, approvals: 1}\nmodels:\n  a: &a {<<: *base, attempts: 4}\n  b: {<<: *a, attempts: 5}\n"
    )
    loaded = load(text)
    assert [(loaded.for_model(n).attempts, loaded.for_model(n).approvals) for n in "ab"] == [(4, 1), (5, 1)]


def test_settings_cannot_be_changed_after_they_were_checked(load):
    loaded = load(HEAD)
    assert isinstance(loaded, WorkspaceConfig)
    with pytest.raises(ValueError, match="frozen"):
        loaded.evaluation.dtype = "float16"
