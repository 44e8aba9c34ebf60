"""A plain LoRA adapter read from its file, pair by pair: scale · B @ A is what it adds to a tensor of its base.

Plain is what needs nothing but these pairs: LoRA and rsLoRA, with ranks and alphas by layer or without. Names, scale
and sum are those of peft (`tuners/lora/layer.py`, `utils/save_and_load.py`).

    R rows · C columns · r rank
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.adapters.files import WEIGHTS
from myna.errors import ModelError
from myna.export.encoder import Floats
from myna.run import read_json

MERGE_CURE = "`myna merge RUN` makes one model of it, and `myna export RUN` a file of that"

# Settings that say how the adapter was made or where it goes, and not what it adds.
_TOLD = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
        *("exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
        *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version"),
        *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
    }
)
_COMPUTED = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
# Of these starts the base is left as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) take their part out of it.
_STARTS = (True, False, "gaussian", "orthogonal", "eva", None)
_REASONS = {
    "use_dora": "DoRA scales whole weights by learnt magnitudes",
    "modules_to_save": "whole layers were trained beside it",
    "lora_bias": "its B has biases",
    "bias": "biases of the base were trained",
    "fan_in_fan_out": "its layers store their weights turned round",
    "trainable_token_indices": "it has trained single tokens' embeddings",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it starts to work in the middle of a text",
    "target_parameters": "it adapts parameters that are no layers",
}
_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_(?:embedding_)?[AB])(?:\.weight)?")


@dataclass(frozen=True)
class Pair:
    """What is added to one tensor of the base. `a_key` [r, C], `b_key` [R, r]: names in the adapter's file.

    An embedding's are stored the other way round: `a_key` [r, R], `b_key` [C, r], and the sum is (B @ A)ᵀ.
    """

    a_key: str
    b_key: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    scale: float
    embedding: bool

    @property
    def rank(self) -> int:
        return self.a_shape[0]

    @property
    def alpha(self) -> float:
        """What divided by the rank is the scale: the config's alpha, or √r times that for rsLoRA."""
        return self.scale * self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """[R, C] of the tensor it is for."""
        rows, columns = self.b_shape[0], self.a_shape[1]
        return (columns, rows) if self.embedding else (rows, columns)


@dataclass(frozen=True)
class LoraFile:
    """The pairs of one adapter, by the name of the base's tensor."""

    path: Path
    pairs: Mapping[str, Pair]

    def factors(self, name: str) -> tuple[Any, Any]:
        """(A, B) of one tensor as torch float32, as they are stored."""
        import torch
        from safetensors import safe_open

        pair = self.pairs[name]
        with safe_open(self.path, framework="pt") as handle:
            a_tensor, b_tensor = handle.get_tensor(pair.a_key), handle.get_tensor(pair.b_key)
        return a_tensor.to(torch.float32), b_tensor.to(torch.float32)

    def delta(self, name: str) -> Floats:
        """[R, C] float32: scale · B @ A, in the order of operations that peft has."""
        a_rC, b_Rr = self.factors(name)
        product_RC = b_Rr @ a_rC
        product_RC *= self.pairs[name].scale
        if self.pairs[name].embedding:
            product_RC = product_RC.T.contiguous()
        rows: Floats = product_RC.numpy()
        return rows

    def require_fits(self, shapes: Mapping[str, tuple[int, ...]], base_dir: Path) -> None:
        """ModelError where a tensor is not in this base, has another shape there, or is shared with the head."""
        self._require_untied(base_dir)
        for name, pair in self.pairs.items():
            if shapes.get(name) != pair.shape:
                found = f"is {list(shapes[name])} there" if name in shapes else "is not in it"
                raise ModelError(
                    f"the adapter does not fit {base_dir}: {name} {list(pair.shape)} {found}",
                    where=str(self.path),
                    help="name the base that it was trained on",
                )

    def _require_untied(self, base_dir: Path) -> None:
        from myna.adapters.methods import NOT_TARGETS
        from myna.model.load import read_config

        ends = [n for n, p in self.pairs.items() if p.embedding or n.split(".")[-2] in NOT_TARGETS]
        if ends and getattr(read_config(base_dir), "tie_word_embeddings", False):
            raise ModelError(
                f"the adapter changes {ends[0]}, and embeddings and head are one tensor in this base: "
                "added to both it would be another model",
                where=str(self.path),
                help="train without an adapter on the head and the embeddings",
            )


