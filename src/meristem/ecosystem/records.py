"""The documents of the domain: frozen, typed, each with a schema id. Unknown schemas are refused.

What keys anything (contents, versions, assets, plans, updates, evaluations, decisions, releases) holds no clock, no
host and no person: those stand in its event, so the same work gives the same digest on every machine. Two records say
what happened here and now, and nothing is looked up by their digests: ``UpdateOutcome`` (its ``seconds`` are what an
update cost) and ``Approval`` (its ``actor`` is the evidence). ``Model`` keeps of a local source the folder's name alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from meristem.errors import BadInput
from meristem.store.canonical import digest_document

Tier = Literal["foundation", "industrial", "application"]
Outcome = Literal["pass", "fail", "inconclusive"]
SignalKind = Literal[
    "new-data", "regression", "incident", "base-upgrade", "drift", "demand", "traces", "feedback"
]


class Record(BaseModel):
    """A stored document. ``SCHEMA`` is written with it and checked when it is read.

    ``DOCUMENTS`` and ``BLOBS`` name the fields whose digests must be in the store as well: what a version, a
    decision or an event can reach, and so what an audit asks for and nothing may collect.
    """

    # Built on first use: a command reads few kinds of record.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    SCHEMA: ClassVar[str]
    DOCUMENTS: ClassVar[tuple[str, ...]] = ()
    BLOBS: ClassVar[tuple[str, ...]] = ()

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
    """What a version *is*: its digest keys evaluations. An adapter and experts name the content they sit on."""

    SCHEMA = "meristem/content/v1"
    DOCUMENTS = ("base",)
    BLOBS = ("tensors", "files")
    kind: Literal["full", "adapter", "experts"]
    base: str | None
    tensors: dict[str, str]  # name -> tensor digest
    files: dict[str, str]  # name -> file digest

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, str]) -> dict[str, str]:
        odd = [name for name in files if name in ("", ".", "..") or set(name) & set("/\\\0")]
        if odd:  # a checkout writes under these names
            raise ValueError(f"{odd[0]!r} is not a plain file name")
        return files


class Version(Record):
    """A content plus where it came from. ``base`` is the pinned base *version* (a digest)."""

    SCHEMA = "meristem/version/v1"
    DOCUMENTS = ("content", "base", "parents", "recipe", "data", "assets")
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
    BLOBS = ("files", "tensors")
    kind: str
    name: str
    files: dict[str, str]
    tensors: dict[str, str] = {}
    facts: dict[str, Any] = {}


class Signal(Record):
    SCHEMA = "meristem/signal/v1"
    DOCUMENTS = ("data", "cause")
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
    DOCUMENTS = ("signals", "parent", "data", "recipe", "suites", "policy")
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
    policy: str | None = None  # what set the criteria, and how many approvals a pass needs
    budget: dict[str, Any] = {}


class Update(Record):
    """The manifest of one training run: everything that decides its result, and nothing else.

    The plan is not in it: a later plan for the same training takes the update over as it is.
    """

    SCHEMA = "meristem/update/v1"
    DOCUMENTS = ("parent", "data", "recipe", "method_state")
    model: str
    parent: str
    data: list[str]
    recipe: str
    method_state: str | None
    code: dict[str, str]


class UpdateOutcome(Record):
    """What an update produced and what it cost."""

    SCHEMA = "meristem/update-outcome/v1"
    DOCUMENTS = ("update", "version")
    update: str
    version: str
    steps: int
    tokens: int
    seconds: float
    curve: list[dict[str, float]]


class Reproduction(Record):
    """What executing an update again gave: the bytes of its version, or the first difference from them."""

    SCHEMA = "meristem/reproduction/v1"
    DOCUMENTS = ("update", "version")
    update: str
    version: str
    equal: bool
    difference: dict[str, Any] | None


class Evaluation(Record):
    """Scores of one content on one suite with one engine; the items lie in the file ``results``."""

    SCHEMA = "meristem/evaluation/v1"
    DOCUMENTS = ("content",)
    BLOBS = ("results",)
    content: str
    suite: str
    engine: str
    settings: dict[str, Any]
    results: str
    summary: dict[str, Any]


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
    DOCUMENTS = ("version", "champion", "plan", "policy", "evaluations")
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
    DOCUMENTS = ("decision",)
    decision: str
    actor: str
    reason: str


class Release(Record):
    SCHEMA = "meristem/release/v1"
    DOCUMENTS = ("version", "previous", "decision")
    model: str
    kind: Literal["promote", "rollback"]
    version: str
    previous: str
    revision: int
    decision: str | None
    reason: str = Field(default="")


class BundleImport(Record):
    """A version that came out of a bundle, and what its workspace of origin had recorded about it.

    ``bundle`` is the digest of ``bundle.json``, ``head`` the hash of the newest foreign event; the asset ``report``
    keeps the manifest and the events as they came.
    """

    SCHEMA = "meristem/bundle-import/v1"
    DOCUMENTS = ("version", "report")
    bundle: str
    version: str
    report: str
    evidence: str
    head: str
    sequence: int


class Collection(Record):
    """What a garbage collection took away: retired versions and assets by kind, and the bytes that became free."""

    SCHEMA = "meristem/collection/v1"
    retired: dict[str, int]
    blobs: int
    packs: int
    repacked: int
    leftovers: int
    folders: int
    bytes: int


_RECORDS: dict[str, type[Record]] = {kind.SCHEMA: kind for kind in Record.__subclasses__()}
# Settings that the configuration writes; they name nothing.
_PLAIN = ("meristem/recipe/v1", "meristem/policy/v1", "meristem/migration/v1", "meristem/key/v1")


def parse_document(document: dict[str, Any]) -> Record | None:
    """The record that a document is, None for plain settings.

    Raises ``BadInput`` for a schema that this Meristem does not read and for a document that does not follow its own.
    """
    schema = document.get("schema")
    if schema in _PLAIN:
        return None
    if schema not in _RECORDS:
        raise BadInput(f"unknown document schema {schema}; use a Meristem that reads it")
    return _RECORDS[schema].from_document(document)


def blob_schemas() -> list[str]:
    """The schemas whose documents name blobs."""
    return [schema for schema, kind in _RECORDS.items() if kind.BLOBS]


def references(document: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Digests of the documents and of the blobs that a stored document names.

    Raises ``BadInput`` for a schema that this Meristem does not read.
    """
    schema = document.get("schema")
    if schema in _PLAIN:
        return set(), set()
    if schema not in _RECORDS:
        raise BadInput(f"unknown document schema {schema}; use a Meristem that reads it")
    kind = _RECORDS[schema]
    return set(_named(document, kind.DOCUMENTS)), set(_named(document, kind.BLOBS))


def _named(document: dict[str, Any], fields: tuple[str, ...]) -> Iterator[str]:
    for field in fields:
        value = document.get(field)
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value.values()
        else:
            yield from value or []
