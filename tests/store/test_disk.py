"""A disk that refuses: one error of ours, nothing visible, and the right order of syncs when it does not."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meristem.errors import EnvironmentFailure
from meristem.store import files
from meristem.store import local_packs as room
from meristem.store.files import write_file_durably
from meristem.store.local_packs import LocalPacks
from meristem.store.pack_format import Blob
from meristem.testing.values import mixed, tensor

FAULTS = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS]


def _fail(code):
    def refuse(*_args, **_options):
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("code", FAULTS)
@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_a_disk_that_refuses_leaves_nothing(tmp_path, monkeypatch, call, code):
    packs = LocalPacks(tmp_path / "packs")
    packs.write([tensor(1.0)])
    before = sorted(packs.root.glob("*.safetensors"))
    if call == "open":
        monkeypatch.setattr(Path, "open", _fail(code))
    elif call == "write":
        monkeypatch.setattr(room, "_write_synced", _half_written(code))
    elif call == "fsync":
        monkeypatch.setattr(os, "fsync", _fail(code))
    else:
        monkeypatch.setattr(Path, "replace", _fail(code))
    with pytest.raises(EnvironmentFailure, match=os.strerror(code)):
        packs.write(mixed())
    assert sorted(packs.root.glob("*.safetensors")) == before


def _half_written(code):
    def write(path, plan, progress):
        path.write_bytes(plan.header[:10])
        raise OSError(code, os.strerror(code))

    return write


def test_a_pack_whose_folder_will_not_sync_is_reported_and_written_again(tmp_path, monkeypatch):
    packs = LocalPacks(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync_folder", _fail(errno.EIO))
        with pytest.raises(EnvironmentFailure):
            packs.write([tensor(1.0)])
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]  # whole, and named by nobody
    (location,) = packs.write([tensor(1.0)])
    assert packs.intact(location)


def test_a_temporary_file_that_cannot_be_removed_does_not_hide_the_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _fail(errno.ENOSPC))
    monkeypatch.setattr(Path, "unlink", _fail(errno.EIO))
    with pytest.raises(EnvironmentFailure, match="No space left"):
        LocalPacks(tmp_path).write([tensor(1.0)])


def test_bytes_that_read_back_differently_are_never_visible(tmp_path, monkeypatch):
    """A disk (or memory) that alters bytes without saying so."""
    honest = room._write_synced

    def lie(path, plan, progress):
        honest(path, plan, progress)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")

    monkeypatch.setattr(room, "_write_synced", lie)
    with pytest.raises(EnvironmentFailure, match="read back"):
        LocalPacks(tmp_path).write([Blob.file(b"abc")])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_while_writing_leaves_nothing(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LocalPacks(tmp_path).write([tensor(1.0)], stop)
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
from pathlib import Path
from meristem.errors import EnvironmentFailure
from meristem.store.local_packs import LocalPacks
from meristem.store.pack_format import Blob
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    LocalPacks(Path(sys.argv[1])).write([Blob.file(bytes(30_000))])
except EnvironmentFailure as error:
    print(error)
"""


def test_a_file_size_limit_is_an_environment_failure(tmp_path):
    """The kernel refuses for real: EFBIG."""
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True
    )
    assert "file-size limit" in ran.stdout
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY


@pytest.mark.parametrize("code", FAULTS)
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, code):
    path = tmp_path / "meristem.yaml"
    write_file_durably(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _fail(code))
        with pytest.raises(EnvironmentFailure, match=str(path)):
            write_file_durably(path, b"new")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"old", [path])
    write_file_durably(path, b"new")
    assert (path.read_bytes(), list(tmp_path.iterdir())) == (b"new", [path])


WRITER = """
import sys
from pathlib import Path
from meristem.store.local_packs import LocalPacks
from meristem.store.pack_format import Blob
LocalPacks(Path(sys.argv[1]) / "packs").write([Blob.file(b"hello")])
"""


def test_bytes_are_synced_before_they_get_their_name_and_the_name_after(tmp_path, monkeypatch):
    """new folder: sync its parent; pack: sync the file, rename, sync the folder. From the kernel where strace is."""
    steps = _traced(tmp_path) if shutil.which("strace") else _patched(tmp_path, monkeypatch)
    assert steps == ["mkdir packs", f"fsync {tmp_path.name}", "fsync temporary", "rename", "fsync packs"]


def _traced(folder):
    trace = folder.parent / f"{folder.name}.trace"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat"
    command = ["strace", "-f", "-y", "-e", calls, "-o", trace, sys.executable, "-B", "-c", WRITER, folder]
    subprocess.run(command, check=True)
    steps = []
    for line in trace.read_text().splitlines():
        call = re.search(r"(\w+)\((.*)\) += 0", line)
        if call and str(folder) in line:
            steps.append(_step(call[1], Path(re.findall(r'[<"]([^<>"]+)[>"]', call[2])[0])))
    return steps


def _step(call, path):
    if call.startswith("rename"):
        assert path.name.startswith(".tmp-")
        return "rename"
    name = "temporary" if path.name.startswith(".tmp-") else path.name
    return f"{'mkdir' if call.startswith('mkdir') else 'fsync'} {name}"


def _patched(folder, monkeypatch):
    steps = []
    fsync, replace, mkdir = os.fsync, Path.replace, Path.mkdir

    def name_of(descriptor):
        return Path(f"/proc/self/fd/{descriptor}").readlink()

    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(_step("fsync", name_of(fd))), fsync(fd)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (steps.append(_step("rename", self)), replace(self, to))
    )
    monkeypatch.setattr(
        Path, "mkdir", lambda self, **o: (steps.append(_step("mkdir", self)), mkdir(self, **o))
    )
    LocalPacks(folder / "packs").write([Blob.file(b"hello")])
    return steps


def test_the_patched_order_agrees_with_the_kernel(tmp_path, monkeypatch):
    """So that a machine without strace checks the same."""
    steps = _patched(tmp_path, monkeypatch)
    assert steps == ["mkdir packs", f"fsync {tmp_path.name}", "fsync temporary", "rename", "fsync packs"]
