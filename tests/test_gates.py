"""Planted faults: files that load and are not the model, and the gate that catches each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from gguf.quants import dequantize

from myna.backends.llama_cpp import LlamaCppBackend
from myna.data.render import load_chat_tokenizer
from myna.export import gguf as gguf_module
from myna.export.blocks import BLOCK_BOUNDS, block_errors
from myna.export.conversations import fitting, gate_conversations
from myna.export.gates import ordinary_tokens
from myna.export.gguf import write_gguf
from myna.export.parity import BOUNDS
from myna.export.prove import FileProof, Origin, Questions, prove_files, questions
from myna.export.quantize import QUANT_TYPES
from myna.model.families import FAMILIES
from myna.show import Show

# A stop token that llama.cpp has never heard of: it knows <|im_end|> by its spelling, whatever the file says.
TEMPLATE = tiny.CHATML.replace("<|im_end|>", "<|fin|>")
Plant = Callable[[Path], None]


def rename_stop_token(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>", "<|fin|>"), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_base(tmp_path_factory.mktemp("gates") / "base", initializer_range=0.1)
    rename_stop_token(folder)
    return folder


@pytest.fixture(scope="module")
def asked(base: Path) -> Questions:
    found = questions(load_chat_tokenizer(base), (), tuple, 250)
    short = [c for c in found.conversations if len(str(c)) < 600]
    return Questions(found.tokenizer, found.rows, short[:8])


@pytest.fixture(scope="module")
def honest(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "m.gguf"
    write_gguf(base, base, path, "Q8_0", name="tiny")
    return path


def proven(base: Path, path: Path, asked: Questions, file_type: str = "Q8_0") -> FileProof:
    return prove_files(Origin("the model", base), {file_type: path}, asked, Show())[file_type]


def failing(proof: FileProof) -> set[str]:
    """Names of the gates that fail; `parity` where a bound is passed."""
    gates = {gate.name for gate in proof.gates if not gate.passes}
    return gates | ({"parity"} if proof.parity and proof.parity.failures else set())


def set_field(path: Path, key: str, value: int) -> None:
    reader = gguf.GGUFReader(path, "r+")
    field = reader.get_field(key)
    assert field is not None
    field.parts[field.data[0]][0] = value


def test_the_honest_file_passes_every_gate(base: Path, honest: Path, asked: Questions) -> None:
    proof = proven(base, honest, asked)
    assert proof.failures == []
    assert [gate.name for gate in proof.gates] == ["tokens", "template", "prompt", "stop", "weights"]
    assert proof.parity and proof.parity.num_tokens >= 900 and proof.parity.num_targets >= 300
    entry = proof.as_json()
    assert entry["verdict"] == "pass" and entry["gates"]["stop"]["verdict"] == "pass"
    assert "8 conversations" in entry["gates"]["tokens"]["detail"]


def swap_tensors(path: Path) -> None:
    reader = gguf.GGUFReader(path, "r+")
    first, second = (t for t in reader.tensors if t.name in ("blk.0.attn_q.weight", "blk.1.attn_q.weight"))
    kept = first.data.copy()
    first.data[:] = second.data
    second.data[:] = kept


def scale_one_block(path: Path) -> None:
    """Half of one block's scale: 32 of the model's weights are half of what they were."""
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.1.ffn_up.weight")
    scale = tensor.data[5, :2].view(np.float16)
    scale[:] = scale * np.float16(0.5)


def scale_one_layer(path: Path) -> None:
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name == "blk.1.ffn_norm.weight":
            tensor.data[:] = tensor.data * 3


def forget_stop(path: Path) -> None:
    set_field(path, "tokenizer.ggml.eos_token_id", 40)


def spoil_one_scale(path: Path) -> None:
    """NaN in a row of the embeddings that no conversation has, in a tensor that others follow."""
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "token_embd.weight")
    tensor.data[399, :2].view(np.float16)[:] = np.float16("nan")


def add_bos(path: Path) -> None:
    set_field(path, "tokenizer.ggml.add_bos_token", 1)


def test_every_type_has_bounds() -> None:
    assert set(BOUNDS) == set(QUANT_TYPES)
    assert {kind.main for kind in QUANT_TYPES.values()} <= set(BLOCK_BOUNDS)


@pytest.mark.parametrize("file_type", ["IQ4_XS", "Q3_K_M", "Q4_0"])
def test_a_small_type_is_held_to_its_bound_too(
    file_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.write_base(tmp_path / "base", initializer_range=0.2)
    asked = questions(load_chat_tokenizer(base), (), tuple, 250)
    write_gguf(base, base, tmp_path / "good.gguf", file_type, name="tiny")
    assert failing(proven(base, tmp_path / "good.gguf", asked, file_type)) == set()
    monkeypatch.setattr(gguf_module, "turned", lambda family, config, tensor, rows: rows)
    write_gguf(base, base, tmp_path / "bad.gguf", file_type, name="tiny")
    assert failing(proven(base, tmp_path / "bad.gguf", asked, file_type)) == {"parity"}


def test_a_tensor_that_is_not_there_is_missed(base: Path, asked: Questions, tmp_path: Path) -> None:
    """llama.cpp loads a model without its biases."""
    with_biases = tiny.write_base(tmp_path / "biases", attention_bias=True, initializer_range=0.1)
    write_gguf(base, base, tmp_path / "m.gguf", "Q8_0", name="tiny")
    proof = proven(with_biases, tmp_path / "m.gguf", asked)
    gate = next(gate for gate in proof.gates if gate.name == "weights")
    assert not gate.passes and "blk.0.attn_k.bias is not in the file" in gate.detail


def test_a_file_that_does_not_load_fails_and_the_others_are_measured(
    base: Path, honest: Path, asked: Questions, tmp_path: Path
) -> None:
    (tmp_path / "cut.gguf").write_bytes(honest.read_bytes()[:-9000])
    files = {"Q6_K": tmp_path / "cut.gguf", "Q8_0": honest}
    proofs = prove_files(Origin("the model", base), files, asked, Show())
    assert proofs["Q6_K"].failures[0].startswith("loads: ") and proofs["Q8_0"].failures == []
    assert proofs["Q6_K"].as_json()["verdict"] == "fail"


def test_a_date_that_llama_cpp_puts_in_is_no_difference(base: Path, tmp_path: Path) -> None:
    """Llama 3.1's template has a date unless it is given one, and llama.cpp gives today's."""
    folder = tmp_path / "dated"
    shutil.copytree(base, folder)
    date = "{% if not date_string is defined %}{% set date_string = '1 Jan 2024' %}{% endif %}"
    first, rest = TEMPLATE.split("{% for", 1)
    dated = date + first + "<|im_start|>{{ date_string }}<|fin|>{% for" + rest
    (folder / "chat_template.jinja").write_text(dated, encoding="utf-8")
    write_gguf(folder, folder, tmp_path / "m.gguf", "Q8_0", name="tiny")
    asked = questions(load_chat_tokenizer(folder), (), tuple, 250)
    proof = proven(folder, tmp_path / "m.gguf", asked)
    assert failing(proof) == set()
    assert "date_string given" in next(gate.detail for gate in proof.gates if gate.name == "prompt")


@pytest.mark.parametrize("bos_id", [None, 1])
def test_a_base_without_template_and_bos_is_exported(bos_id: int | None, base: Path, tmp_path: Path) -> None:
    """llama.cpp thinks of a BOS where a tokenizer names none; the plain template does not ask for it."""
    folder = tiny.write_base(tmp_path / "bare", template=None, initializer_range=0.1, bos_token_id=bos_id)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_chat_tokenizer(folder)
    assert not tokenizer.has_own_template
    (folder / "chat_template.jinja").write_text(
        tokenizer.template_text, encoding="utf-8"
    )  # as a run keeps it
    assert not load_chat_tokenizer(folder).has_own_template
    write_gguf(folder, folder, tmp_path / "m.gguf", "Q8_0", name="tiny")
    assert failing(proven(folder, tmp_path / "m.gguf", questions(tokenizer, (), tuple, 250))) == set()


@pytest.mark.parametrize(
    ("plant", "caught_by"),
    [
        (swap_tensors, {"parity", "weights"}),
        (scale_one_block, {"weights"}),
        (scale_one_layer, {"parity", "weights"}),
        (forget_stop, {"stop"}),
        (spoil_one_scale, {"parity", "weights"}),
    ],
)
def test_a_planted_fault_is_caught(
    plant: Plant, caught_by: set[str], base: Path, honest: Path, asked: Questions, tmp_path: Path
) -> None:
    path = tmp_path / "planted.gguf"
    shutil.copyfile(honest, path)
    plant(path)
    assert failing(proven(base, path, asked)) == caught_by


def test_an_end_that_is_a_word_is_caught(
    base: Path, asked: Questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second end token that answers are made of: by what the file says, and by what llama.cpp does."""
    word = ordinary_tokens(asked.conversations, asked.tokenizer)[0]
    keys = {"tokenizer.ggml.eot_token_id": word}
    write_gguf(base, base, tmp_path / "m.gguf", "Q8_0", name="tiny", keys=keys)
    assert failing(proven(base, tmp_path / "m.gguf", asked)) == {"stop"}
    monkeypatch.setattr(LlamaCppBackend, "end_ids", lambda self: frozenset())
    assert failing(proven(base, tmp_path / "m.gguf", asked)) == {"stop"}


