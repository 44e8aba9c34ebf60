"""An adapter on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors, as plain peft loads them.

Nothing else in such a folder is looked at: trainers leave pickled optimizers and arguments beside the two.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from myna.adapters.folders import check_adapter_folder, check_adapter_patterns
from myna.errors import ModelError
from myna.model.load import quiet_libraries
from myna.run import file_sha256, new_directory, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE_SHA256 = "myna_base_sha256"  # in the header of the weights: which base they were trained on
IN_FRONT = "they change no weight, but put learnt vectors before the prompt or into the attention"


def save_adapter(model: Any, folder: Path, *, base_sha256: str | None = None) -> None:
    """Writes the adapter of a peft model; the same weights (and base) give the same bytes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    metadata = {"format": "pt"} | ({BASE_SHA256: base_sha256} if base_sha256 else {})
    with new_directory(folder) as temporary:
        contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        (temporary / WEIGHTS).write_bytes(_with_metadata(save(contiguous), metadata))
        config = model.peft_config["default"]
        if isinstance(config.target_modules, set):  # written in the order of a set, the file would differ
            config.target_modules = sorted(config.target_modules)
        inference_mode, config.inference_mode = config.inference_mode, True
        config.save_pretrained(str(temporary))
        config.inference_mode = inference_mode


def _with_metadata(file: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata in the order given: the library's own order is another each time."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = {"__metadata__": dict(metadata)} | json.loads(file[8:end])
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + file[end:]


def load_adapter(model: Any, folder: Path) -> Any:
    """A base model with the adapter of `folder` on it (a peft model, frozen).

    A base with fewer tokens than the embedding that the adapter brings is made larger first. Raises ModelError where
    the adapter does not fit, or is of a kind that cannot be merged.
    """
    from peft import PeftModel
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from myna.model.load import refuse_not_finite

    read_adapter_config(folder)
    check_adapter_patterns(folder, [name for name, _ in model.named_modules()])
    refuse_not_finite(load_file(folder / WEIGHTS).items(), folder / WEIGHTS)
    _resize(model, folder)
    try:
        with _as_errors():
            return PeftModel.from_pretrained(model, str(folder), local_files_only=True).eval()
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError, _DoesNotFit) as error:
        raise ModelError(
            f"the adapter does not fit its base: {_reason(error)}",
            where=str(folder),
            help="--base SPEC names the base it was trained on",
        ) from error


def merge_adapter(model: Any, folder: Path) -> Any:
    """The base of a peft model with the adapter added into its weights, by peft; ModelError where peft cannot.

    An embedding that the adapter changes is no longer the head, where the two were one tensor: they part before.
    """
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if hasattr(embedding, "base_layer") or hasattr(head, "base_layer"):
        weight = getattr(head, "base_layer", head).weight
        if weight is getattr(embedding, "base_layer", embedding).weight:
            getattr(head, "base_layer", head).weight = type(weight)(
                weight.detach().clone(), requires_grad=False
            )
            base.config.tie_word_embeddings = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the two have parted
            return model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(
            f"peft cannot merge this adapter: {_reason(error)}",
            where=str(folder),
            help="peft itself runs it; LoRA, DoRA, LoHa, IA3 and others can be merged",
        ) from error


def read_adapter_config(folder: Path) -> Mapping[str, Any]:
    """adapter_config.json; ModelError where the folder is no adapter, is pickled, or of a kind that has no weights."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"is no adapter folder: there is no {CONFIG} in it", where=str(folder))
    check_adapter_folder(folder)
    config = read_json(folder / CONFIG)
    quiet_libraries()
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kind = str(config.get("peft_type"))
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ModelError(f"peft has no method {kind!r}", where=str(folder / CONFIG))
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if not hasattr(tuner, "merge_and_unload"):
        raise ModelError(
            f"adapters of the kind {kind} cannot be merged: {IN_FRONT}",
            where=str(folder / CONFIG),
            help="peft itself runs them; adapters that change weights (LoRA, DoRA, LoHa, IA3, …) can be merged",
        )
    if config.get("alora_invocation_tokens"):
        raise ModelError(
            "is an activated LoRA, which works only after tokens that invoke it: no merged model does that",
            where=str(folder / CONFIG),
            help="peft itself runs it",
        )
    return config


def adapter_sha256(folder: Path) -> str:
    """Of both files together: the same weights at another alpha are another adapter."""
    digests = "\n".join(file_sha256(folder / name) for name in (CONFIG, WEIGHTS))
    return hashlib.sha256(digests.encode()).hexdigest()


def trained_on(folder: Path) -> str | None:
    """The digest of the base that the adapter was trained on, where Myna wrote it; None in anybody else's."""
    with _reading(folder) as tensors:
        return (tensors.metadata() or {}).get(BASE_SHA256)


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape, from the header alone."""
    with _reading(folder) as tensors:
        names = list(tensors.keys())
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS, framework="np") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(folder / WEIGHTS)) from error


def _resize(model: Any, folder: Path) -> None:
    """Gives the base as many tokens as the embeddings in the adapter have: somebody added some and trained them."""
    shapes = adapter_shapes(folder)
    names = {id(module): name for name, module in model.named_modules()}
    brought = [
        shapes.get(f"base_model.model.{names.get(id(module))}.weight")
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    num_tokens = model.get_input_embeddings().weight.shape[0]
    wanted = next((shape[0] for shape in brought if shape is not None), num_tokens)
    if wanted == num_tokens:
        return
    if brought[0] is None or (brought[1] is None and not model.config.tie_word_embeddings):
        raise ModelError(
            f"it was trained with {wanted} tokens, the base has {num_tokens}, and not every embedding is in it",
            where=str(folder),
            help="save it again with peft's save_embedding_layers=True",
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)
    model.requires_grad_(False)


class _DoesNotFit(Exception):
    """A warning of peft's that says weights are missing: taken for what it is."""


@contextlib.contextmanager
def _as_errors() -> Iterator[None]:
    """peft only warns where tensors of the adapter are missing and stay random."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise _DoesNotFit(str(warning.message))


def _reason(error: Exception) -> str:
    """The line that names what is wrong; torch begins with one that does not."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "size mismatch" in line), lines[0])
