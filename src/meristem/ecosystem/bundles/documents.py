"""The documents of a bundle: each is what its digest says, and together they are one version's closure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pydantic import ValidationError

from meristem.config import Recipe
from meristem.ecosystem import folders, models
from meristem.ecosystem.bundles import form
from meristem.ecosystem.bundles.form import Bundle, is_digest, lines_of
from meristem.ecosystem.bundles.place import Place
from meristem.ecosystem.records import (
    Asset,
    BundleImport,
    Content,
    Evaluation,
    Model,
    Record,
    Version,
    parse_document,
    references,
)
from meristem.errors import BadInput, Tampered
from meristem.store.canonical import canonical

_CARRIED = (Model, Version, Content, Asset, Evaluation)
_KEPT = (".json", ".jinja", ".txt", ".model")  # what ``folders.ingest`` keeps; a pickle is none of them


def read_documents(
    place: Place, manifest: Bundle, body: bytes
) -> tuple[dict[str, dict[str, Any]], dict[str, Record | None]]:
    where = f"{place.label}: {form.DOCUMENTS}"
    documents = lines_of(where, body)
    if list(documents) != manifest.documents:
        raise Tampered(f"{where}: these are not the documents that {form.MANIFEST} lists")
    return documents, {digest: _record(where, digest, found) for digest, found in documents.items()}


def _record(where: str, digest: str, document: dict[str, Any]) -> Record | None:
    """The record of a carried document. Raises ``Tampered`` for one that no Meristem would have written."""
    record = parse_document(document)
    try:
        if record is None:
            _recipe(document)
        elif not isinstance(record, _CARRIED):
            raise BadInput(f"a {document['schema']} document is no part of a version")
        elif canonical(record.document()) != canonical(document):
            raise BadInput("it is not as this Meristem would write it")
        else:
            _check_record(record)
    except (BadInput, ValueError) as error:
        raise Tampered(f"{where}: document {digest}: {' '.join(str(error).split())}") from error
    return record


def _recipe(document: dict[str, Any]) -> None:
    try:
        if Recipe.from_document(document).document() == document:
            return
    except ValidationError as error:
        raise BadInput(error.errors()[0]["msg"]) from error
    raise BadInput("not a recipe")


def _check_record(record: Record) -> None:
    document = record.document()
    if odd := [name for names in references(document) for name in names if not is_digest(name)]:
        raise BadInput(f"it names {odd[0]!r} where a digest belongs")
    if isinstance(record, Content):
        _check_content(record)
    elif isinstance(record, Model):
        models.check_name("model", record.name)
        if (record.base is None) != (record.tier == "foundation"):
            raise BadInput(f"a {record.tier} model with the base {record.base}")
    elif isinstance(record, Asset):
        models.check_name(record.kind, record.name)
        if odd_names := [
            name for name in record.files if name in ("", ".", "..") or set(name) & set("/\\\0")
        ]:
            raise BadInput(f"{odd_names[0]!r} is not a plain file name")


def _check_content(content: Content) -> None:
    """A stranger's content may hold no file that loads code, or that makes a loader look elsewhere."""
    if (content.base is None) != (content.kind == "full"):
        raise BadInput(f"a content of kind {content.kind} with the base {content.base}")
    found = {kind for kind, name in folders.CONFIGS.items() if name in content.files}
    if content.kind not in found or found - {content.kind, "full"}:
        raise BadInput(f"its files are not those of a content of kind {content.kind}")
    if odd := [name for name in content.files if not name.endswith(_KEPT)]:
        raise BadInput(f"{odd[0]!r} is not a file of a version")
    if "__metadata__" in content.tensors or not content.tensors:
        raise BadInput("its tensors cannot be written as safetensors")


def check_shape(
    place: Place,
    manifest: Bundle,
    documents: Mapping[str, dict[str, Any]],
    records: Mapping[str, Record | None],
    beside: Mapping[str, dict[str, Any]],
) -> None:
    """The documents are one version's closure, its models, evaluations of it and reports about it; nothing else."""

    def wrong(what: str) -> NoReturn:
        raise Tampered(f"{place.label}: {form.DOCUMENTS}: {what}")

    def read(digest: str) -> dict[str, Any]:
        if digest not in documents:
            wrong(f"document {digest} is missing")
        return documents[digest]

    if not isinstance(records.get(manifest.version), Version):
        wrong(f"there is no version {manifest.version}")
    lineage = form.ordered([manifest.version], read)
    named = [digest for digest, record in records.items() if isinstance(record, Model)]
    evaluations = [digest for digest, record in records.items() if isinstance(record, Evaluation)]
    reports = sorted(d["report"] for d in beside.values() if d["schema"] == BundleImport.SCHEMA)
    if form.ordered([*named, manifest.version, *sorted(evaluations), *reports], read) != manifest.documents:
        wrong(f"not in order, or with a document that does not belong to {manifest.label}")
    for digest in evaluations:
        content = references(documents[digest])[0]
        if not content <= set(lineage):
            wrong(f"evaluation {digest} is about another content")
    _check_models(records, named, lineage, wrong)
    for digest in manifest.documents:
        _check_kinds(digest, records, wrong)
    if not set(manifest.absent) <= set(documents) - {manifest.version}:
        raise Tampered(f"{place.label}: {form.MANIFEST}: what it calls absent is no part of the bundle")


def _check_models(
    records: Mapping[str, Record | None],
    named: list[str],
    lineage: list[str],
    wrong: Callable[[str], NoReturn],
) -> None:
    """Every model that a version names, and those below it, each once, bases first and of no narrower tier."""
    tiers: dict[str, int] = {}
    bases: dict[str, str | None] = {}
    for digest in named:
        model = records[digest]
        assert isinstance(model, Model)
        tier = models.TIERS.index(model.tier)
        if model.name in tiers:
            wrong(f"two models are called {model.name}")
        if model.base is not None and tiers.get(model.base, len(models.TIERS)) > tier:
            wrong(f"model {model.name} does not follow its base {model.base}")
        tiers[model.name], bases[model.name] = tier, model.base
    wanted = {r.model for d in lineage if isinstance(r := records[d], Version)}
    needed: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in bases:
            wrong(f"model {name} is missing")
        needed.add(name)
        base = bases[name]
        wanted |= {base} - needed if base else set()
    if needed != set(bases):
        wrong(f"model {min(set(bases) - needed)} has no version here")


def _check_kinds(digest: str, records: Mapping[str, Record | None], wrong: Callable[[str], NoReturn]) -> None:
    """Each reference leads to a document of the kind that its field is for."""

    def must(name: str | None, kind: type[Record] | None) -> None:
        if name is not None and not isinstance(records[name], kind or type(None)):
            wrong(f"document {digest} names {name}, which is something else")

    record = records[digest]
    if isinstance(record, Version):
        must(record.content, Content)
        must(record.recipe, None)
        for name in [record.base, *record.parents]:
            must(name, Version)
        for name in [*record.data, *record.assets.values()]:
            must(name, Asset)
        for name in record.data:
            if (found := records[name]) and isinstance(found, Asset) and found.kind != "dataset":
                wrong(f"document {digest} names {name} as a data set, which it is not")
    elif isinstance(record, Content):
        base = records[record.base] if record.base else None
        must(record.base, Content)
        if isinstance(base, Content) and base.kind != "full":
            wrong(f"{record.kind} {digest} sits on something else than full weights")
    elif isinstance(record, Evaluation):
        must(record.content, Content)
