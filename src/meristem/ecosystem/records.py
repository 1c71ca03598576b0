"""The documents of the domain: frozen, typed, each with a schema id. Unknown schemas are refused.

A record never holds a clock, a host or an actor (those stand in its event), so the same work gives the same
digest on every machine.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meristem.errors import BadInput
from meristem.store.canonical import digest_document

Tier = Literal["foundation", "industrial", "application"]
Outcome = Literal["pass", "fail", "inconclusive"]
SignalKind = Literal[
    "new-data", "regression", "incident", "base-upgrade", "drift", "demand", "traces", "feedback"
]


class Record(BaseModel):
    """A stored document. ``SCHEMA`` is written with it and checked when it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    SCHEMA: ClassVar[str]

    def document(self) -> dict[str, Any]:
        return {"schema": self.SCHEMA, **self.model_dump(mode="json")}

    @property
    def digest(self) -> str:
        return digest_document(self.document())

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Self:
        fields = dict(document)
        schema = fields.pop("schema", None)
        if schema != cls.SCHEMA:
            raise BadInput(f"expected a {cls.SCHEMA} document, found {schema}; use a Meristem that reads it")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise BadInput(f"not a valid {cls.SCHEMA} document: {error.errors()[0]['msg']}") from error


class Model(Record):
    """A named node of the ecosystem. ``fingerprint`` identifies the bytes that it was first made from."""

    SCHEMA = "meristem/model/v1"
    name: str
    tier: Tier
    base: str | None
    source: str
    fingerprint: str | None


class Content(Record):
    """What a version *is*: its digest keys evaluations. An adapter names the content it sits on."""

    SCHEMA = "meristem/content/v1"
    kind: Literal["full", "adapter"]
    base: str | None
    tensors: dict[str, str]  # name -> tensor digest
    files: dict[str, str]  # path -> file digest


class Version(Record):
    """A content plus where it came from. ``base`` is the pinned base *version* (a digest)."""

    SCHEMA = "meristem/version/v1"
    model: str
    content: str
    base: str | None
    parents: list[str]
    recipe: str | None = None
    data: list[str] = []
    tasks: list[str] = []  # tasks whose data this version learned, its ancestors' included
    assets: dict[str, str] = {}
    code: dict[str, str] = {}


class Asset(Record):
    """A versioned capability asset; ``files`` are blobs, ``facts`` what people want to know at a glance."""

    SCHEMA = "meristem/asset/v1"
    kind: str
    name: str
    files: dict[str, str]
    tensors: dict[str, str] = {}
    facts: dict[str, Any] = {}


class Signal(Record):
    SCHEMA = "meristem/signal/v1"
    kind: SignalKind
    model: str
    data: list[str] = []
    note: str = ""
    cause: str | None = None  # the decision, incident or version behind it
    details: dict[str, Any] = {}


class Criterion(Record):
    """One gate with its numbers, fixed before training."""

    SCHEMA = "meristem/criterion/v1"
    gate: str
    suite: str
    arguments: dict[str, Any]


class Plan(Record):
    """What will be done about some signals, and by which criteria it will be judged."""

    SCHEMA = "meristem/plan/v1"
    model: str
    action: Literal["update", "wait"]
    reason: str
    signals: list[str]
    parent: str
    attempt: int = 1
    data: list[str] = []
    recipe: str | None = None
    suites: dict[str, str] = {}
    criteria: list[Criterion] = []
    budget: dict[str, Any] = {}


class Update(Record):
    """The manifest of one training run: everything that decides its result."""

    SCHEMA = "meristem/update/v1"
    model: str
    parent: str
    data: list[str]
    recipe: str
    method_state: str | None
    plan: str | None
    code: dict[str, str]


class UpdateOutcome(Record):
    """What an update produced and what it cost."""

    SCHEMA = "meristem/update-outcome/v1"
    update: str
    version: str
    steps: int
    tokens: int
    seconds: float
    curve: list[dict[str, float]]


class Evaluation(Record):
    """Scores of one content on one suite with one engine; the items lie in the file ``results``."""

    SCHEMA = "meristem/evaluation/v1"
    content: str
    suite: str
    engine: str
    settings: dict[str, Any]
    results: str
    summary: dict[str, Any]
    seconds: float


class GateResult(Record):
    SCHEMA = "meristem/gate-result/v1"
    gate: str
    suite: str
    outcome: Outcome
    reason: str
    numbers: dict[str, Any]
    needed: int | None = None


class Decision(Record):
    """The verdict on one version against one champion; void once that champion has moved."""

    SCHEMA = "meristem/decision/v1"
    model: str
    version: str
    champion: str
    champion_revision: int
    plan: str | None
    policy: str
    evaluations: list[str]
    gates: list[GateResult]
    outcome: Outcome
    approvals_needed: int


class Approval(Record):
    SCHEMA = "meristem/approval/v1"
    decision: str
    actor: str
    reason: str


class Release(Record):
    SCHEMA = "meristem/release/v1"
    model: str
    kind: Literal["promote", "rollback"]
    version: str
    previous: str
    revision: int
    decision: str | None
    reason: str = Field(default="")
