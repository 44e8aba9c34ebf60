"""Files that run a program where they are unpickled or imported: each would make a folder that a test looks for."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Trap:
    """What a pickle holds: unpickled, it makes the folder `sprung`."""

    sprung: Path

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.sprung), 0o777, True)


def pickled(trap: Trap) -> bytes:
    """As older torch saves, and every trainer its arguments."""
    return pickle.dumps(trap)


def zipped(trap: Trap) -> bytes:
    """As torch.save writes since 1.6: a pickle in a zip archive."""
    import io

    import torch

    file = io.BytesIO()
    torch.save({"state": trap}, file)
    return file.getvalue()


def array(trap: Trap) -> bytes:
    """A numpy array of objects: a pickle behind a header."""
    import io

    import numpy as np

    file = io.BytesIO()
    np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    return file.getvalue()


def module(trap: Trap) -> bytes:
    return f"import os\n\nos.makedirs({str(trap.sprung)!r}, exist_ok=True)\n".encode()


# What trainers leave beside weights, and what their names make a loader open.
FILES: Mapping[str, Any] = {
    "pytorch_model.bin": zipped,
    "adapter_model.bin": zipped,
    "model.pt": zipped,
    "x.pt": pickled,
    "x.pth": zipped,
    "x.ckpt": pickled,
    "x.pkl": pickled,
    "x.npy": array,
    "training_args.bin": pickled,
    "optimizer.pt": zipped,
    "optimizer.bin": pickled,
    "scheduler.pt": zipped,
    "scaler.pt": pickled,
    "rng_state.pth": zipped,
    "modeling_x.py": module,
    "configuration_x.py": module,
    "tokenization_x.py": module,
    "sitecustomize.py": module,
    "conftest.py": module,
    "__init__.py": module,
}
CODE = {
    "AutoConfig": "configuration_x.X",
    "AutoModelForCausalLM": "modeling_x.X",
    "AutoModel": "modeling_x.X",
}


def lay(folder: Path, sprung: Path, *names: str) -> None:
    """Traps of these names, or all, in a folder; files that are there stay."""
    for name in names or FILES:
        if not (folder / name).exists():
            (folder / name).write_bytes(FILES[name](Trap(sprung)))


def name_code(config: Path) -> None:
    """Has a config.json say that classes of its own, in the folder's modules, are to be used."""
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": CODE}))
