"""Reading JSON Lines safely: bytes to JSON objects, each with its line number, or a refusal.

Everything a file can do wrong before its *meaning* matters is caught here: encoding, size, JSON that
other readers would understand differently (NaN, duplicate keys, lone surrogates), NUL characters.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from meristem.errors import BadInput

MAX_LINE = 1 << 20
MAX_INTEGER = 1 << 53  # beyond this JSON readers disagree
SUFFIXES = (".jsonl", ".jsonl.gz")


def stem_of(path: str | Path) -> str:
    """File name without ``.jsonl`` or ``.jsonl.gz``."""
    return Path(path).name.removesuffix(".gz").removesuffix(".jsonl")


def read_objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number from 1, object)`` of a ``.jsonl`` or ``.jsonl.gz`` file.

    Blank lines are skipped. Raises ``BadInput`` that names the file and the line.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise BadInput.at(path, None, "not a .jsonl or .jsonl.gz file; write one JSON object per line")
    if not path.is_file():
        raise BadInput.at(path, None, "no such file; check the path")
    found = False
    for number, raw in _lines(path):
        if raw.strip():
            found = True
            yield number, _parse(path, number, raw)
    if not found:
        raise BadInput.at(path, None, "the file is empty; it needs at least one JSON object")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with _open(path) as file:
            # bounded reads: one endless line must not fill the memory
            while raw := file.readline(MAX_LINE + 2):
                number += 1
                if len(raw.rstrip(b"\r\n")) > MAX_LINE:
                    raise BadInput.at(path, number, "the line is longer than 1 MiB; split the row")
                yield number, raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput.at(path, number + 1, f"damaged gzip ({error}); compress the file again") from error
    except OSError as error:
        raise BadInput.at(path, None, f"cannot be read ({error.strerror or error})") from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def _parse(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput.at(path, number, f"not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys
        )
        _check_values(value)
    except Refused as error:
        raise BadInput.at(path, number, str(error)) from None
    except json.JSONDecodeError as error:
        raise BadInput.at(
            path, number, f"not JSON ({error.msg} at column {error.colno}); write one object per line"
        ) from None
    except RecursionError:
        raise BadInput.at(path, number, "nested too deeply; flatten the row") from None
    except ValueError as error:  # integers with thousands of digits
        raise BadInput.at(path, number, f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput.at(path, number, f"a {type(value).__name__}, not a JSON object; wrap it in {{...}}")
    return value


class Refused(ValueError):
    """What is wrong with a row, without its place; the reader adds file and line."""


def _refuse_constant(name: str) -> Any:
    raise Refused(f"{name} is not a JSON number; remove the row or use null")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Refused(f"{digits} is not a finite number; remove the row or use null")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Refused(f"the key {twice!r} stands twice in one object; keep one")
    return found


def _check_values(value: Any) -> None:
    if isinstance(value, str):
        if "\x00" in value:
            raise Refused("contains a NUL character; clean the text")
        if not value.isascii():
            _check_surrogates(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _check_values(key)
            _check_values(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner)
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise Refused("an integer above 2**53; write it as a string")


def _check_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused("half of a surrogate pair (\\ud8xx) is not text; export the file again") from None
