"""The record of what works: catalogue ids with the code and the test that show it."""

from __future__ import annotations

from importlib.resources import files

import yaml


def entries() -> list[dict[str, str]]:
    """``{"id", "code", "test"}`` per id, paths relative to the repository; ordered by id."""
    text = files("meristem").joinpath("catalogue.yaml").read_text(encoding="utf-8")
    record: dict[str, dict[str, str]] = yaml.safe_load(text)
    return [{"id": key, **record[key]} for key in sorted(record)]
