"""hf:org/name@revision through the real huggingface_hub, against a hub on this machine that fails in every way."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_server import Hub, running_hub

from myna.errors import MachineError, ModelError, MynaError, UsageError
from myna.model.hub import HubFiles, cached_repository, fetch_repository
from myna.model.sources import resolve_base

TOKEN = "hf_this_is_nobodys_token"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """huggingface_hub reads its settings when it is imported; here they are set where it keeps them."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with running_hub() as running:
        _point_to(running.url, monkeypatch)
        yield running
    close_session()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second before it takes up a download again."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    class Clock:
        @staticmethod
        def sleep(_: float) -> None: ...

    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", Clock)


@pytest.fixture(scope="module")
def files(tiny_base: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tiny_base.iterdir()}


def refusal(spec: str) -> MynaError:
    with pytest.raises(MynaError) as caught:
        fetch_repository(spec, lambda _: None)
    assert "\n" not in caught.value.message and caught.value.help
    return caught.value


def _point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is out of reach from here on."""
    _point_to("http://127.0.0.1:9", monkeypatch)


def test_a_branch_is_pinned_and_then_works_offline(
    hub: Hub, files: dict[str, bytes], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    junk = {
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"code",
        "onnx/model.safetensors": b"x",
        "a.png": b"x",
    }
    twice = {"consolidated.safetensors": files["model.safetensors"]}
    commit = hub.add("org/tiny", {**files, **junk, **twice})
    said: list[str] = []
    found = resolve_base("hf:org/tiny", said.append)
    assert (found.name, found.commit) == ("hf:org/tiny", commit)
    assert commit[:12] in said[0]
    assert {path.name for path in found.folder.iterdir()} == set(files)
    assert resolve_base(str(tiny_base)).sha256 == found.sha256
    assert not any(name in path for path in hub.paths() for name in (*junk, *twice))
    # the branch moves on: the commit still means the same, and is not asked for
    later = hub.add("org/tiny", {**files, "README.md": b"x", "generation_config.json": b"{}"})
    num_asked = len(hub.asked)
    assert resolve_base(f"hf:org/tiny@{commit}").folder == found.folder and len(hub.asked) == num_asked
    assert resolve_base("hf:org/tiny").commit == later
    go_away(monkeypatch)
    assert resolve_base("hf:org/tiny@main", said.append).commit == later
    assert "taken from the cache" in said[-1] and later[:12] in said[-1]
    assert resolve_base(f"hf:org/tiny@{commit}").commit == commit
    assert resolve_base("hf:org/tiny", offline=True).commit == later


def test_a_cut_download_goes_on_where_it_stopped(
    hub: Hub, files: dict[str, bytes], no_waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("org/tiny", files)
    size = len(files["model.safetensors"])
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what arrived in whole chunks is kept
    hub.cuts["/cdn/"] = [30_000, 50_000]
    found = fetch_repository("hf:org/tiny", lambda _: None)
    assert (found.folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    ranges = [asked.range for asked in hub.asked if asked.path.startswith("/cdn/") and asked.method == "GET"]
    assert ranges == [None, "bytes=30000-", "bytes=80000-"]
    assert [sent for path, sent in hub.sent.items() if path.startswith("/cdn/")] == [size]


def test_a_connection_that_stays_broken_keeps_what_is_whole(
    hub: Hub, files: dict[str, bytes], no_waiting: None
) -> None:
    commit = hub.add("org/tiny", files)
    hub.cuts["/cdn/"] = [0] * 20
    broken = refusal("hf:org/tiny")
    assert broken.exit_code == 4 and "broke" in broken.message and "goes on" in (broken.help or "")
    assert cached_repository("org/tiny", commit) is None  # half a model is none
    hub.cuts.clear()
    num_asked = len(hub.asked)
    assert fetch_repository("hf:org/tiny", lambda _: None).commit == commit
    again = [
        asked.path for asked in hub.asked[num_asked:] if asked.method == "GET" and "/resolve/" in asked.path
    ]
    assert again == []  # the small files were whole
    assert cached_repository("org/tiny", commit) is not None


REFUSALS: dict[str, tuple[dict[str, Any], str, int, str]] = {
    "private": ({"failures": {"/api/": (401, {})}}, "hf:org/tiny", 3, "wants to know who asks (HTTP 401)"),
    "gated": ({"failures": {"/api/": (403, {"X-Error-Code": "GatedRepo"})}}, "hf:org/tiny", 3, "is gated"),
    "gated file": (
        {"failures": {"/resolve/": (403, {"X-Error-Code": "GatedRepo"})}},
        "hf:org/tiny",
        3,
        "is gated",
    ),
    "forbidden": ({"failures": {"/api/": (403, {})}}, "hf:org/tiny", 3, "does not give it to you (HTTP 403)"),
    "no repository": ({}, "hf:org/tinny", 3, "no repository of this name (HTTP 404)"),
    "no revision": ({}, "hf:org/tiny@v7", 3, "has no revision v7"),
    "no file": (
        {"failures": {"/tokenizer.json": (404, {"X-Error-Code": "EntryNotFound"})}},
        "hf:org/tiny",
        3,
        "is not there",
    ),
    "too many": (
        {"failures": {"/api/": (429, {"Retry-After": "37"})}},
        "hf:org/tiny",
        4,
        "asks to wait (HTTP 429): again in 37 s",
    ),
    "down": ({"failures": {"/api/": (500, {})}}, "hf:org/tiny", 4, "the hub fails (HTTP 500)"),
    "down later": ({"failures": {"/cdn/": (503, {})}}, "hf:org/tiny", 4, "the hub fails (HTTP 503)"),
    "silent": ({"silent": True}, "hf:org/tiny", 4, "does not answer in time"),
    "no room": ({"listed_sizes": {"model.safetensors": 10**15}}, "hf:org/tiny", 4, "no room"),
    "spoiled": ({"spoiled": {"model.safetensors"}}, "hf:org/tiny", 3, "its SHA-256 is another one"),
    "no name": ({}, "hf:org/tiny/model/x", 3, "is no repository name"),
    "no name at all": ({}, "hf:", 3, "is no repository name"),
    "empty revision": ({}, "hf:org/tiny@", 3, "is no revision"),
    "outside": ({}, "hf:../../etc@main", 3, "is no repository name"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_the_hub_says_no_in_one_line(
    hub: Hub, files: dict[str, bytes], no_waiting: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    faults, spec, code, message = REFUSALS[name]
    hub.add("org/tiny", files)
    for key, value in faults.items():
        setattr(hub, key, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    error = refusal(spec)
    assert error.exit_code == code, error
    assert message in error.message
    assert TOKEN not in str(error)
    if code == 3 and name in ("private", "gated", "gated file", "forbidden", "no repository"):
        assert "hf auth login" in (error.help or "")


def test_nobody_answers_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    go_away(monkeypatch)
    error = refusal("hf:org/tiny")
    assert isinstance(error, MachineError) and "cannot be reached" in error.message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("pytorch_model.bin", "config.json"), "pickled weights only (pytorch_model.bin)"),
        (("tiny-Q4_K_M.gguf", "config.json"), "GGUF files only (tiny-Q4_K_M.gguf)"),
        (("adapter_model.bin", "adapter_config.json"), "pickled weights only (adapter_model.bin)"),
        (("README.md",), "no *.safetensors"),
    ],
)
def test_what_has_no_safetensors_is_refused_before_it_is_fetched(
    hub: Hub, names: tuple[str, ...], message: str
) -> None:
    hub.add("org/other", dict.fromkeys(names, b"x" * 50000))
    with pytest.raises(ModelError) as caught:
        fetch_repository("hf:org/other", lambda _: None)
    assert message in caught.value.message
    assert not any("/resolve/" in path or "/cdn/" in path for path in hub.paths())


def test_a_token_goes_to_the_hub_and_to_nobody_else(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add("org/tiny", files)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said: list[str] = []
    fetch_repository("hf:org/tiny", said.append)
    assert all(asked.authorization == f"Bearer {TOKEN}" for asked in hub.asked if "/api/" in asked.path)
    cdn = [asked for asked in hub.asked if asked.path.startswith("/cdn/")]
    assert cdn and all(asked.authorization is None for asked in cdn)
    assert TOKEN not in "".join(said)
    # and nothing else is asked: no telemetry, no list of agents
    about = ("/api/models/org/tiny", f"/org/tiny/resolve/{commit}/", "/cdn/")
    assert all(path.startswith(about) for path in hub.paths())


def test_a_full_disk_is_told_as_that(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("org/tiny", files)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        error = refusal("hf:org/tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.exit_code == 4 and "the disk is full" in error.message
    assert fetch_repository("hf:org/tiny", lambda _: None).folder.is_dir()


def test_shards_are_fetched_with_their_index_and_counted(hub: Hub, files: dict[str, bytes]) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = b'{"weight_map": {"a": "%s", "b": "%s"}}' % tuple(name.encode() for name in names)
    sharded = {name: files["model.safetensors"] + bytes([i]) for i, name in enumerate(names)}
    hub.add("org/big", {"config.json": b"{}", "model.safetensors.index.json": index, **sharded})
    found = fetch_repository("hf:org/big", lambda _: None)
    assert {path.name for path in found.folder.glob("*.safetensors")} == set(names)
    (found.folder / names[1]).unlink()
    assert cached_repository("org/big", found.commit) is None


def test_only_an_adapter_is_fetched_where_one_is_wanted(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("org/tiny", files)
    with pytest.raises(UsageError, match="nothing to merge"):
        fetch_repository("hf:org/tiny", lambda _: None, adapters_only=True)
    assert not any("/resolve/" in path for path in hub.paths())


def test_a_run_keeps_the_commit_that_it_began_with(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    from myna.prepare import prepare
    from myna.recipe import build_recipe
    from myna.run import Run
    from myna.stored import run_base

    commit = hub.add("org/tiny", files)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(12))
    recipe = build_recipe({"model": {"base": "hf:org/tiny"}, "data": {"train": str(rows)}})
    run = Run(tmp_path / "runs/orders")
    prepare(recipe, run, lambda _: None)
    recorded = run.info()["base"]
    assert (recorded["name"], recorded["commit"]) == ("hf:org/tiny", commit)
    assert recorded["config_sha256"] == hashlib.sha256(files["config.json"]).hexdigest()
    hub.add("org/tiny", {**files, "model.safetensors": files["model.safetensors"][:-4] + b"\0\0\0\1"})
    assert run_base(run).commit == commit
    assert prepare(recipe, run, lambda _: None).base.commit == commit  # a resume, after the branch moved on


def test_a_repository_is_named_again_by_its_commit() -> None:
    found = HubFiles("org/tiny", "a" * 40, Path("x"))
    assert found.pinned == f"hf:org/tiny@{'a' * 40}"