def not_plain(adapter_dir: Path) -> str | None:
    """Why an adapter is more than pairs of A and B beside an unchanged base, or None where it is just that."""
    config = _read_config(adapter_dir)
    kind = config.get("peft_type")
    if kind != "LORA":
        return f"its method is {kind}, which is no product of two matrices beside the base"
    for key, value in config.items():
        if key in _TOLD or key in _COMPUTED or not value or (key, value) == ("bias", "none"):
            continue
        return f"{_REASONS.get(key, 'this setting changes what it computes')} ({key})"
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        return f"it was trained on a base that {start} had changed (init_lora_weights)"
    odd = [key for key in _read_shapes(adapter_dir) if not _KEY.fullmatch(key)]
    return f"it brings {odd[0]}, which is no pair of A and B" if odd else None


def read_lora(adapter_dir: Path) -> LoraFile:
    """The pairs of a plain LoRA or rsLoRA adapter. ModelError for every other kind, with the reason and the way."""
    path = adapter_dir / WEIGHTS
    reason = not_plain(adapter_dir)
    if reason:
        raise ModelError(
            f"the adapter is more than LoRA pairs: {reason}", where=str(adapter_dir), help=MERGE_CURE
        )
    config, shapes = _read_config(adapter_dir), _read_shapes(adapter_dir)
    sides: dict[str, dict[str, str]] = {}
    for key in shapes:
        match = _KEY.fullmatch(key)
        assert match is not None
        sides.setdefault(match[1], {})[match[2]] = key
    pairs = {
        f"{module}.weight": _pair(module, found, shapes, config, path) for module, found in sides.items()
    }
    if not pairs:
        raise ModelError("holds no tensors", where=str(path))
    return LoraFile(path, pairs)


def _pair(
    module: str,
    found: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    path: Path,
) -> Pair:
    """A and B of one layer; ModelError where one is missing or they are not of one rank, the config's."""
    embedding = "lora_embedding_A" in found
    wanted = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if set(found) != set(wanted):
        raise ModelError(
            f"{module} has {', '.join(sorted(found))}, not {' and '.join(wanted)}", where=str(path)
        )
    a_key, b_key = (found[side] for side in wanted)
    rank, scale = _rank_and_scale(module, config, path)
    a_shape, b_shape = shapes[a_key], shapes[b_key]
    if (len(a_shape), len(b_shape)) != (2, 2) or not a_shape[0] == b_shape[1] == rank:
        raise ModelError(
            f"{module}: A is {list(a_shape)} and B {list(b_shape)}; with the config's rank {rank} "
            f"they are [{rank}, C] and [R, {rank}]",
            where=str(path),
        )
    return Pair(a_key, b_key, a_shape, b_shape, scale, embedding)


def _rank_and_scale(module: str, config: Mapping[str, Any], where: Path) -> tuple[int, float]:
    """What peft makes of the config for a layer: alpha / r, or alpha / √r for rsLoRA."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    try:
        rank = ranks.get(get_pattern_key(ranks, module), config["r"])
        alpha = alphas.get(get_pattern_key(alphas, module), config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise ModelError(f"the rank or alpha of {module} is no number: {error}", where=str(where)) from error
    return int(rank), float(scale)


def _read_config(adapter_dir: Path) -> dict[str, Any]:
    path = adapter_dir / "adapter_config.json"
    if not path.is_file():
        raise ModelError("is no PEFT adapter: there is no adapter_config.json in it", where=str(adapter_dir))
    config = read_json(path)
    if config.get("peft_type") == "LORA" and not {"r", "lora_alpha"} <= set(config):
        raise ModelError("has no r or no lora_alpha", where=str(path))
    return config


def _read_shapes(adapter_dir: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    path = adapter_dir / WEIGHTS
    if not path.is_file():
        pickled = (
            "; pickled ones (.bin) are never loaded" if (adapter_dir / "adapter_model.bin").is_file() else ""
        )
        cure = "have its author save it with save_pretrained(folder), as safetensors" if pickled else None
        raise ModelError(f"there is no {WEIGHTS} in it{pickled}", where=str(adapter_dir), help=cure)
    try:
        with safe_open(path, framework="pt") as handle:
            return {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(path)) from error
