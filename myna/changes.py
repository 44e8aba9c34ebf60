"""What differs between a run and what is asked of it now: setting by setting, and by what files hold, not where they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from myna.checkpoint import list_checkpoints, step_of
from myna.errors import RecipeError
from myna.plan import plan_of
from myna.recipe import build_recipe
from myna.run import Run, timestamp, write_json

# Settings that a resumed run may change: they do not touch what is trained.
FREE_SETTINGS = (
    "run.name",
    "evaluate.",
    "export.quantize",
    "export.importance",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "checkpoint.",
)
LENGTHS = ("train.epochs", "train.max_steps")  # how long a run is: it may become longer
PLACES = ("data.train", "data.test", "data.validation", "model.base")  # compared by what is found there
# entries of a plan that decide no byte
TOLD_ONLY = ("num_rows", "num_steps", "memory_mb", "total_memory_mb", "path_reason", "kernels_reason")


@dataclass(frozen=True)
class Made:
    """What a run is made from: settings by block, the base's digests, each file's digest (and rows), the plan's entries.

    `data` is None where the rows could not be read again; `plan` where it is not compared.
    """

    settings: Mapping[str, Any]
    base: Mapping[str, Any]
    data: Mapping[str, Mapping[str, Any]] | None
    plan: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """What a manifest keeps of it: each part with its digest."""
        assert self.data is not None and self.plan is not None
        files = {name: {"sha256": file["sha256"], "rows": file["rows"]} for name, file in self.data.items()}
        keys = ("name", "sha256", "config_sha256")
        return {
            "recipe": {"sha256": digest(self.settings), "settings": self.settings},
            "plan": {"sha256": digest(self.plan), "entries": self.plan},
            "base": {key: self.base[key] for key in keys if key in self.base},
            "data": files,
        }


def made_from_json(manifest: Mapping[str, Any]) -> Made:
    """Reads back what `as_json` wrote. What an older Myna did not know has its default; errors as those who read it."""
    recipe = build_recipe(manifest["recipe"]["settings"], where="the checkpoint's recipe").model_dump(
        mode="json"
    )
    plan = asdict(plan_of(manifest["plan"]["entries"], where="the checkpoint's plan"))
    return Made(recipe, manifest["base"], manifest["data"], plan)


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object, its keys in order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(before: Made, now: Made) -> list[str]:
    """One sentence for each thing that is not as it was and decides what is trained."""
    found = [*_settings(before, now), *_base(before.base, now.base)]
    if before.data is not None and now.data is not None:
        found += _data(before.data, now.data)
    if before.plan is not None and now.plan is not None:
        found += [
            f"plan.json: {key}: {before.plan.get(key)} → {now.plan.get(key)}"
            for key in sorted(before.plan.keys() | now.plan.keys())
            if before.plan.get(key) != now.plan.get(key) and key not in TOLD_ONLY
        ]
    return found


def _settings(before: Made, now: Made) -> Iterator[str]:
    ours, theirs = _flat(before.settings), _flat(now.settings)
    free = (*FREE_SETTINGS, *LENGTHS, *(PLACES if before.data is not None and now.data is not None else ()))
    for key in sorted(ours.keys() | theirs.keys()):
        if key.startswith(free):
            continue
        old, new = (_without_places(key, side.get(key)) for side in (ours, theirs))
        if old != new:
            yield f"{key}: {ours.get(key)} → {theirs.get(key)}"


def _without_places(key: str, value: Any) -> Any:
    if key != "data.mix" or not isinstance(value, list):
        return value
    return [{k: v for k, v in entry.items() if k != "train"} for entry in value]


def _base(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before["sha256"] != now["sha256"]:
        yield f"the weights of the base model changed ({before.get('name')} → {now.get('name')})"
    elif before.get("config_sha256", now.get("config_sha256")) != now.get("config_sha256"):
        yield "config.json of the base model changed"


def _data(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            yield f"data.{name} {'was given' if new is None else 'was not given'}"
        elif old["sha256"] != new["sha256"]:
            yield f"the file data.{name} changed" + (f" ({new['path']})" if "path" in new else "")
        elif old.get("rows", new["rows"]) != new["rows"]:
            yield f"data.{name} is read as {new['rows']} rows now, and was {old['rows']}"


def refuse(run: Run, changed: Sequence[str], what: str = "the run") -> None:
    """RecipeError that tells every change, where there is one."""
    if changed:
        raise RecipeError(
            f"{what} was made from something else:\n  " + "\n  ".join(changed),
            where=str(run.path),
            help="put it back to go on, or --set run.name=NAME to start another run; --force goes on all the same",
            code="changed",
        )


def note_forced(run: Run, changes: Sequence[str]) -> None:
    """Writes down that a run went on all the same, and that its checkpoints up to now are of something else."""
    step = max(map(step_of, list_checkpoints(run.checkpoints_dir)), default=0)
    info = run.info()
    entry = {"when": timestamp(), "after_step": step, "changes": list(changes)}
    write_json(run.path / "run.json", info | {"forced": [*info.get("forced", []), entry]})


def is_accepted(run: Run, step: int) -> bool:
    """Whether somebody took the responsibility for going on from a checkpoint of something else."""
    return any(entry["after_step"] >= step for entry in run.info().get("forced", []))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and prefix.count(".") < 1:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
