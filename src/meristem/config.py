"""The schemas of what users write: ``meristem.yaml`` (with its policies) and recipes. Extra keys are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from meristem.errors import BadInput

CONFIG_NAME = "meristem.yaml"
FULL_RATE = 1e-5  # what is usual for all weights of an LLM; the rate of a LoRA would wreck them
RECIPE_SCHEMA = "meristem/recipe/v1"

TEMPLATE = """\
schema: meristem/workspace/v1

# How versions are evaluated. Results are keyed by these settings and the library versions.
evaluation: {dtype: bfloat16, device: cpu, batch_tokens: 4096}

# What holds for every model, unless `models:` says otherwise for one.
defaults:
  # A gate asks about suites: `new` (tasks this update teaches), `learned` (tasks taught before, and every
  # suite of kind general, instruction or safety), `all`, or a list of names. Margins are in score (0.05 = 5 points).
  gates:
    - {gate: improvement, suites: new, min_gain: 0.0, confidence: 0.95}
    - {gate: non_inferiority, suites: learned, margin: 0.05, confidence: 0.95}
    - {gate: negative_flips, suites: learned, max_rate: 0.10, confidence: 0.95}
    - {gate: contamination, suites: all, max_items: 0}    # test items that share 13 words in a row with training data
  approvals: 0          # signatures needed before a passed decision may be promoted
  attempts: 2           # turns of the loop spent on one signal
  methods: []           # continual-learning methods of a first attempt
  retry_methods: ["experience-replay:ratio=0.3", "ewc:strength=1000"]   # after a regression
  recipe: {}            # overrides of the default recipe, e.g. {epochs: 3, learning_rate: 0.0005}

models: {}
#  support:
#    gates: [...]

# Where the workspace is kept. Without these lines: SQLite and packs in .meristem/ beside this file.
# Passwords and keys stay in the environment (PGPASSWORD or ~/.pgpass, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
# store: postgresql://user@host/database
# packs: s3://bucket/prefix

