"""Plain Hugging Face / PEFT folders in and out of the store, tensor by tensor, without torch."""

from __future__ import annotations

import errno
import json
import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from meristem import experts_format
from meristem.ecosystem.records import Content
from meristem.errors import BadInput, Tampered
from meristem.store.canonical import PREFIX, digest_bytes, tensor_hash
from meristem.store.files import disk_failure, pieces
from meristem.store.pack_format import DTYPE_SIZE, Blob, Entries, Location, encode_header, safetensors_entries
from meristem.store.store import Store
from meristem.store.threads import spread

ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
EXPERTS_CONFIG = experts_format.CONFIG
INDEX = "model.safetensors.index.json"
WEIGHTS = {
    "full": "model.safetensors",
    "adapter": "adapter_model.safetensors",
    "experts": experts_format.WEIGHTS,
}
CONFIGS = {"full": CONFIG, "adapter": ADAPTER_CONFIG, "experts": EXPERTS_CONFIG}
_KEPT_SUFFIXES = {".json", ".jinja", ".txt", ".model"}
_SKIPPED = {INDEX, "trainer_state.json", "meristem.json"}
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}

Progress = Callable[[int, int], None]


@contextmanager
def ingest(folder: Path, base: str | None = None) -> Iterator[tuple[Content, list[Blob]]]:
    """Read a folder of a model, an adapter or experts as ``(content, blobs)``; blobs are valid inside the ``with``.

    ``base`` is the content digest that an adapter or experts sit on. Raises ``BadInput`` for a folder without
    safetensors weights or without a configuration, and for pickled weights, which are never opened.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        try:
            content, blobs = _read_folder(folder, base, stack)
        except OSError as error:
            raise BadInput(f"{error.filename or folder}: cannot be read ({error.strerror})") from error
        yield content, blobs


def _read_folder(folder: Path, base: str | None, stack: ExitStack) -> tuple[Content, list[Blob]]:
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give a local Hugging Face folder or `embedded`")
    kind = _kind(folder)
    if kind == "full" and not (folder / CONFIG).exists():
        raise BadInput(f"{folder}: no {CONFIG} or {ADAPTER_CONFIG}; give a Hugging Face model or PEFT folder")
    if kind != "full" and base is None:
        what = "this is an adapter" if kind == "adapter" else "these are experts"
        raise BadInput(f"{folder}: {what}; name the model below with --base")
    tensors: dict[str, Blob] = {}
    for path, wanted in _weight_files(folder, kind).items():
        tensors |= _tensors(path, wanted, stack)
    if not tensors:
        raise BadInput(f"{folder}: the weights hold no tensor; save the model again")
    files = {path.name: Blob.file(_file_bytes(path)) for path in _config_files(folder)}
    if kind == "experts":
        if ADAPTER_CONFIG in files:
            raise BadInput(f"{folder}: both {EXPERTS_CONFIG} and {ADAPTER_CONFIG}; give a folder of one kind")
        experts_format.parse(folder / EXPERTS_CONFIG, bytes(files[EXPERTS_CONFIG].data), tensors)
    content = Content(
        kind=kind,
        base=base if kind != "full" else None,
        tensors={name: blob.digest for name, blob in sorted(tensors.items())},
        files={name: blob.digest for name, blob in sorted(files.items())},
    )
    return content, [*tensors.values(), *files.values()]


def _kind(folder: Path) -> Literal["full", "adapter", "experts"]:
    if (folder / EXPERTS_CONFIG).exists():
        return "experts"
    return "adapter" if (folder / ADAPTER_CONFIG).exists() else "full"


def _weight_files(folder: Path, kind: str) -> dict[Path, set[str] | None]:
    """The files that transformers or PEFT would load, and the tensors each must hold (None: whatever it does).

    Others that lie beside them (consolidated or half-precision copies) are not the model.
    """
    whole = folder / WEIGHTS[kind]
    if whole.exists():
        return {whole: None}
    if kind == "full" and (folder / INDEX).exists():
        return shards(folder / INDEX)
    names = [path.name for path in sorted(folder.iterdir())]
    raise no_weights(folder, kind, names, "save the model as safetensors (save_pretrained does)")


def no_weights(where: object, kind: str, names: list[str], remedy: str) -> BadInput:
    """What to raise for the files ``names`` without the weights of a ``kind``: pickled ones are told apart."""
    other = [name for name in names if Path(name).suffix in {*_PICKLED, ".safetensors"}]
    pickled = [name for name in other if not name.endswith(".safetensors")]
    why = f"no {WEIGHTS[kind]}" + (f", only {other[0]}" if other else "")
    if pickled and pickled == other:
        why = f"only pickled weights ({pickled[0]}), which are never opened"
    return BadInput(f"{where}: {why}; {remedy}")


def shards(index: Path) -> dict[Path, set[str] | None]:
    """The files that an index names, beside it, each with the tensors that it must hold."""
    found: dict[Path, set[str] | None] = {}
    try:
        for tensor, name in json.loads(index.read_bytes())["weight_map"].items():
            if Path(name).name != name:
                raise ValueError(f"'{name}' lies outside the folder")
            names = found.setdefault(index.parent / name, set())
            assert names is not None
            names.add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{index}: not an index of shards ({error})") from error
    return found


def _tensors(path: Path, wanted: set[str] | None, stack: ExitStack) -> dict[str, Blob]:
    if not path.exists():
        raise BadInput(f"{path}: this shard is missing; copy the whole folder again")
    try:
        entries = safetensors_entries(path)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error
    if lost := sorted((wanted or set()) - set(entries)):
        raise BadInput(f"{path}: {INDEX} promises tensor {lost[0]}, which is not here; copy the folder again")
    file = stack.enter_context(path.open("rb"))
    digests = _digests(file.fileno(), entries)
    # Not closed here: an error on its way out may still hold a slice. The last one closes the map.
    view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return {
        name: Blob(digests[name], view[offset : offset + length], dtype, shape)
        for name, (dtype, shape, offset, length) in entries.items()
    }


def _digests(descriptor: int, entries: Entries) -> dict[str, str]:
    """The digest of each tensor of an open safetensors file."""

    def digest(name: str) -> str:
        dtype, shape, offset, length = entries[name]
        running = tensor_hash(dtype, shape)
        # Read, not mapped: what is not stored again never counts as memory of this process.
        for piece in pieces(descriptor, offset, length):
            running.update(piece)
            length -= len(piece)
        if length:
            raise OSError(errno.EIO, "it became shorter while it was read")
        return PREFIX + running.hexdigest()

    size = sum(length for *_, length in entries.values())
    return dict(zip(entries, spread(digest, entries, size=size), strict=True))


def _config_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_file() and is_kept(path.name)]


def is_kept(name: str) -> bool:
    """Whether a file of this name, at the top of a model folder, belongs to the model beside its weights."""
    return "/" not in name and Path(name).suffix in _KEPT_SUFFIXES and name not in _SKIPPED


def _file_bytes(path: Path) -> bytes:
    """What is stored of a file. Raises ``BadInput`` for a configuration that is no JSON object."""
    body = path.read_bytes()
    if path.name not in (CONFIG, ADAPTER_CONFIG):
        return body
    try:
        config = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path}: not a JSON object; save the model again")
    return _neutral_adapter_config(config) if path.name == ADAPTER_CONFIG else body


def _neutral_adapter_config(config: dict[str, Any]) -> bytes:
    """PEFT writes sets in any order and the base's path of this machine: neither belongs to the content."""
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
                body = with_base(body, base_folder)
            (folder / name).write_bytes(body)
        write_weights(store, content, folder / WEIGHTS[content.kind], progress)
    except OSError as error:
        raise disk_failure(error, folder) from error