def test_rope_halves_left_as_they_are_are_caught(
    base: Path, asked: Questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Llama converter's classic: rows of q and k not turned. The weights themselves are all there."""
    monkeypatch.setattr(gguf_module, "turned", lambda family, config, tensor, rows: rows)
    assert FAMILIES["llama"].row_order
    write_gguf(base, base, tmp_path / "m.gguf", "Q8_0", name="tiny")
    assert failing(proven(base, tmp_path / "m.gguf", asked)) == {"parity"}


def written_with(base: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    """The base's file, written with a tokenizer folder that `change` has been at."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(base, folder)
    change(folder)
    write_gguf(base, folder, tmp_path / "m.gguf", "Q8_0", name="tiny")
    return tmp_path / "m.gguf"


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("assistant\n", "bot\n"), encoding="utf-8")


def other_merges(folder: Path) -> None:
    """Another tokenizer of the same size: it loads, and cuts text elsewhere."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:40]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "caught_by"), [(other_template, {"template", "prompt"}), (other_merges, {"tokens", "prompt"})]
)
def test_a_tokenizer_that_is_not_the_runs_is_caught(
    change: Callable[[Path], None], caught_by: set[str], base: Path, asked: Questions, tmp_path: Path
) -> None:
    assert failing(proven(base, written_with(base, tmp_path, change), asked)) == caught_by


def test_a_bos_that_the_template_does_not_have_is_caught(
    base: Path, honest: Path, asked: Questions, tmp_path: Path
) -> None:
    """llama.cpp takes the template's own BOS away before it adds one; what does not begin with it gets a second start."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|endoftext|>"}))
    write_gguf(base, folder, tmp_path / "m.gguf", "Q8_0", name="tiny")
    add_bos(tmp_path / "m.gguf")
    its = Questions(load_chat_tokenizer(folder), asked.rows, asked.conversations)
    proof = proven(base, tmp_path / "m.gguf", its)
    assert failing(proof) == {"prompt"}
    assert "BOS is added twice" in next(gate.detail for gate in proof.gates if gate.name == "prompt")


def test_the_conversations_hold_what_goes_wrong() -> None:
    text = "".join(message.content for c in gate_conversations() for message in c.messages)
    scripts: Sequence[str] = ("ö", "П", "京", "か", "안", "ال", "ש", "ह", "ส", "Γ", "👍🏽", "½")
    assert all(sign in text for sign in scripts)
    assert "<|im_start|>" in text and "</s>" in text and "\r\n\r\n" in text and "    four" in text
    assert any(c.messages[0].role == "system" for c in gate_conversations())
    assert max(len(c.messages) for c in gate_conversations()) >= 8
    assert all(c.messages[-1].role == "assistant" for c in gate_conversations())


REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
DROPPING = TEMPLATE.replace(
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)


@pytest.mark.parametrize("refusing", [REFUSING, DROPPING])
def test_what_a_template_refuses_or_drops_is_left_out(refusing: str, tmp_path: Path) -> None:
    """Gemma's has no system role."""
    tiny.write_tokenizer(tmp_path, refusing.replace("<|fin|>", "<|im_end|>"))
    kept = fitting(gate_conversations(), load_chat_tokenizer(tmp_path))
    assert kept and all(c.messages[0].role == "user" for c in kept)


@pytest.mark.parametrize("num_columns", [512, 300, 96])
def test_errors_of_blocks_are_the_plain_ones(num_columns: int) -> None:
    source = np.random.default_rng(0).standard_normal((3, num_columns)).astype(np.float32)
    decoded = source.copy()
    decoded[2, num_columns - 1] += 0.5
    error_B, largest_B = block_errors(source, decoded)
    last = source[2, (num_columns - 1) // 256 * 256 :]
    assert len(error_B) == len(largest_B) == 3 * -(-num_columns // 256)
    assert np.count_nonzero(error_B) == 1 and error_B[-1] == pytest.approx(0.5 / np.sqrt(len(last)))
    assert largest_B[-1] == np.abs(last).max()


def test_what_is_decoded_is_what_llama_cpp_reads(honest: Path, base: Path) -> None:
    """The decoder of the weights gate reads real values: one of them by hand."""
    tensor = next(t for t in gguf.GGUFReader(honest).tensors if t.name == "blk.0.ffn_up.weight")
    row = tensor.data[0]
    scale, quants = float(row[:2].view(np.float16)[0]), row[2:34].view(np.int8)
    assert dequantize(tensor.data, tensor.tensor_type)[0][:32] == pytest.approx(
        scale * quants.astype(np.float32)
    )