# What `meristem store gc` may give up: days that bytes of a kind are kept after nothing in use reaches them.
# A kind that is not named is kept for ever; what an alias, a release or an open update reaches always is.
retention: {}           # e.g. {adapter: 90, method-state: 30}
"""


class _Strict(BaseModel):
    # Built on first use: a command needs few of the models that are imported.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


def known_device(name: str) -> str:
    """``name`` if it is a device that torch knows by that name; ``ValueError`` says what is."""
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise ValueError("a device is cpu, cuda, cuda:N (N counts from 0) or mps")
    return name


Device = Annotated[str, AfterValidator(known_device)]


class EvaluationSettings(_Strict):
    """What an engine digest is made of, beside library versions."""

    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    device: Device = "cpu"
    batch_tokens: Annotated[int, Field(ge=64)] = 4096


class GateConfig(BaseModel):
    """One gate; further keys are the gate's own arguments, checked when the gate is built."""

    model_config = ConfigDict(extra="allow", frozen=True, defer_build=True)
    gate: str
    suites: Literal["new", "learned", "all"] | list[str] = "all"

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Lora(_Strict):
    """A PEFT LoRA. ``layers``: share of the layers, counted from the top, that carry it (1.0 = all)."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[int, Field(ge=1)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    layers: Annotated[float, Field(gt=0, le=1)] = 1.0


class MethodConfig(_Strict):
    """A continual-learning method by its registered name, and what it is built from."""

    name: str
    arguments: dict[str, Any] = {}


class Preference(_Strict):
    """The loss of stage ``ca`` over pairs of answers: a member of the DPO family (``training.ca`` has the formulas)."""

    loss: Literal[
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "ipo",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
        "discopop",
    ] = "sigmoid"
    beta: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    @model_validator(mode="after")
    def _smooths(self) -> Preference:
        smoothed = self.loss in ("robust", "exo_pair")
        if smoothed and not self.label_smoothing:
            raise ValueError(f"loss {self.loss} needs label_smoothing above 0: the share of flipped pairs")
        if self.label_smoothing and not smoothed:
            raise ValueError(f"loss {self.loss} has no label_smoothing; leave it out, or take loss robust")
        return self


Share = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(gt=0)]

_PARTS = {  # what a schedule has beside warm-up
    "wsd": ("decay_share", "final_rate"),
    "infinite": ("phase", "cooldown_share", "constant_rate", "decay_share", "final_rate"),
}


class Recipe(_Strict):
    """Every choice of a training run. Stored resolved with the run; never names an import path.

    What ``lora`` leaves out is settled when an update is planned: as in the adapter that is continued, else the
    defaults (``training.recipes``), and so is what ``schedule: infinite`` leaves out. ``weights: full`` trains all
    weights of a version without adapter; its default ``learning_rate`` is ``FULL_RATE``.
    """

    stage: Literal["cit", "cpt", "ca"] = "cit"
    weights: Literal["lora", "full"] = "lora"
    lora: Lora | None = None
    methods: list[MethodConfig] = []
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    schedule: Literal["linear", "cosine", "constant", "wsd", "infinite"] = "linear"
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    cooldown_share: Share | None = None  # infinite: from learning_rate to constant_rate
    constant_rate: Rate | None = None  # infinite: held from update to update
    phase: Literal["start", "continue", "anneal"] | None = None  # infinite: left out, the parent settles it
    decay_share: Share | None = None  # wsd, and infinite while annealing: at the end
    final_rate: Annotated[float, Field(ge=0)] | None = None  # wsd, and infinite while annealing
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    max_length: Annotated[int, Field(ge=8)] = 512
    packing: bool | Literal["documents"] = False  # stage cpt: texts joined into full blocks, or kept apart
    preference: Preference = Preference()  # stage ca
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    device: Device = "cpu"
    checkpoint_steps: Annotated[int, Field(ge=1)] = 20
    seed: int = 0
    lean: bool = True  # the same losses without the work that cannot change them (training._lean)

    @model_validator(mode="before")
    @classmethod
    def _full_rate(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("weights") == "full":
            return {"learning_rate": FULL_RATE, **fields}
        return fields

    @model_validator(mode="after")
    def _one_kind_of_weights(self) -> Recipe:
        if self.weights == "full" and self.lora is not None:
            raise ValueError(
                "lora shapes an adapter, and weights: full trains none; leave one of them out (lora: null undoes a "
                "default of meristem.yaml)"
            )
        return self

    @model_validator(mode="after")
    def _of_its_stage(self) -> Recipe:
        if self.packing and self.stage != "cpt":
            raise ValueError("only stage cpt packs; leave it out")
        if self.preference != Preference() and self.stage != "ca":
            raise ValueError("preference is the loss of stage ca; leave it out")
        return self

    @model_validator(mode="after")
    def _schedule_holds_together(self) -> Recipe:
        for key in _PARTS["infinite"]:
            if getattr(self, key) is not None and key not in _PARTS.get(self.schedule, ()):
                raise ValueError(f"schedule {self.schedule} has no {key}; leave it out")
        top = self.learning_rate
        if self.schedule == "infinite":
            if self.final_rate == 0:
                raise ValueError("final_rate is 0, which the exponential annealing never reaches; raise it")
            if self.phase == "start" and (self.constant_rate or 0) > top:
                raise ValueError("constant_rate is above learning_rate, from which the rate cools down to it")
            top = self.constant_rate or top
        if self.final_rate is not None and self.final_rate >= top:
            raise ValueError("final_rate is not below the rate that decays to it")
        at_most = {"cooldown_share": self.cooldown_share} if self.schedule == "infinite" else {}
        if self.schedule == "wsd":
            at_most = {"decay_share": self.decay_share}
        for key, share in at_most.items():
            if self.warmup_share + (share or 0) > 1:
                raise ValueError(f"warmup_share and {key} are more than all steps together; lower one")
        return self

    def document(self) -> dict[str, Any]:
        """Keys that came later stand there only when they are not the default: older recipes keep their digest."""
        fields, default = self.model_dump(mode="json"), Recipe().model_dump(mode="json")
        later = {"packing", "preference", "weights", "lean", *_PARTS["infinite"]}
        kept = {key: value for key, value in fields.items() if key not in later or value != default[key]}
        return {"schema": RECIPE_SCHEMA, **kept}

    def slower(self, factor: float) -> Recipe:
        """With its rates times ``factor`` (at most 1), except a constant rate and what is below it: that is the line's."""
        lower = max(self.learning_rate * factor, self.constant_rate or 0.0)
        rates = {"learning_rate": min(self.learning_rate, lower)}
        if self.schedule == "wsd" and self.final_rate is not None:
            rates["final_rate"] = self.final_rate * factor
        return self.model_copy(update=rates)

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Recipe:
        return cls.model_validate({key: value for key, value in document.items() if key != "schema"})