def with_base(body: bytes, base_folder: Path) -> bytes:
    config = json.loads(body)
    config["base_model_name_or_path"] = str(base_folder)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def write_weights(store: Store, content: Content, path: Path, progress: Progress | None) -> None:
    digests = set(content.tensors.values())
    store.placed(digests, lambda places: _write_from(store, places, content, path, progress))


def _write_from(
    store: Store, locations: dict[str, Location], content: Content, path: Path, progress: Progress | None
) -> None:
    # As safetensors' own writer: widest elements first, then by name, so that every tensor is aligned.
    order = sorted(content.tensors.items(), key=lambda item: (-_width(locations[item[1]]), item[0]))
    header, starts = encode_header(
        ((name, locations[digest].dtype or "", locations[digest].shape) for name, digest in order),
        {"format": "pt"},
    )
    with path.open("wb", buffering=0) as file:
        file.write(header)
        places = ((locations[digest], start) for (_, digest), start in zip(order, starts, strict=True))
        store.packs.copy(places, file.fileno(), progress)


def _width(location: Location) -> int:
    if location.dtype not in DTYPE_SIZE:
        raise Tampered(
            f"blob {location.digest} is named as a tensor and stored as {location.dtype or 'a file'}"
        )
    return DTYPE_SIZE[location.dtype]


def matches(content: Content, folder: Path, base_folder: Path | None = None) -> bool:
    """Whether ``folder`` holds exactly ``content``, nothing beside it, and an adapter points at ``base_folder``."""
    weights = WEIGHTS[content.kind]
    try:
        entries = safetensors_entries(folder / weights)
        return (
            {path.name for path in folder.iterdir()} == {weights, *content.files}
            and set(entries) == set(content.tensors)
            and all(digest_bytes(_file_bytes(folder / name)) == d for name, d in content.files.items())
            and (content.kind != "adapter" or base_folder is None or _base_of(folder) == str(base_folder))
            and _tensors_match(content, folder / weights, entries)
        )
    except (OSError, ValueError, BadInput):
        return False


def _base_of(folder: Path) -> Any:
    return json.loads((folder / ADAPTER_CONFIG).read_bytes())["base_model_name_or_path"]


def _tensors_match(content: Content, path: Path, entries: Entries) -> bool:
    with path.open("rb") as file:
        return _digests(file.fileno(), entries) == content.tensors
