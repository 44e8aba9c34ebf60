"""Tiny real objects for tests: a tokenizer trained on a few kB, a random two-layer model, rows, a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
COLOURS = ("red", "green", "blue", "grey", "black", "white", "brown", "pink")
THINGS = ("lamp", "chair", "table", "mug", "shelf", "clock", "tent", "bowl")


def rows(num_rows: int, start: int = 0) -> list[dict[str, str]]:
    """Prompt and completion rows, no prompt twice."""
    made = []
    for number in range(start, start + num_rows):
        colour = COLOURS[number % len(COLOURS)]
        thing = THINGS[number // len(COLOURS) % len(THINGS)]
        answer = json.dumps({"colour": colour, "thing": thing, "number": number})
        made.append({"prompt": f"I want the {colour} {thing} number {number}.", "completion": answer})
    return made


def write_rows(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


def write_tokenizer(folder: Path, template: str | None = CHATML) -> None:
    """A byte-level BPE tokenizer as transformers saves one, pre-tokenizer as SmolLM has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in rows(64)] * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def model_config(family: str = "llama", **changes: Any) -> Any:
    """A transformers config of a family, two layers of width 64."""
    from transformers import AutoConfig

    settings = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        **changes,
    }
    return AutoConfig.for_model(family, **settings)


def write_base(folder: Path, family: str = "llama", template: str | None = CHATML, **changes: Any) -> Path:
    """A whole base model folder: random weights from a fixed seed, tokenizer, template."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(family, **changes))
    model.save_pretrained(folder)
    write_tokenizer(folder, template)
    return folder


def recipe_text(base: Path, train_path: Path, **blocks: dict[str, Any]) -> str:
    """A recipe in YAML (JSON is YAML) for a tiny base and rows."""
    tree: dict[str, Any] = {
        "model": {"base": str(base), "dtype": "fp32"},
        "data": {"train": str(train_path)},
        "adapter": {"r": 4, "alpha": 8},
        "train": {"batch_size": 4, "learning_rate": 0.01, "save_every_steps": 3, "warmup_steps": 2},
        "evaluate": {"max_tokens": 8},
        "export": {"quantize": ["Q8_0"]},
    }
    for block, settings in blocks.items():
        tree[block] = {**tree.get(block, {}), **settings}
    return json.dumps(tree)
