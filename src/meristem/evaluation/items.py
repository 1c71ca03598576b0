"""Test items: a JSON object of a suite's data file becomes an ``Item`` with its prompt resolved."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meristem.data.formats import identifier, messages_of
from meristem.data.jsonl import Refused, read_objects, stem_of
from meristem.errors import BadInput

if TYPE_CHECKING:
    from meristem.evaluation.tasks.base import TaskType

KNOWN = frozenset({"id", "slice", "cluster"})
PROMPT = frozenset({"prompt", "messages"})


@dataclass(frozen=True)
class Message:
    role: str
    content: str

    def to_document(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Item:
    """One question.

    ``source`` is the raw input that a prompt template was filled with (leak checks). ``references`` are further
    right answers, ``text`` what a perplexity item holds, ``cluster`` what items share that come from one source.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    options: tuple[str, ...] = ()
    slice: str | None = None
    source: str | None = None
    references: tuple[str, ...] = ()
    text: str | None = None
    cluster: str | None = None

    def chat(self) -> list[dict[str, str]]:
        return [message.to_document() for message in self.messages]

    def to_document(self) -> dict[str, Any]:
        """Later fields stand in it only where they say something, so that older digests stay what they were."""
        late = {"references": list(self.references), "text": self.text, "cluster": self.cluster}
        return {
            "id": self.id,
            "messages": self.chat(),
            "answer": self.answer,
            "options": list(self.options),
            "slice": self.slice,
            "source": self.source,
            **{key: value for key, value in late.items() if value},
        }

    @classmethod
    def from_document(cls, stored: dict[str, Any]) -> Item:
        """``KeyError`` or ``TypeError`` for a damaged one."""
        return cls(
            id=stored["id"],
            messages=tuple(Message(**message) for message in stored["messages"]),
            answer=stored["answer"],
            options=tuple(stored["options"]),
            slice=stored["slice"],
            source=stored["source"],
            references=tuple(stored.get("references", ())),
            text=stored.get("text"),
            cluster=stored.get("cluster"),
        )


@dataclass(frozen=True)
class Rules:
    """What a task says about all of its items."""

    settings: TaskType
    template: str | None = None
    system: str | None = None


def template_fields(template: str) -> tuple[str, ...]:
    """Names in a ``{text}`` template, in order; ``Refused`` for anything beyond plain names."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise Refused(f"prompt template: {error}; write {{{{ and }}}} for literal braces") from None
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, spec, conversion in parts:
        # {a.b} and {a[0]} would reach into Python objects
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise Refused(f"prompt template: only plain {{field}} names are allowed, not {{{name}}}")
    if not names:
        raise Refused("prompt template: it uses no {field}, so every item would be the same question")
    return tuple(dict.fromkeys(names))


def read_items(path: str | Path, rules: Rules) -> tuple[Item, ...]:
    """All items of a data file; ``BadInput`` with file, line and remedy."""
    path = Path(path)
    stem = stem_of(path)
    items: list[Item] = []
    lines: dict[str, int] = {}
    for number, raw in read_objects(path):
        try:
            item = make_item(raw, rules, f"{stem}-{number}")
        except Refused as error:
            raise BadInput.at(path, number, str(error)) from None
        if item.id in lines:
            raise BadInput.at(
                path, number, f"id {item.id!r} is already used on line {lines[item.id]}; make ids unique"
            )
        lines[item.id] = number
        items.append(item)
    return tuple(items)


def make_item(raw: dict[str, Any], rules: Rules, default_id: str) -> Item:
    settings = rules.settings
    fields = template_fields(rules.template) if rules.template else ()
    known = KNOWN | settings.KEYS | (PROMPT if settings.PROMPTED else frozenset())
    unknown = raw.keys() - known - set(fields)
    for field in fields:  # before the unknown keys, which may be what the template means
        if unknown and raw.get(field) is None:
            raise Refused(
                f"the prompt template asks for {field!r}, which this item lacks; it has {sorted(raw)}: "
                "correct the template or the item"
            )
    if unknown:
        raise Refused(
            f"unknown keys {sorted(unknown)}; an item has {sorted(known)} and the fields of its task's prompt template"
        )
    messages, source = _messages(raw, rules, fields) if settings.PROMPTED else ((), None)
    named = {key: text_of(raw[key], f'"{key}"') for key in ("slice", "cluster") if raw.get(key) is not None}
    parts: dict[str, Any] = {"answer": "", **settings.parts(raw), **named}
    item = Item(id=identifier(raw.get("id"), default_id), messages=messages, source=source, **parts)
    settings.check(item)
    return item


def check_options(value: Any) -> tuple[str, ...]:
    """At least two different non-empty strings."""
    if not isinstance(value, list | tuple) or not all(isinstance(o, str) and o.strip() for o in value):
        raise Refused('"options" must be a list of non-empty strings')
    if len(value) < 2:
        raise Refused(f'"options" has {len(value)} entry; a choice needs at least two')
    twice = sorted({o for o in value if value.count(o) > 1})
    if twice:
        raise Refused(f'"options" repeats {twice[0]!r}; remove the duplicate')
    return tuple(value)


def text_of(value: Any, name: str) -> str:
    """``value`` as a non-empty string, or ``Refused``."""
    if not isinstance(value, str) or not value.strip():
        raise Refused(f"{name} must be a non-empty string")
    return value


def _messages(
    raw: dict[str, Any], rules: Rules, fields: Sequence[str]
) -> tuple[tuple[Message, ...], str | None]:
    source = None
    if rules.template:
        values = {name: _field(raw, name) for name in fields}
        source = " ".join(values.values())
        found = [{"role": "user", "content": rules.template.format_map(values)}]
    elif ("prompt" in raw) == ("messages" in raw):
        raise Refused('an item needs either "prompt" (a string) or "messages", not both and not neither')
    elif "prompt" in raw:
        found = [{"role": "user", "content": text_of(raw["prompt"], '"prompt"')}]
    else:
        found = messages_of(raw["messages"])
        if found[-1]["role"] == "assistant":
            raise Refused('"messages" must end before the assistant\'s answer; put it in "answer"')
    if rules.system is not None:
        if found[0]["role"] == "system":
            raise Refused("the task and the item both give a system message; remove one")
        found = [{"role": "system", "content": rules.system}, *found]
    return tuple(Message(m["role"], m["content"]) for m in found), source


def _field(raw: dict[str, Any], name: str) -> str:
    value = raw.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if value is None:
        raise Refused(f"the field {name!r} of the prompt template is missing; add it or change the template")
    return text_of(value, f"the field {name!r}")
