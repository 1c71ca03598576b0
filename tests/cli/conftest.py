"""``cli(folder, words...)``: a command in this process, with its exit code and both outputs."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys, monkeypatch):
    from meristem.cli.main import main

    def call(folder, *words):
        place = ["--workspace", str(folder)] if folder else []
        monkeypatch.setattr(sys, "argv", ["meristem", *place, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return call
