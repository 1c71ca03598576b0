"""Plain Hugging Face / PEFT folders in and out of the store, tensor by tensor, without torch."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from meristem.ecosystem.records import Content
from meristem.errors import BadInput, Tampered
from meristem.store.canonical import digest_bytes, digest_tensor
from meristem.store.packs import Blob, Location, disk_failure, safetensors_entries
from meristem.store.store import Store

ADAPTER_CONFIG = "adapter_config.json"
_KEPT_SUFFIXES = {".json", ".jinja", ".txt", ".model"}
_SKIPPED = {"model.safetensors.index.json", "trainer_state.json", "meristem.json"}
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

Progress = Callable[[int, int], None]


@contextmanager
def ingest(folder: Path, base: str | None = None) -> Iterator[tuple[Content, list[Blob]]]:
    """Read a model or adapter folder as ``(content, blobs)``; blobs are valid inside the ``with``.

    ``base`` is the content digest that an adapter sits on. Raises ``BadInput`` for a folder without
    safetensors weights or without a configuration, and for pickled weights, which are never opened.
    """
    folder = Path(folder)
    weights = _weight_files(folder)
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    if not is_adapter and not (folder / "config.json").exists():
        raise BadInput(
            f"{folder}: no config.json or {ADAPTER_CONFIG}; give a Hugging Face model or PEFT folder"
        )
    if is_adapter and base is None:
        raise BadInput(f"{folder}: this is an adapter; name the model that it sits on with --base")
    with ExitStack() as stack:
        tensors: dict[str, Blob] = {}
        for path in weights:
            tensors |= _tensors(path, stack)
        files = {path.name: Blob.file(_file_bytes(path)) for path in _config_files(folder)}
        content = Content(
            kind="adapter" if is_adapter else "full",
            base=base if is_adapter else None,
            tensors={name: blob.digest for name, blob in sorted(tensors.items())},
            files={name: blob.digest for name, blob in sorted(files.items())},
        )
        yield content, [*tensors.values(), *files.values()]


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give a local Hugging Face folder or `embedded`")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLED]
        why = f"only pickled weights ({pickled[0]}), which are never opened" if pickled else "no weights"
        raise BadInput(f"{folder}: {why}; save the model as safetensors (save_pretrained does)")
    return weights


def _tensors(path: Path, stack: ExitStack) -> dict[str, Blob]:
    try:
        entries = safetensors_entries(path)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error
    file = stack.enter_context(path.open("rb"))
    mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    view = memoryview(mapped)
    stack.callback(view.release)
    blobs = {}
    for name, (dtype, shape, offset, length) in entries.items():
        part = view[offset : offset + length]
        stack.callback(part.release)
        blobs[name] = Blob.tensor(dtype, shape, part)
    return blobs


def _config_files(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _KEPT_SUFFIXES and path.name not in _SKIPPED
    ]


def _file_bytes(path: Path) -> bytes:
    return _neutral_adapter_config(path.read_bytes()) if path.name == ADAPTER_CONFIG else path.read_bytes()


def _neutral_adapter_config(body: bytes) -> bytes:
    """PEFT writes sets in any order and the base's path of this machine: neither belongs to the content."""
    config = json.loads(body)
    config["base_model_name_or_path"] = None
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def checkout(
    store: Store,
    content: Content,
    folder: Path,
    *,
    base_folder: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Write ``content`` as a plain folder that transformers, PEFT and vLLM load as it is.

    Every byte is checked against its digest on the way out. An adapter's configuration is pointed at
    ``base_folder``. Raises ``Tampered`` when stored bytes do not match.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, digest in content.files.items():
            body = store.read_blob(digest)
            if name == ADAPTER_CONFIG and base_folder is not None:
                body = _with_base(body, base_folder)
            (folder / name).write_bytes(body)
        weights = "adapter_model.safetensors" if content.kind == "adapter" else "model.safetensors"
        _write_weights(store, content, folder / weights, progress)
    except OSError as error:
        raise disk_failure(error, folder) from error


def _with_base(body: bytes, base_folder: Path) -> bytes:
    config = json.loads(body)
    config["base_model_name_or_path"] = str(base_folder)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _write_weights(store: Store, content: Content, path: Path, progress: Progress | None) -> None:
    locations = store.locations(set(content.tensors.values()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, digest in content.tensors.items():
        found = locations[digest]
        header[name] = {
            "dtype": found.dtype,
            "shape": list(found.shape),
            "data_offsets": [position, position + found.length],
        }
        position += found.length
    body = json.dumps(header, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    with path.open("wb") as file, ExitStack() as stack:
        packs = {p: stack.enter_context(store.mapped(p)) for p in {x.pack for x in locations.values()}}
        file.write(struct.pack("<Q", len(body)) + body)
        for digest in content.tensors.values():
            file.write(_checked(locations[digest], packs[locations[digest].pack]))
            if progress:
                progress(file.tell(), position)


def _checked(location: Location, pack: memoryview) -> memoryview:
    part = pack[location.offset : location.offset + location.length]
    if len(part) != location.length or not location.check(part):
        raise Tampered(f"bytes of {location.digest} in pack {location.pack} do not match their digest")
    return part


def matches(content: Content, folder: Path) -> bool:
    """Whether ``folder`` still holds exactly ``content`` (an adapter's base path aside)."""
    weights = "adapter_model.safetensors" if content.kind == "adapter" else "model.safetensors"
    try:
        entries = safetensors_entries(folder / weights)
        files_good = all(_file_digest(folder / name) == d for name, d in content.files.items())
        return (
            files_good
            and set(entries) == set(content.tensors)
            and _tensors_match(content, folder / weights, entries)
        )
    except (OSError, ValueError):
        return False


def _file_digest(path: Path) -> str:
    return digest_bytes(_file_bytes(path))


def _tensors_match(content: Content, path: Path, entries: dict[str, Any]) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        try:
            return all(
                digest_tensor(dtype, shape, bytes(view[offset : offset + length])) == content.tensors[name]
                for name, (dtype, shape, offset, length) in entries.items()
            )
        finally:
            view.release()