class ModelSettings(_Strict):
    """The policy of a model and how the loop treats it."""

    gates: list[GateConfig] = []
    approvals: Annotated[int, Field(ge=0)] = 0
    attempts: Annotated[int, Field(ge=1)] = 2
    methods: list[str] = []
    retry_methods: list[str] = ["experience-replay:ratio=0.3", "ewc:strength=1000"]
    recipe: dict[str, Any] = {}

    def policy(self) -> dict[str, Any]:
        """The part that judges, as the document that a decision pins."""
        return {
            "schema": "meristem/policy/v1",
            "gates": [{"gate": g.gate, "suites": g.suites, **g.arguments} for g in self.gates],
            "approvals": self.approvals,
        }


Days = Annotated[float, Field(ge=0)]


class WorkspaceConfig(_Strict):
    """``store`` and ``packs`` are URLs of what a team shares (None: in the workspace's folder).

    ``retention``: days that unused bytes are kept, per kind of asset (``adapter``, ``experts`` and ``full`` are weights).
    """

    schema_: Literal["meristem/workspace/v1"] = Field(alias="schema")
    store: Annotated[str, Field(pattern=r"^postgres(ql)?(\+psycopg)?://")] | None = None
    packs: Annotated[str, Field(min_length=1)] | None = None
    retention: dict[
        Literal["adapter", "experts", "full", "dataset", "suite", "recipe", "method-state"], Days
    ] = {}
    evaluation: EvaluationSettings = EvaluationSettings()
    defaults: dict[str, Any] = {}
    models: dict[str, dict[str, Any]] = {}

    def for_model(self, name: str) -> ModelSettings:
        """Defaults overridden key by key with what ``models: NAME`` says; ``recipe`` is merged one level deeper."""
        own = self.models.get(name, {})
        merged = {**self.defaults, **own}
        recipes = [settings["recipe"] for settings in (self.defaults, own) if "recipe" in settings]
        if all(isinstance(recipe, dict) for recipe in recipes):  # else ModelSettings says what is wrong
            merged["recipe"] = {key: value for recipe in recipes for key, value in recipe.items()}
        return ModelSettings.model_validate(merged)


def load_config(path: Path) -> WorkspaceConfig:
    """Read and check ``meristem.yaml``, every model's settings included. Raises ``BadInput`` with the place."""
    config = _validated(path, WorkspaceConfig, _yaml(path))
    assert isinstance(config, WorkspaceConfig)
    for name in [None, *config.models]:
        where = f"models.{name}" if name else "defaults"
        try:
            settings = config.for_model(name or "")
        except ValidationError as error:
            raise BadInput.at(path, None, _first(error, where)) from error
        _validated(path, Recipe, settings.recipe, f"{where}.recipe")
    return config


def load_recipe(path: Path) -> dict[str, Any]:
    """A recipe file as overrides of the default recipe. Raises ``BadInput`` with file and key."""
    fields = _yaml(path)
    schema = fields.pop("schema", RECIPE_SCHEMA)
    if schema != RECIPE_SCHEMA:
        raise BadInput(f"{path}: schema: this Meristem reads {RECIPE_SCHEMA} (found {_shown(schema)})")
    _validated(path, Recipe, fields)
    return fields


def resolve_recipe(*overrides: dict[str, Any]) -> Recipe:
    """The default recipe with ``overrides`` applied in order. Raises ``BadInput`` naming the key."""
    merged: dict[str, Any] = {}
    for fields in overrides:
        merged.update(fields)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise BadInput(_first(error, "recipe")) from error


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader; a key that stands twice is refused, because one of the two would silently lose."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                twice = f"the key '{key.value}' stands twice; keep one"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _yaml(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # a SafeLoader
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise BadInput.at(path, line, f"not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
    if not isinstance(fields, dict):
        raise BadInput(f"{path}: expected keys and values at the top level")
    return fields


def _validated(path: Path, kind: type[BaseModel], fields: dict[str, Any], where: str = "") -> BaseModel:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise BadInput.at(path, None, _first(error, where)) from error


def _first(error: ValidationError, prefix: str = "") -> str:
    """pydantic's first complaint as one line with the key's path."""
    detail = error.errors()[0]
    where = ".".join(str(part) for part in ([prefix] if prefix else []) + list(detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown key; check its spelling and its indentation"
    if detail["type"] == "missing":
        return f"{where}: missing; add it"
    told = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else detail["msg"].lower()
    where = f"{where}: " if where else ""
    return f"{where}{told} (found {_shown(detail['input'])})"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
