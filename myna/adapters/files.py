"""An adapter on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors, as plain peft loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from myna.errors import ModelError
from myna.run import new_directory

WEIGHTS = "adapter_model.safetensors"


def save_adapter(model: Any, folder: Path) -> None:
    """Writes the adapter of a peft model; the same weights give the same bytes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    with new_directory(folder) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary / WEIGHTS)
        config = model.peft_config["default"]
        if isinstance(config.target_modules, set):  # written in the order of a set, the file would differ
            config.target_modules = sorted(config.target_modules)
        inference_mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(temporary))
        config.inference_mode = inference_mode


def load_adapter(model: Any, folder: Path) -> Any:
    """A base model with the adapter of `folder` on it (a peft model, frozen). ModelError where it does not fit."""
    from peft import PeftModel
    from safetensors import SafetensorError

    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"there is no {WEIGHTS} in it", where=str(folder), help="`myna train RECIPE` makes it"
        )
    try:
        return PeftModel.from_pretrained(model, str(folder), local_files_only=True).eval()
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        text = str(error).strip().splitlines()[0]
        raise ModelError(f"the adapter does not fit its base: {text}", where=str(folder)) from error
