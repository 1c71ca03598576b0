"""What an engine is: the settings and library versions that can change a score. No torch import."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import metadata

from meristem.store.canonical import digest_document

SCHEMA = "meristem/engine/v1"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft")
SCORING = (
    2  # raise it whenever Meristem itself scores or generates in another way: old results are not reused
)


@dataclass(frozen=True)
class EngineSettings:
    """Everything chosen about how a model is run.

    ``batch_tokens`` bounds rows x width of a batch; it decides the batches, and with them the last bits
    of every bf16 result, so it is part of the identity. (On a CPU scoring takes smaller ones: ``score.CPU_TOKENS``.)
    """

    dtype: str = "bfloat16"
    device: str = "cpu"
    attention: str = "sdpa"
    batch_tokens: int = 4096
    expert: str | None = None
    """The task whose expert answers, in a version that has several; None: the version's router decides."""


def library_versions() -> dict[str, str | None]:
    """Installed versions, read without importing the libraries; ``None`` where one is missing."""
    return {name: _version(name) for name in LIBRARIES}


def engine_document(settings: EngineSettings) -> dict[str, object]:
    chosen = {
        name: value for name, value in asdict(settings).items() if name != "expert" or value is not None
    }
    return {"schema": SCHEMA, "scoring": SCORING, **chosen, "libraries": library_versions()}


def engine_digest(settings: EngineSettings) -> str:
    """The third part of an evaluation's key: (content digest, suite digest, engine digest)."""
    return digest_document(engine_document(settings))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
