"""Where a task of lm-evaluation-harness comes from: a YAML file of the user's, or one inside the installed package.

A local file is data alone: ``!function`` and every other tag that names Python is refused, because no configuration
may name code to import. Tasks of the installed package may use its own functions: whoever installed the package
chose that code, and a stored suite can name nothing outside it.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from meristem.data.jsonl import Refused
from meristem.errors import BadInput
from meristem.evaluation.tasks.harness.shared import digest, first_line

_TASK_LINE = r"^task:[ \t]*[\"']?{}[\"']?[ \t]*(#.*)?$"


@dataclass(frozen=True)
class Source:
    """``config``: the resolved configuration; ``yaml``: its file inside the package, ``None`` for a local one;
    ``folders``: where a local one's data files are looked for."""

    config: dict[str, Any]
    yaml: str | None
    folders: tuple[Path, ...] = ()

    @property
    def digest(self) -> str:
        """Of the configuration; of a function, the name and the bytes of its file."""
        return digest(_plain(self.config))


def find(name: str, include_path: str | None, folder: Path) -> Source:
    """The task ``name``: a ``.yaml`` file beside the suite, in ``include_path``, or built in. ``Refused`` if none."""
    if name.endswith((".yaml", ".yml")):
        return _local(folder / name, folder)
    if include_path is not None:
        place = folder / include_path
        if not place.is_dir():
            raise Refused(f"include_path: no folder {include_path!r}; paths are relative to the suite")
        for file in sorted(place.rglob("*.yaml")):
            if _names(file, name):
                return _local(file, folder)
    for file in sorted(package_folder().rglob("*.yaml")):
        if _names(file, name):
            return built_in(file.relative_to(package_folder()).as_posix())
    raise Refused(
        f"lm-eval has no task {name!r} here; groups and tags are not tasks: give each of their tasks by name, "
        "or include_path, the folder of its YAML file"
    )


def built_in(path: str) -> Source:
    """A task file inside the installed package, by its path there; its functions are imported from the package."""
    from lm_eval.tasks._yaml_loader import load_yaml

    relative = PurePosixPath(path)
    file = package_folder() / relative
    if relative.is_absolute() or ".." in relative.parts or relative.suffix != ".yaml" or not file.is_file():
        raise BadInput(f"the installed lm-eval has no task file {path!r}; add the suite again")
    try:
        return Source(checked(load_yaml(file, resolve_func=True)), path)
    except Refused as error:
        raise BadInput(str(error)) from None
    except Exception as error:  # a built-in task's module may need anything
        raise BadInput(f"lm-eval cannot load its task file {path!r} ({first_line(error)})") from error


def package_folder() -> Path:
    found = find_spec("lm_eval")
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "tasks"


def with_data_paths(source: Source) -> dict[str, Any]:
    """The configuration with relative paths of data files resolved: beside the task's file, else beside the suite."""
    wanted = dict(source.config.get("dataset_kwargs") or {})
    for key in ("data_files", "data_dir"):
        if key in wanted:
            wanted[key] = _resolved(wanted[key], source.folders)
    return {**source.config, "dataset_kwargs": wanted} if wanted else dict(source.config)


def _names(file: Path, name: str) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")
    return re.search(_TASK_LINE.format(re.escape(name)), text, re.MULTILINE) is not None


def _local(file: Path, folder: Path) -> Source:
    if not file.is_file():
        shown = file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name
        raise Refused(f"no task file {shown!r}; paths are relative to the suite")
    return Source(checked(_read(file, ())), None, (file.parent, folder))


def _read(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file with its ``include`` merged as lm-eval does: what the file itself says wins."""
    file = file.resolve()
    if file in seen:
        raise Refused(f"{file.name} includes itself")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        tag = str(error.problem or "").rpartition("tag ")[2].strip("'") or "a tag"
        raise Refused(
            f"{file.name} uses {tag}: a local task that brings Python code is not run; say it as a template, "
            "or use a task of the installed lm-eval"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise Refused(f"{file.name} cannot be read ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise Refused(f"{file.name} is no mapping; a task of lm-eval is one")
    includes = found.pop("include", [])
    merged: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        if not isinstance(name, str):
            raise Refused(f"{file.name}: include names no file")
        inherited = _read(file.parent / name, (*seen, file))
        inherited.pop("task_list", None)
        merged.update(inherited)
    return {**merged, **found}


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """``Refused`` for kinds of task that cannot be frozen, or that would fetch or run other people's code."""
    if "class" in config:
        raise Refused("it is a Python class; only tasks that are a YAML file can be frozen")
    if "group" in config or isinstance(config.get("task"), list):
        raise Refused("it is a group; give each of its tasks by name")
    if not isinstance(config.get("task"), str):
        raise Refused("its file names no task")
    if config.get("dataset_path") == "pandas":
        raise Refused("its data is a pickle, which is code; save it as JSON or parquet")
    if config.get("unsafe_code"):
        raise Refused("it runs code that the model writes; that needs a sandbox, which is not here")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise Refused("it has images or audio; only text is supported")
    if config.get("use_prompt"):
        raise Refused("it takes its prompts from promptsource; write them into the task")
    if not isinstance(config.get("dataset_kwargs") or {}, dict):
        raise Refused("dataset_kwargs: not a mapping; write data_files: {test: FILE}")
    metrics = config.get("metric_list") or []
    if not isinstance(metrics, list) or not all(isinstance(metric, dict) for metric in metrics):
        raise Refused("metric_list: not a list of mappings; write - metric: NAME")
    if any(metric.get("hf_evaluate") for metric in metrics):
        raise Refused("it takes a metric from the Hugging Face hub, which is code; use a metric of lm-eval")
    return config


def _resolved(value: Any, folders: tuple[Path, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _resolved(inner, folders) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, folders) for inner in value]
    if not isinstance(value, str):
        raise Refused(f"dataset_kwargs: {value!r} is no file")
    return next((str((f / value).resolve()) for f in folders if (f / value).exists()), value)


def _plain(value: Any) -> Any:
    """``value`` as JSON: a function becomes its name and the digest of the file that it stands in."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if callable(value):
        return _function(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _function(value: Callable[..., Any]) -> dict[str, str]:
    inner = inspect.unwrap(getattr(value, "func", value))
    try:
        code = Path(inspect.getfile(inner)).read_bytes()
    except (TypeError, OSError):
        code = repr(type(inner)).encode()
    return {"function": getattr(inner, "__qualname__", ""), "file": hashlib.sha256(code).hexdigest()}
