"""Best-known settings: a file beside each method with the run that found them, e.g. ``ewc.settings.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meristem.errors import BadInput
from meristem.methods import _static
from meristem.methods.registry import entry

SCHEMA = "meristem/method-settings/v1"
SUFFIX = ".settings.yaml"
RULE = "highest ACC over the stream, ties by BWT; fixed before the runs were looked at"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class Trial(_Strict):
    """One setting that was tried: what was given on the command line, and its scores as means over the seeds."""

    method: str
    acc: Annotated[float, Field(ge=0, le=1)]
    bwt: Annotated[float, Field(ge=-1, le=1)]


class FoundBy(_Strict):
    """The runs that chose; ``content`` is the model's digest, ``sequential`` plain fine-tuning under the same conditions."""

    command: str
    protocol: str
    order: str
    split: Literal["development"]
    seeds: Annotated[list[int], Field(min_length=1)]
    model: str
    content: str
    train_rows: int
    items: int
    steps: int | None
    libraries: dict[str, str]
    rule: str
    sequential: Trial | None
    tried: Annotated[list[Trial], Field(min_length=1)]

    @property
    def best(self) -> Trial:
        return max(self.tried, key=lambda trial: (trial.acc, trial.bwt))


class MethodSettings(_Strict):
    """``arguments`` are all of the method's, so that they stay what they were when a default changes."""

    schema_: Literal["meristem/method-settings/v1"] = Field(alias="schema")
    method: str
    arguments: dict[str, Any]
    found: FoundBy

    def to_document(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


def path_of(name: str) -> Path:
    """Where the settings of the method ``name`` stand, whether there are any or not."""
    registered = entry(name)
    source = _static.source_of(registered.module)
    if source is None:
        raise BadInput(f"method {name!r} ({registered.value}) has no source file to keep settings beside")
    return source.with_name(source.stem + SUFFIX)


def best_known(name: str) -> MethodSettings | None:
    """The settings of the method ``name``; None where nobody has looked for them."""
    path = path_of(name)
    if not path.is_file():
        return None
    try:
        found = MethodSettings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise BadInput(f"{path}: not a {SCHEMA} file ({str(error).splitlines()[0]})") from error
    if found.method != name:
        raise BadInput(f"{path}: settings of {found.method!r} beside the method {name!r}")
    return found
