"""Packs in object stores: the contract on memory:// and on a real S3 server, and what only S3 can do wrong."""

from __future__ import annotations

import secrets
import threading

import fsspec
import pytest
import s3fs

from meristem.errors import BadInput, EnvironmentFailure
from meristem.store import object_packs as room
from meristem.store.local_packs import LocalPacks
from meristem.store.object_packs import ObjectPacks
from meristem.store.packs import Blob, packs_at
from meristem.testing.packs import PacksContract, sized
from meristem.testing.values import tensor

pytest_plugins = ["tests.servers"]


class _Objects(PacksContract):
    def body(self, packs, pack):
        return packs.fs.cat_file(packs.path(pack))

    def set_body(self, packs, pack, body):
        if body is None:
            packs.fs.rm_file(packs.path(pack))
        else:
            packs.fs.pipe_file(packs.path(pack), body)

    def again(self, packs):
        return packs_at(packs.url)


class TestMemory(_Objects):
    @pytest.fixture
    def packs(self):
        made = packs_at(f"memory://{secrets.token_hex(6)}/packs")
        yield made
        for pack in list(made.names()):
            made.remove(pack)


class TestS3(_Objects):
    large = 33 << 20  # beyond one PUT and beyond one round of downloads

    @pytest.fixture
    def packs(self, s3_url):
        return packs_at(s3_url())

    def leave(self, packs):
        bucket, _, prefix = packs.root.partition("/")
        for name in ("a" * 64 + ".safetensors", "b" * 64 + ".safetensors"):
            packs.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/{name}")
        packs.fs.call_s3("create_multipart_upload", Bucket=bucket, Key="somebody-elses")
        return 2


def test_the_url_says_which_packs(tmp_path):
    for where in (tmp_path / "a b", str(tmp_path / "a b"), f"file://{tmp_path}/a%20b"):
        local = packs_at(where)
        assert isinstance(local, LocalPacks)
        assert local.root == tmp_path / "a b"
    assert isinstance(packs_at("memory://x/y"), ObjectPacks)


def test_an_unknown_url_is_refused():
    with pytest.raises(BadInput, match="s3://bucket/prefix"):
        packs_at("nonsense://x")


def test_a_missing_driver_says_what_to_install(monkeypatch):
    def missing(*_args, **_options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "get_filesystem_class", missing)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'meristem\[s3\]'"):
        packs_at("s3://bucket/prefix")


READS = ("get", "head", "list")


def test_a_commit_is_one_put(s3_url, monkeypatch):
    packs = packs_at(s3_url())
    calls = _calls(packs, monkeypatch)
    packs.write([tensor(i) for i in range(50)])
    assert [call for call in calls if not call.startswith(READS)] == ["put_object"]


def test_a_large_commit_is_one_upload_in_parts(s3_url, monkeypatch):
    packs = packs_at(s3_url())
    calls = _calls(packs, monkeypatch)
    packs.write([sized(room.PART * 2 + 1)])
    kinds = [call for call in calls if not call.startswith(READS)]
    assert kinds == ["create_multipart_upload", *["upload_part"] * 3, "complete_multipart_upload"]


def test_what_is_there_already_is_not_sent_again(s3_url, monkeypatch):
    packs = packs_at(s3_url())
    first = packs.write([tensor(1.0)])
    calls = _calls(packs, monkeypatch)
    assert packs.write([tensor(1.0)]) == first
    assert "put_object" not in calls


def test_neighbours_are_fetched_together(s3_url, monkeypatch):
    packs = packs_at(s3_url())
    locations = packs.write([tensor(i) for i in range(300)])
    calls = _calls(packs, monkeypatch)
    assert len(list(packs.views(reversed(locations)))) == 300
    assert calls == ["get_object"]


def _calls(packs, monkeypatch):
    calls, real = [], packs.fs._call_s3

    async def counted(method, *args, **options):
        calls.append(method)
        return await real(method, *args, **options)

    monkeypatch.setattr(packs.fs, "_call_s3", counted)
    return calls


