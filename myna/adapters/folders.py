"""What a folder with a foreign PEFT adapter may hold: looked at before peft opens any of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from myna.model.folders import check_entries, refuse_pickles
from myna.model.plain_files import read_object, refuse, shown
from myna.model.safetensors_header import read_safetensors_header

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of an adapter_config.json that make peft import a module by its name, or copy layers as often as it says.
REFUSED_SETTINGS = {
    "megatron_config": "peft would import a module by the name in it",
    "layer_replication": "it copies layers of the base, which no other program could follow",
}
PATTERN_SECONDS = 1  # of processor time; matching the names of a large model takes a hundredth
WALL_SECONDS = 10  # where processor time has no limit, and for a machine that does not come round to it
TRY_PATTERNS = """
import json, re, sys
patterns, names, seconds = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
except ImportError:
    pass
for pattern in map(re.compile, patterns):
    for name in names:
        pattern.match(name), pattern.fullmatch(name)
"""
PLAIN_PATTERN = re.compile(r"[\w.$^\\]*")  # nothing in it repeats, so it ends at once


def check_adapter_folder(folder: Path) -> None:
    """ModelError where a PEFT adapter folder is not one that can be read safely."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        refuse(folder, f"is no adapter folder: there is no {ADAPTER_CONFIG} in it")
    check_entries(folder)
    config = read_object(path)
    if not (folder / ADAPTER_WEIGHTS).exists():
        refuse_pickles(folder, ADAPTER_WEIGHTS)
    tensors = read_safetensors_header(folder / ADAPTER_WEIGHTS)
    if not tensors:
        refuse(folder / ADAPTER_WEIGHTS, "holds no tensors")
    if config.get("auto_map"):
        refuse(path, "needs code of its own (auto_map), which trust_remote_code would run; Myna runs none")
    for key, why in REFUSED_SETTINGS.items():
        if config.get(key):
            refuse(path, f"{key} is set: {why}")
    _check_numbers(path, config, max(max(tensor.shape, default=1) for tensor in tensors.values()))
    _check_names(path, config)


def _check_numbers(path: Path, config: Mapping[str, Any], largest: int) -> None:
    """Ranks that tensors of the file could have, and scales that are numbers."""
    ranks, scales = (_pattern(path, config, f"{what}_pattern") for what in ("rank", "alpha"))
    smallest = 0 if config.get("peft_type") == "OFT" else 1  # 0: its block size is given instead
    given = list(ranks.values())
    if config.get("peft_type") == "ADALORA":  # peft keeps which of the ranks are left, for each module
        given = [rank for rank in given if not _is_mask(rank, largest)]
    for key, value in [("r", config.get("r")), *(("rank_pattern", rank) for rank in given)]:
        if value is not None and (type(value) is not int or not smallest <= value <= largest):
            refuse(path, f"{key} is {shown(value)}; ranks from 1 to {largest:,} fit its tensors")
    alphas = [("alpha_pattern", alpha) for alpha in scales.values()]
    for key, value in [*((k, config.get(k)) for k in ("lora_alpha", "alpha", "lora_dropout")), *alphas]:
        if value is not None and (type(value) not in (int, float) or not -1e6 <= value <= 1e6):
            refuse(path, f"{key} is {shown(value)}, no number that can be used")


def _is_mask(value: Any, largest: int) -> bool:
    return isinstance(value, list) and len(value) <= largest and all(type(kept) is bool for kept in value)


def _pattern(path: Path, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        refuse(path, f"{key} is no object")
    return value


def _check_names(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("target_modules") == []:
        refuse(path, "target_modules is empty")
    for key in (
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "target_parameters",
        "layers_pattern",
    ):
        value = config.get(key)
        names = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            refuse(path, f"{key} is {shown(value)}, no name and no list of names")


def check_adapter_patterns(folder: Path, names: Iterable[str]) -> None:
    """ModelError where a pattern in adapter_config.json takes longer than PATTERN_SECONDS on the module names of a base.

    peft matches regular expressions out of that file, and one of ten characters can take longer than the universe lasts.
    They are tried in a process that can be ended.
    """
    path = folder / ADAPTER_CONFIG
    config = read_object(path)
    wanted = [config.get(key) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    wanted = [one for value in wanted for one in (value if isinstance(value, list) else [value])]
    patterns = [p for p in wanted if isinstance(p, str)]
    patterns += [key for what in ("rank", "alpha") for key in _pattern(path, config, f"{what}_pattern")]
    tried = [pattern for pattern in patterns if not PLAIN_PATTERN.fullmatch(pattern)]
    if not tried:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", TRY_PATTERNS],
            input=json.dumps(
                [[form for p in tried for form in (p, rf"(.*\.)?({p})$")], list(names), PATTERN_SECONDS]
            ),
            capture_output=True,
            text=True,
            check=False,
            timeout=WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        _refuse_slow(path, tried[0])
    if done.returncode < 0:  # ended by the system, at its limit
        _refuse_slow(path, tried[0])
    if done.returncode:
        refuse(path, f"a pattern in it is no regular expression: {shown(tried[0])}", "list the names instead")


def _refuse_slow(path: Path, pattern: str) -> NoReturn:
    refuse(
        path,
        f"a pattern in it takes longer than {PATTERN_SECONDS} s: {shown(pattern)}",
        "list the names instead",
    )
