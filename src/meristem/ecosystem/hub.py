"""``hf:ORG/NAME[@REVISION]``: a model or adapter repository of the Hugging Face Hub, as a local folder.

The client is ``huggingface_hub``, with what it reads from the environment: ``HF_ENDPOINT``, ``HF_TOKEN`` (or the token
of ``hf auth login``), ``HF_HUB_OFFLINE``, ``HF_HOME`` or ``HF_HUB_CACHE``. A revision is resolved to its full commit
once, and everything after that names the commit. Of its files only those are fetched that make a version: safetensors
weights that transformers or PEFT would load, configuration, tokenizer. Pickled weights never are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from meristem.ecosystem.folders import ADAPTER_CONFIG, CONFIG, INDEX, WEIGHTS, is_kept, no_weights, shards
from meristem.errors import BadInput, EnvironmentFailure, MeristemError
from meristem.store.files import disk_failure

HUB = "hf:"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAFETENSORS = "give a revision that has safetensors, such as the hub's own conversion (`@refs/pr/N`, see its pull requests)"

Progress = Callable[[int, int], None]


def pinned(source: str) -> str:
    """``source`` with the full commit that its revision (the default branch without one) stands for now.

    Raises ``BadInput`` for a repository or a revision that is not there, ``EnvironmentFailure`` when the hub cannot be
    asked and the cache does not know either.
    """
    repository, revision = _parts(source)
    with _client(source):
        from huggingface_hub import HfApi, constants

        offline = constants.HF_HUB_OFFLINE
        found = HfApi().resolve_revision(repository, revision=revision, local_files_only=offline)
    commit: str = found.resolved
    if not _COMMIT.fullmatch(commit):  # it becomes a path in the cache
        raise EnvironmentFailure(f"source '{source}': the hub answered with a commit named {commit!r}")
    return f"{HUB}{repository}@{commit}"


def fetched(source: str, progress: Progress | None = None) -> Path:
    """The folder in the hub's cache with the files of a ``pinned`` source, each held against its digest.

    ``progress``: bytes so far, and in all. A file that an earlier call fetched whole is not fetched again. Raises
    ``BadInput`` for a repository without safetensors weights, before any of its weights is fetched.
    """
    repository, _, commit = source.removeprefix(HUB).partition("@")
    with _client(source):
        folder = _described(repository, commit)
        sizes = _listing(repository, commit)
        wanted = _wanted(source, folder, set(sizes))
        _download(repository, commit, {name: sizes[name] for name in wanted}, progress)
    return folder


def _parts(source: str) -> tuple[str, str | None]:
    repository, _, revision = source.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or source.endswith("@"):
        raise BadInput(
            f"source '{source}': write hf:ORG/NAME or hf:ORG/NAME@REVISION (a branch, a tag or a commit)"
        )
    return repository, revision or None


def _described(repository: str, commit: str) -> Path:
    """The folder of a commit in the cache, with what says of which files its model consists."""
    from huggingface_hub import snapshot_download

    patterns = [escape(name) for name in (CONFIG, ADAPTER_CONFIG, INDEX)]
    return Path(
        snapshot_download(
            repository, revision=commit, allow_patterns=patterns, tqdm_class=_bar(lambda n: None)
        )
    )


def _download(repository: str, commit: str, sizes: dict[str, int], progress: Progress | None) -> None:
    """One file after the other in this thread, which Ctrl-C ends at once; a pool would finish its files first."""
    from huggingface_hub import hf_hub_download

    done, total = 0, sum(sizes.values())
    for name, size in sizes.items():

        def tell(n: float, done: int = done, size: int = size) -> None:
            if progress and 0 < n < size:
                progress(done + int(n), total)

        _check(Path(hf_hub_download(repository, name, revision=commit, tqdm_class=_bar(tell))))
        done += size
        if progress:
            progress(done, total)


def _listing(repository: str, commit: str) -> dict[str, int]:
    """Sizes of the files of a commit by path, as the first download noted them in the cache."""
    from huggingface_hub import get_cached_repo_tree

    return {file.path: file.size for file in get_cached_repo_tree(repository, revision=commit)}


def _wanted(source: str, folder: Path, names: set[str]) -> list[str]:
    """The files that make a version; ``folder`` holds its configuration and its index of shards already."""
    kind = "adapter" if ADAPTER_CONFIG in names else "full"
    if kind == "full" and CONFIG not in names:
        raise BadInput(
            f"{source}: no {CONFIG} or {ADAPTER_CONFIG}; name a repository of a transformers or PEFT model"
        )
    weights = {WEIGHTS[kind]}
    if weights - names:
        if kind == "adapter" or INDEX not in names:
            raise no_weights(source, kind, sorted(name for name in names if "/" not in name), _SAFETENSORS)
        weights = {path.name for path in shards(folder / INDEX)}
        if lost := sorted(weights - names):
            raise BadInput(f"{source}: {INDEX} names {lost[0]}, which is not there; take another revision")
    return sorted(weights | {name for name in names if name == INDEX or is_kept(name)})


def _check(path: Path) -> None:
    """The cache names each file by its git or SHA-256 digest; where it could not (no symbolic links), none is known."""
    blob = path.resolve()
    with blob.open("rb") as file:
        if re.fullmatch(r"[0-9a-f]{64}", blob.name):
            found = hashlib.file_digest(file, "sha256").hexdigest()
        elif _COMMIT.fullmatch(blob.name):
            body = file.read()
            found = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        else:
            return
    if found != blob.name:
        raise EnvironmentFailure(
            f"{path}: not the bytes that the hub announced (digest {found[:12]}, not {blob.name[:12]}); remove {blob} "
            "and repeat the command"
        )


def _bar(tell: Callable[[float], None]) -> type:
    """A class of progress bars for ``huggingface_hub`` that draws nothing and tells how many bytes have come.

    A Xet download has a bar for bytes received as well: the one that is further is told.
    """
    from huggingface_hub.utils import tqdm

    furthest = 0.0

    class Told(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self.n += n or 0
            if self.n > furthest:
                furthest = self.n
                tell(furthest)

    return Told


@contextmanager
def _client(source: str) -> Iterator[None]:
    """What ``huggingface_hub`` and the disk raise, as one line with a remedy."""
    try:
        import httpx2
        from huggingface_hub import constants, errors, get_cached_repo_tree  # noqa: F401
    except ImportError as error:
        raise EnvironmentFailure(
            "hf: sources need huggingface_hub 2.4 or later: pip install 'meristem[hub]'"
        ) from error
    repository, revision = _parts(source)
    at = constants.ENDPOINT
    try:
        yield
    except MeristemError:
        raise
    except errors.GatedRepoError as error:
        raise EnvironmentFailure(
            f"source '{source}': gated; ask for access at {at}/{repository} and set HF_TOKEN (or `hf auth login`)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BadInput(
            f"source '{source}': {at} has no such model, or it is private; check the name, or set HF_TOKEN (or "
            "`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BadInput(
            f"source '{source}': {repository} has no revision {revision}; give a branch, a tag or a full commit"
        ) from error
    except errors.HFValidationError as error:
        raise BadInput(f"source '{source}': {_line(error)}") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        remedy = "check HF_TOKEN" if code in (401, 403) else "try again later"
        raise EnvironmentFailure(f"source '{source}': {at} answered {code}; {remedy}") from error
    except (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.RevisionResolutionError,
        errors.CachedRepoTreeNotFoundError,
    ) as error:
        why = f"{at} could not be asked ({_line(error.__cause__ or error)})"
        remedy = "check the network and HF_ENDPOINT, and repeat the command"
        if constants.HF_HUB_OFFLINE:
            why, remedy = "HF_HUB_OFFLINE is set", "unset it, or fetch the model where there is a network"
        raise EnvironmentFailure(
            f"source '{source}': {why}, and the hub's cache does not hold it whole; {remedy}"
        ) from error
    except httpx2.HTTPError as error:
        raise EnvironmentFailure(f"source '{source}': {at}: {_line(error)}; repeat the command") from error
    except OSError as error:
        if error.errno is None:  # a size that is not the announced one
            raise EnvironmentFailure(f"source '{source}': {_line(error)}; repeat the command") from error
        raise disk_failure(error, Path(constants.HF_HUB_CACHE)) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
