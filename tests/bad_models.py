"""A corpus of foreign files that no program should trust: `CORPUS` names each, how it is made and what refuses it.

`python tests/bad_models.py FOLDER` writes them all there, to look at or to try on another program.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from bad_files import GGUF, SAFETENSORS, Bad, Kit, changed, entry, large_tokenizer, model, pickled, weights

# Folders

FOLDERS: Mapping[str, Bad] = {
    "pickled-model": Bad("pickled .*any program", changed(pickled)),
    "no-weights": Bad("there is no model.safetensors", changed(lambda f: (f / "model.safetensors").unlink())),
    "code-in-config": Bad(
        "trust_remote_code",
        model(config_json={"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}),
    ),
    "code-in-tokenizer": Bad(
        "trust_remote_code", model(tokenizer_config_json={"auto_map": {"AutoTokenizer": ["t.T", None]}})
    ),
    **{
        f"quantized-{method}": Bad(
            f"{method} quantized; a Hugging Face folder",
            model(config_json={"quantization_config": {"quant_method": method}}),
        )
        for method in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors")
    },
    "quantized-without-saying": Bad(
        "quantized .*I32", weights({"model.layers.0.mlp.up_proj.qweight": entry("I32")})
    ),
    "quantized-float8": Bad(
        "quantized .*F8_E4M3", weights({"model.layers.0.mlp.up_proj.weight": entry("F8_E4M3", (16,))})
    ),
    "own-weights-file": Bad(
        "transformers_weights", model(config_json={"transformers_weights": "../x.safetensors"})
    ),
    "config-a-list": Bad("no JSON object", model(config_json="[1, 2]")),
    "config-no-json": Bad("no JSON", model(config_json="{")),
    "config-nested": Bad("nested too deeply", model(config_json='{"a":' * 100_000)),
    "config-of-a-gigabyte": Bad(
        "at most 10,000,000", changed(lambda f: os.truncate(f / "config.json", 1 << 30))
    ),
    "config-a-billion-layers": Bad(
        "1,000,000,000; 2 layers", model(config_json={"num_hidden_layers": 10**9})
    ),
    "config-negative-width": Bad("hidden_size is '-64'", model(config_json={"hidden_size": -64})),
    "config-width-a-text": Bad("no size", model(config_json={"hidden_size": "64"})),
    "config-huge-head": Bad("head_dim is 1,000,000,000", model(config_json={"head_dim": 10**9})),
    "config-huge-context": Bad(
        "max_position_embeddings is", model(config_json={"max_position_embeddings": 10**15})
    ),
    "config-other-vocabulary": Bad("vocab_size is 399", model(config_json={"vocab_size": 399})),
    "config-no-such-model": Bad("does not recognize", model(config_json={"model_type": "no_such_model"})),
    "config-rope-a-text": Bad("refused|could not", model(config_json={"rope_parameters": "fast"})),
    "config-no-heads": Bad("no size", model(config_json={"num_attention_heads": 0})),
    "tokenizer-missing": Bad("no tokenizer.json", changed(lambda f: (f / "tokenizer.json").unlink())),
    "tokenizer-a-list": Bad("no JSON object", model(tokenizer_json="[]")),
    "tokenizer-no-model": Bad("no model", model(tokenizer_json="{}")),
    "tokenizer-cut": Bad("no JSON", changed(lambda f: os.truncate(f / "tokenizer.json", 900))),
    "tokenizer-of-8-gigabytes": Bad("at most 64,000,000", changed(large_tokenizer)),
    "tokenizer-number-twice": Bad(
        "same number",
        model(tokenizer_json={"model": {"type": "BPE", "vocab": {"a": 1, "b": 1}, "merges": []}}),
    ),
    "tokenizer-number-beyond": Bad(
        "embeddings have 400",
        model(tokenizer_json={"model": {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}}),
    ),
    "tokenizer-of-another-kind": Bad(
        "cannot be read", model(tokenizer_json={"model": {"type": "Magic", "vocab": {"a": 1}}})
    ),
    "tokenizer-config-a-list": Bad("no JSON object", model(tokenizer_config_json="[]")),
}


# Chat templates

LOOP = "{% for i in range(99999) %}"
GROW = "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
TEMPLATES: Mapping[str, Bad] = {
    f"template-{name}": Bad(says, model(chat_template_jinja=template))
    for name, template, says in (
        ("range", "{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("loops", LOOP * 2 + "{% endfor %}" * 2, "longer than"),
        ("repeats", "{{ 'a' * 10**9 }}", "more text"),
        ("powers", "{{ 9**(9**9) }}", "numbers beyond"),
        ("percent", "{{ '%1000000000d' % 1 }}", "width"),
        ("format", "{{ '{:1000000000d}'.format(1) }}", "width"),
        ("centers", "{{ 'a'|center(10**9) }}", "width"),
        ("indents", "{{ 'a'|indent(10**9) }}", "width"),
        ("joins", "{{ range(99999)|join('a'*99999) }}", "more text"),
        ("replaces", "{{ ('a'*9999)|replace('a', 'b'*99999) }}", "more text"),
        ("doubles", GROW + "{% set n.x = n.x + n.x %}{% endfor %}", "more text"),
        ("nests", GROW + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}", "more text"),
        ("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself"),
        ("tree", "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}", "longer than"),
        ("lipsum", "{{ lipsum(10**6) }}", "undefined"),
        ("escape", "{{ ''.__class__.__mro__ }}", "unsafe"),
        ("include", "{% include '/etc/passwd' %}", "no loader"),
        ("syntax", "{% for %}", "not valid Jinja"),
        ("parentheses", "{{ " + "(" * 30_000 + " }}", "not valid Jinja"),
        ("novel", "{# a #}" * 10_000, "at most 65,536"),
        ("a-novel-to-say", "{{ raise_exception('no ' * 10**5) }}", "refuses a conversation: no"),
    )
} | {"template-no-utf-8": Bad("not UTF-8", model(chat_template_jinja=b"\xff\xfe{{ messages }}"))}  # fmt: skip


# Adapters


def adapter(**settings: object) -> Callable[[Kit], Path]:
    return adapter_changed(lambda folder: None, **settings)


def adapter_changed(change: Callable[[Path], None], **settings: object) -> Callable[[Kit], Path]:
    """The sound adapter folder with other settings, after `change`."""

    def make(kit: Kit) -> Path:
        folder = kit.folder / "adapter"
        shutil.copytree(kit.adapter, folder)
        path = folder / "adapter_config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(kit.base)} | settings)
        )
        change(folder)
        return folder

    return make


def adapter_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def made(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return made


def with_nan(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = np.nan


def without_one(tensors: dict[str, Any]) -> None:
    del tensors[next(iter(tensors))]


def of_other_width(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = np.zeros((4, 63), dtype=np.float32)


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


ADAPTERS: Mapping[str, Bad] = {
    "adapter-pickled": Bad("pickled .*any program", adapter_changed(pickled_adapter)),
    "adapter-no-weights": Bad(
        "no adapter_model.safetensors", adapter_changed(lambda f: (f / "adapter_model.safetensors").unlink())
    ),
    "adapter-unknown-kind": Bad("no method 'MAGIC'", adapter(peft_type="MAGIC")),
    "adapter-kind-a-number": Bad("no method", adapter(peft_type=7)),
    "adapter-rank-0": Bad("r is '0'", adapter(r=0)),
    "adapter-rank-a-billion": Bad("r is '1000000000'", adapter(r=10**9)),
    "adapter-rank-pattern-a-billion": Bad("rank_pattern is", adapter(rank_pattern={"q_proj": 10**9})),
    "adapter-alpha-nan": Bad("lora_alpha is 'nan'", adapter(lora_alpha=float("nan"))),
    "adapter-alpha-a-text": Bad("lora_alpha is", adapter(lora_alpha="8")),
    "adapter-no-targets": Bad("target_modules is empty", adapter(target_modules=[])),
    "adapter-targets-numbers": Bad("target_modules is", adapter(target_modules=[1, 2])),
    "adapter-targets-not-there": Bad("does not fit", adapter(target_modules=["no_such_module"])),
    "adapter-pattern-for-ever": Bad("longer than 1 s", adapter(target_modules=r"(([a-z._0-9]+)+)+!")),
    "adapter-rank-pattern-for-ever": Bad("longer than 1 s", adapter(rank_pattern={r"(([a-z._0-9]+)+)+!": 4})),
    "adapter-pattern-broken": Bad("no regular expression", adapter(target_modules="(((")),
    "adapter-imports-a-module": Bad(
        "import a module", adapter(megatron_config={"a": 1}, megatron_core="antigravity")
    ),
    "adapter-copies-layers": Bad("copies layers", adapter(layer_replication=[[0, 10**9]])),
    "adapter-code": Bad("trust_remote_code", adapter(auto_map={"AutoModel": "x.Y"})),
    "adapter-nan": Bad("not finite", adapter_changed(adapter_weights(with_nan))),
    "adapter-other-width": Bad("does not fit", adapter_changed(adapter_weights(of_other_width))),
    "adapter-tensor-missing": Bad("does not fit", adapter_changed(adapter_weights(without_one))),
    "adapter-config-a-list": Bad(
        "no JSON object", adapter_changed(lambda f: (f / "adapter_config.json").write_text("[]") and None)
    ),
}

CORPUS: Mapping[str, Bad] = GGUF | SAFETENSORS | FOLDERS | TEMPLATES | ADAPTERS


def write_kit(folder: Path) -> Kit:
    """The sound things, and a place for the bad ones."""
    import tiny
    from tiny_adapters import lora, write_adapter

    from myna.export.gguf import write_gguf

    base = tiny.write_base(folder / "base")
    write_gguf(base, base, folder / "sound.gguf", "F32", name="sound")
    return Kit(base, folder / "sound.gguf", write_adapter(folder / "adapter", base, lora()), folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    kit = write_kit(target)
    for name, bad in CORPUS.items():
        (target / name).mkdir()
        bad.make(Kit(kit.base, kit.gguf, kit.adapter, target / name))
