"""The servers that other tests rely on are what they claim to be."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import psycopg
import pytest
from tests import servers

MIB = 1 << 20
# botocore's own checksums do not survive ranged reads from S3-compatible stores; packs carry digests of their own.
OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    },
}


def test_every_database_is_fresh_durable_and_independent_of_the_machines_locale(postgresql_url):
    first, second = postgresql_url(), postgresql_url()
    assert first != second
    with psycopg.connect(first) as connection:
        connection.execute("CREATE TABLE t (x text)")
        shown = {
            name: connection.execute(f"SHOW {name}").fetchone()[0]
            for name in ("fsync", "synchronous_commit", "full_page_writes", "server_encoding", "timezone")
        }
    assert shown == {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "server_encoding": "UTF8",
        "timezone": "UTC",
    }
    with psycopg.connect(second) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE tablename = 't'").fetchone() == (0,)


def test_postgresql_asks_for_the_password(postgresql_url, monkeypatch):
    url = postgresql_url()
    monkeypatch.setenv("PGPASSWORD", "wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url)


def test_s3_puts_ranges_lists_and_deletes(s3_url):
    root = s3_url()
    store, path = fsspec.core.url_to_fs(root, **OPTIONS)
    assert store.find(path) == []
    store.pipe_file(f"{path}/small", b"0123456789")
    assert store.cat_file(f"{path}/small", start=2, end=5) == b"234"
    assert store.exists(f"{path}/small") and not store.exists(f"{path}/none")
    assert store.info(f"{path}/small")["size"] == 10
    assert store.find(path) == [f"{path}/small"]
    store.rm_file(f"{path}/small")
    assert store.find(path) == []
    assert store.find(s3_url().removeprefix("s3://")) == []


def test_s3_takes_an_object_of_several_parts(s3_url):
    store, path = fsspec.core.url_to_fs(s3_url(), **OPTIONS)
    part = os.urandom(MIB)
    with store.open(f"{path}/large", "wb", block_size=20 * MIB) as file:
        for _ in range(60):
            file.write(part)
        assert not store.exists(f"{path}/large"), "an object shows only when it is whole"
    assert store.info(f"{path}/large")["size"] == 60 * MIB
    assert store.cat_file(f"{path}/large", start=59 * MIB, end=60 * MIB) == part


def test_s3_refuses_another_key(s3_url, monkeypatch):
    root = s3_url()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store, path = fsspec.core.url_to_fs(root, skip_instance_cache=True)
    with pytest.raises(PermissionError):
        store.pipe_file(f"{path}/x", b"x")


KILLED = """
import os, signal
from tests.servers import postgresql_server, s3_server
with postgresql_server() as a, s3_server() as b:
    print(a.port, b.environ["AWS_ENDPOINT_URL"], b.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_running_when_the_tests_are_killed(postgresql_url, s3_url):
    killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True)
    port, endpoint, folder = killed.stdout.split()
    for number in (int(port), urlsplit(endpoint).port):
        assert _within(10, lambda number=number: not _answers(number)), f"port {number} still answers"
    assert _within(10, lambda: not Path(folder).exists())


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _within(seconds: float, true) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def test_what_is_missing_is_skipped_unless_it_is_required(monkeypatch):
    monkeypatch.delenv("MERISTEM_REQUIRE", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no s3: no build"):
        servers.unavailable("s3", "no build")
    monkeypatch.setenv("MERISTEM_REQUIRE", "strace,postgresql,s3")
    with pytest.raises(pytest.fail.Exception, match="no s3: no build"):
        servers.unavailable("s3", "no build")


def test_programs_that_another_user_cannot_reach_are_copied(monkeypatch):
    if os.getuid() != 0:
        pytest.skip("only root starts PostgreSQL as another user")
    reachable = servers._open_to_all
    monkeypatch.setattr(servers, "_open_to_all", lambda path: "embedded" not in str(path) and reachable(path))
    with servers.postgresql_server() as server:
        assert server.database()


def test_strace_traces(strace):
    traced = subprocess.run(
        [strace, "-e", "trace=execve", "true"], capture_output=True, text=True, check=True
    )
    assert "execve" in traced.stderr
