"""Sources on the Hugging Face Hub: the real client against a server of ours that speaks as the hub does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from tests import hub as hubs
from tests.ecosystem import hf

import meristem as ms
from meristem.ecosystem import hub as source_hub
from meristem.ecosystem import models, versions
from meristem.errors import BadInput, EnvironmentFailure
from meristem.store import evidence

COMMAND = "from meristem.cli.main import main; main()"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running hub, which the client in this process asks, with a cache of its own."""
    with hubs.running() as running:
        _ask(monkeypatch, running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # CI keeps everything else off the network
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield running
    huggingface_hub.close_session()


def _ask(monkeypatch, endpoint):
    """What HF_ENDPOINT would have set had it been there when the client was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


def entry_of(store, name):
    with store.database.read() as connection:
        return models.get(connection, name), versions.resolve(connection, name)


def test_a_model_of_the_hub_is_the_model_of_a_folder(store, hub, add, tmp_path):
    """The same content as from the folder; where it came from stands in the record and in the event, in full."""
    folder = hf.sharded(tmp_path / "m")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights in another form")
    sha = hub.push("org/tiny", folder)
    told = []
    entry = models.add(
        store, "kim", "base", "foundation", "hf:org/tiny", None, fetching=lambda *step: told.append(step)
    )
    assert entry.content == add("local", source=folder).content
    assert entry_of(store, "base")[0].source == f"hf:org/tiny@{sha}"
    with store.database.read() as connection:
        (reason, _) = [event.reason for event in evidence.read(connection, kind="model.added")]
    assert reason == f"model base added from hf:org/tiny@{sha}"
    fetched = set(hub.fetched())
    assert not {"consolidated.safetensors", "training_args.bin", "README.md"} & fetched
    assert {"model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "merges.txt"} <= fetched
    total = told[-1][1]
    assert told[-1] == (total, total) and [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_branch_a_tag_a_pull_request_and_a_short_commit_are_pinned(hub, tmp_path):
    old = hub.push("org/tiny", hf.full(tmp_path / "old"), "main", "v1")
    new = hub.push("org/tiny", hf.full(tmp_path / "new", hf.weights(7)), "main", "refs/pr/1")
    for revision, sha in (
        ("", new),
        ("@main", new),
        ("@v1", old),
        ("@refs/pr/1", new),
        (f"@{old[:8]}", old),
        (f"@{old}", old),
    ):
        assert source_hub.pinned(f"hf:org/tiny{revision}") == f"hf:org/tiny@{sha}"


def test_a_branch_that_moved_on_is_another_model_and_a_successor(store, hub, tmp_path):
    first = hub.push("org/tiny", hf.full(tmp_path / "old"))
    models.add(store, "kim", "base", "foundation", "hf:org/tiny", None)
    before = hub.fetched()
    assert models.add(store, "kim", "base", "foundation", "hf:org/tiny", None).label == "base@v1"
    assert hub.fetched() == before  # all of it was in the cache
    second = hub.push("org/tiny", hf.full(tmp_path / "new", hf.weights(7)))
    with pytest.raises(BadInput, match="model 'base' exists already"):
        models.add(store, "kim", "base", "foundation", "hf:org/tiny", None)
    made = models.commit(store, "kim", "base", "hf:org/tiny")
    with store.database.read() as connection:
        told = [event.reason for event in evidence.read(connection)][-1]
    assert made.label == "base@v2" and told == f"successor of base@v1 from hf:org/tiny@{second}"
    assert models.add(store, "kim", "base", "foundation", f"hf:org/tiny@{first}", None).label == "base@v1"


def test_an_adapter_needs_its_base_and_sits_on_it(store, hub, add, tmp_path):
    base = add("base")
    hub.push("org/law", hf.adapter(tmp_path / "a"))
    entry = models.add(store, "kim", "law", "industrial", "hf:org/law", "base")
    with store.database.read() as connection:
        content = versions.content_of(connection, entry.content)
    assert (content.kind, content.base) == ("adapter", base.content)
    with pytest.raises(BadInput, match="this is an adapter; name the model below with --base"):
        models.add(store, "kim", "alone", "foundation", "hf:org/law", None)


def test_pickled_weights_are_refused_before_they_are_fetched(store, hub, tmp_path):
    folder = hf.full(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "training_args.bin").unlink()
    sha = hub.push("org/old", folder)
    told = rf"hf:org/old@{sha}: only pickled weights \(pytorch_model\.bin\), which are never opened; give a revision"
    with pytest.raises(BadInput, match=told):
        models.add(store, "kim", "base", "foundation", "hf:org/old", None)
    assert hub.fetched() == ["config.json"]
    hub.push("org/gguf", _only(tmp_path / "n", "model.gguf"))
    with pytest.raises(BadInput, match=r"no config\.json or adapter_config\.json; name a repository of a"):
        models.add(store, "kim", "base", "foundation", "hf:org/gguf", None)


def _only(folder: Path, name: str) -> Path:
    folder.mkdir()
    (folder / name).write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("source", "kind", "told"),
    [
        ("hf:tiny", BadInput, "write hf:ORG/NAME or hf:ORG/NAME@REVISION"),
        ("hf:org/tiny@", BadInput, "write hf:ORG/NAME"),
        ("hf:../tiny", BadInput, "hf:../tiny"),
        ("hf:org/absent", BadInput, "has no such model, or it is private; check the name, or set HF_TOKEN"),
        ("hf:org/private", BadInput, "has no such model, or it is private"),
        (
            "hf:org/tiny@nope",
            BadInput,
            "org/tiny has no revision nope; give a branch, a tag or a full commit",
        ),
        ("hf:org/gated", EnvironmentFailure, "gated; ask for access at http://.*/org/gated and set HF_TOKEN"),
    ],
)
def test_what_is_not_there_or_not_for_us_is_told_in_one_line(store, hub, tmp_path, source, kind, told):
    folder = hf.full(tmp_path / "m")
    hub.push("org/tiny", folder)
    hub.push("org/private", folder, private=True)
    hub.push("org/gated", folder, gated=True)
    with pytest.raises(kind, match=told) as refused:
        models.add(store, "kim", "base", "foundation", source, None)
    assert "\n" not in str(refused.value)
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_a_token_of_the_environment_opens_what_is_private_or_gated(store, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
    folder = hf.full(tmp_path / "m")
    hub.push("org/private", folder, private=True)
    hub.push("org/gated", folder, gated=True)
    first = models.add(store, "kim", "private", "foundation", "hf:org/private", None)
    second = models.add(store, "kim", "gated", "foundation", "hf:org/gated", None)
    assert first.content == second.content


def test_a_hub_that_is_down_or_away_is_an_environment_failure(store, hub, tmp_path, monkeypatch):
    hub.push("org/tiny", hf.full(tmp_path / "m"))
    hub.status = 503
    with pytest.raises(
        EnvironmentFailure, match=r"could not be asked \(.*503 .*the hub's cache does not hold it"
    ):
        source_hub.pinned("hf:org/tiny")
    hub.status = 403
    with pytest.raises(EnvironmentFailure, match="answered 403; check HF_TOKEN"):
        source_hub.pinned("hf:org/tiny")
    _ask(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(
        EnvironmentFailure, match=r"127\.0\.0\.1:9 could not be asked \(.*refused\), .*; check the network"
    ):
        source_hub.pinned("hf:org/tiny")


def test_without_a_network_the_cache_serves_what_it_holds_whole(store, hub, tmp_path, monkeypatch):
    sha = hub.push("org/tiny", hf.full(tmp_path / "m"))
    online = models.add(store, "kim", "one", "foundation", "hf:org/tiny", None)
    count = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = models.add(store, "kim", "two", "foundation", "hf:org/tiny", None)
    assert offline.content == online.content and len(hub.requests) == count
    (tmp_path / "cache/models--org--tiny/snapshots" / sha / "merges.txt").unlink()
    with pytest.raises(
        EnvironmentFailure,
        match="HF_HUB_OFFLINE is set, and the hub's cache does not hold it whole; unset it",
    ):
        models.add(store, "kim", "three", "foundation", "hf:org/tiny", None)
    with pytest.raises(
        EnvironmentFailure,
        match="HF_HUB_OFFLINE is set, and the hub's cache does not hold it whole; unset it",
    ):
        models.add(store, "kim", "three", "foundation", "hf:org/other", None)


def test_a_connection_that_breaks_off_costs_one_file(store, hub, tmp_path):
    """The client tries again by itself for a while; what is whole by then is not fetched again."""
    hub.push("org/tiny", hf.sharded(tmp_path / "m"))
    hub.broken = "model-00002-of-00002.safetensors"
    with pytest.raises(EnvironmentFailure, match=r"peer closed connection .*; repeat the command"):
        models.add(store, "kim", "base", "foundation", "hf:org/tiny", None)
    lost, hub.broken = hub.broken, None
    hub.requests.clear()
    assert models.add(store, "kim", "base", "foundation", "hf:org/tiny", None).label == "base@v1"
    assert lost in hub.fetched() and "model-00001-of-00002.safetensors" not in hub.fetched()


def test_one_changed_byte_in_the_cache_is_found(store, hub, tmp_path):
    sha = hub.push("org/tiny", hf.full(tmp_path / "m"))
    folder = source_hub.fetched(f"hf:org/tiny@{sha}")
    for name in ("model.safetensors", "tokenizer.json"):
        path = (folder / name).resolve()
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(EnvironmentFailure, match=rf"{name}: not the bytes that the hub announced"):
            source_hub.fetched(f"hf:org/tiny@{sha}")
        path.write_bytes(good)
    assert source_hub.fetched(f"hf:org/tiny@{sha}") == folder


def test_a_full_disk_is_told_with_its_place(hub, tmp_path):
    """The system refuses to write more than a few bytes to a file, in a process of its own."""
    hub.push("org/tiny", hf.full(tmp_path / "m", {"w": np.zeros(5000, np.float32)}))
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\n"
        "from meristem.ecosystem import hub\n"
        "hub.fetched(hub.pinned('hf:org/tiny'))"
    )
    done = _python(script, hub, tmp_path)
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith(
        f"meristem.errors.EnvironmentFailure: {tmp_path / 'cache'}: File too large; a file-size"
    )


def test_the_environment_is_read_as_the_client_reads_it(hub, tmp_path):
    """HF_ENDPOINT, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE of a command in a process of its own."""
    hub.push("org/private", hf.full(tmp_path / "m"), private=True)
    add = ("--workspace", str(tmp_path / "ws"), "model", "add", "--tier", "foundation", "--source")
    ms.Workspace.create(tmp_path / "ws").close()
    online = _python(COMMAND, hub, tmp_path, *add, "hf:org/private", "one", HF_TOKEN=hubs.TOKEN)
    assert (online.returncode, online.stderr) == (0, "")
    count = len(hub.requests)
    offline = _python(COMMAND, hub, tmp_path, *add, "hf:org/private", "two", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stderr, len(hub.requests)) == (0, "", count)
    absent = _python(COMMAND, hub, tmp_path, *add, "hf:org/absent", "three", HF_HUB_OFFLINE="1")
    assert absent.returncode == 5 and len(absent.stderr.splitlines()) == 1


def test_ctrl_c_ends_a_download_at_once(hub, tmp_path):
    """The server stalls for ever in the middle of a file: exit 130, and the same command finishes the work."""
    hub.push("org/tiny", hf.full(tmp_path / "m"))
    ms.Workspace.create(tmp_path / "ws").close()
    words = ("model", "add", "base", "--tier", "foundation", "--source", "hf:org/tiny")
    hub.stalls = True
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--workspace", str(tmp_path / "ws"), *words],
        env=_environ(hub, tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (
        130,
        "meristem: interrupted; the same command finishes the work\n",
    )
    hub.stalls = False
    ws = ms.Workspace.open(tmp_path / "ws")
    assert ws.add_model("base", tier="foundation", source="hf:org/tiny").label == "base@v1"
    ws.close()


def _python(
    script: str, hub: hubs.Hub, tmp_path: Path, *words: str, **more: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *words]
    return subprocess.run(command, env=_environ(hub, tmp_path) | more, capture_output=True, text=True)


def _environ(hub: hubs.Hub, tmp_path: Path) -> dict[str, str]:
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
    }
    return {**os.environ, **own}
