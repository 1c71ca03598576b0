"""What both harnesses share: whether they are installed, digests of documents, and how a change is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from meristem.data.jsonl import Refused
from meristem.errors import BadInput


def installed_version(package: str) -> str:
    """``BadInput`` with the command that installs a missing harness."""
    try:
        return version(package)
    except PackageNotFoundError:
        extra = package.removesuffix("-ai")
        raise BadInput(f"{package} is not installed; run: pip install 'meristem[{extra}]'") from None


def same_version(package: str, frozen: str) -> None:
    """``BadInput`` unless the installed harness is the one that the suite was frozen with."""
    found = installed_version(package)
    if found != frozen:
        raise BadInput(
            f"it was frozen with {package} {frozen}, and {found} is installed; "
            f"run: pip install {package}=={frozen}, or add the suite again"
        )


def digest(value: Any) -> str:
    """``sha256:...`` of a JSON value, keys sorted; ``Refused`` for what JSON cannot hold."""
    try:
        body = json.dumps(value, sort_keys=True, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise Refused(f"it has a value that no JSON file can hold ({error})") from None
    return f"sha256:{hashlib.sha256(body.encode('utf-8', 'surrogatepass')).hexdigest()}"


def same_documents(frozen: Mapping[str, str], found: Mapping[str, str]) -> None:
    """``BadInput`` naming the items whose digests differ: a data file, or a package, changed under the same name."""
    changed = [id for id in frozen if id in found and found[id] != frozen[id]]
    told = _told("changed", changed)
    told += _told("gone", [id for id in frozen if id not in found])
    told += _told("new", [id for id in found if id not in frozen])
    if told:
        raise BadInput(
            f"its documents are no longer what was frozen ({'; '.join(told)}); add the suite again"
        )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _told(what: str, ids: list[str]) -> list[str]:
    if not ids:
        return []
    shown = ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
    return [f"{len(ids)} {what}: {shown}"]