def test_an_object_that_arrives_altered_is_refused_and_taken_away(s3_url, monkeypatch):
    packs = packs_at(s3_url())
    real = packs.fs.pipe_file
    monkeypatch.setattr(
        packs.fs, "pipe_file", lambda path, body, **o: real(path, bytes(body)[:-1] + b"?", **o)
    )
    with pytest.raises(EnvironmentFailure, match="read back"):
        packs.write([Blob.file(b"abc")], None, "mine")
    assert list(packs.names()) == []


def test_an_upload_names_its_pack(s3_url):
    packs = packs_at(s3_url())
    bucket, _, prefix = packs.root.partition("/")
    pack = packs.name_of([tensor(1.0)], "mine")
    packs.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=f"{prefix}/{pack[7:]}.safetensors")
    ((name, _),) = packs.leftovers()
    assert packs.becomes(name, pack)
    assert not packs.becomes(name, packs.name_of([tensor(1.0)]))


def test_a_pack_without_a_salt_is_left_for_whoever_read_it_back_well(monkeypatch):
    url = f"memory://{secrets.token_hex(6)}/packs"
    packs, other = packs_at(url), packs_at(url)

    def garbled(_plan):
        other.write([tensor(1.0)])
        return False

    monkeypatch.setattr(packs, "_holds", garbled)
    with pytest.raises(EnvironmentFailure, match="read back"):
        packs.write([tensor(1.0)])
    (location,) = other.write([tensor(1.0)])
    assert other.intact(location)


def test_a_part_that_is_refused_leaves_nothing(s3_url, monkeypatch):
    packs = packs_at(s3_url())
    real, lock, sent = packs.fs._call_s3, threading.Lock(), []

    async def refuse(method, *args, **options):
        if method == "upload_part":
            with lock:
                sent.append(method)
            if len(sent) == 2:
                raise PermissionError(13, "Access Denied")
        return await real(method, *args, **options)

    monkeypatch.setattr(packs.fs, "_call_s3", refuse)
    with pytest.raises(EnvironmentFailure, match="credentials"):
        packs.write([sized(room.PART * 3)])
    assert list(packs.names()) == []
    assert list(packs.leftovers()) == []


# How a store answers that cannot be used: always one line that says what to do.
REFUSALS = {
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "", "check the credentials"),
    "no credentials": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        "",
        "check the credentials",
    ),
    "no bucket": ({}, "absent", "make the bucket"),
    "nobody there": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "", "check the network"),
    "no such host": ({"AWS_ENDPOINT_URL": "http://nowhere.invalid"}, "", "check the network"),
    "no url": ({"AWS_ENDPOINT_URL": "nonsense"}, "", "check the network"),
}


@pytest.mark.parametrize(("environ", "bucket", "remedy"), REFUSALS.values(), ids=REFUSALS)
def test_a_store_that_refuses(s3_url, monkeypatch, tmp_path, environ, bucket, remedy):
    url = s3_url()
    (location,) = packs_at(url).write([tensor(1.0)])
    for name, value in environ.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # a client keeps what the environment said when it was made
    packs = packs_at(f"s3://{bucket}/packs" if bucket else url)
    asked = {
        "write": lambda: packs.write([tensor(2.0)]),
        "large": lambda: packs.write([sized(room.PART * 2)]),
        "read": lambda: packs.read(location),
        "intact": lambda: packs.intact(location),
        "entries": lambda: list(packs.entries(location.pack)),
        "names": lambda: list(packs.names()),
    }
    if "AWS_ENDPOINT_URL" in environ:  # each is asked several times, which takes seconds
        asked = {what: asked[what] for what in ("write", "names")}
    for what, ask in asked.items():
        with pytest.raises(EnvironmentFailure, match=remedy) as caught:
            ask()
        assert "\n" not in str(caught.value), what
        assert packs.url in str(caught.value), what
