"""Is the file the model? Every file against what it was made from: divergence, and the gates of `export/gates.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.backends import Backend
from myna.backends.llama_cpp import LlamaCppBackend
from myna.data.conversation import Conversation
from myna.data.render import ChatTokenizer, Example, render_example, render_prompt
from myna.engine.memory import forget_models
from myna.errors import DataError, ModelError
from myna.export.blocks import compare_blocks
from myna.export.conversations import fitting, gate_conversations
from myna.export.gates import Gate, ask_all, shortest
from myna.export.parity import ENOUGH_TARGETS, ENOUGH_TOKENS, FileParity, choose_rows, compare_file
from myna.export.weights import Weights, open_adapted
from myna.show import Show

GATE_ROWS = 30  # held-out rows that the gates render, besides the fixed conversations


@dataclass(frozen=True)
class Origin:
    """What files are made from and measured against: a whole model, or base + adapter where `adapter_dir` is given."""

    name: str
    folder: Path
    adapter_dir: Path | None = None
    dtype: str = "fp32"

    @contextlib.contextmanager
    def weights(self) -> Iterator[Weights | None]:
        """What `write_gguf` reads instead of the folder's own tensors; None where it is these."""
        if self.adapter_dir is None:
            yield None
            return
        with open_adapted(self.folder, self.adapter_dir) as weights:
            yield weights

    def model(self) -> Any:
        """It through torch: a transformers model, or a peft model of one."""
        from myna.adapters.files import load_adapter
        from myna.model.load import load_base

        model = load_base(self.folder, self.dtype)
        return load_adapter(model, self.adapter_dir) if self.adapter_dir else model

    def plain_model(self) -> Any:
        """The same without an adapter on it: where there is one it is summed, in memory."""
        model = self.model()
        return model.merge_and_unload() if self.adapter_dir else model

    def backend(self) -> Backend:
        """It, answering through torch."""
        from myna.backends.torch_backend import TorchBackend

        return TorchBackend(self.model(), self.name)


def unproven(path: Path) -> Path:
    """Where a file lies until it is proven."""
    return path.with_name(f".unproven-{path.name}")


@dataclass(frozen=True)
class Questions:
    """What is asked of every file: rows to score, conversations to render."""

    tokenizer: ChatTokenizer
    rows: Sequence[Example]
    conversations: Sequence[Conversation]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.input_ids_T) for row in self.rows)


@dataclass(frozen=True)
class FileProof:
    """What was found of one file. `parity` is None where it could not be run."""

    parity: FileParity | None
    gates: Sequence[Gate]

    @property
    def failures(self) -> list[str]:
        """Why it is not the model, a sentence each; none where it is."""
        failing = [f"{gate.name}: {gate.detail}" for gate in self.gates if not gate.passes]
        return [*(self.parity.failures if self.parity else []), *failing]

    def sentence(self, file_type: str, origin: str) -> str:
        """One line for the terminal."""
        passed = ", ".join(gate.name for gate in self.gates if gate.passes) or "nothing"
        parity = self.parity
        if parity is None:
            return f"{file_type}: {self.failures[0]}"
        return (
            f"{file_type} against {origin}: mean KL {parity.mean_kl:.4f}, same top token {parity.same_top:.1%} over "
            f"{parity.num_targets:,} target tokens (all {parity.num_tokens:,}: {parity.mean_kl_all:.4f}); "
            f"the same: {passed}"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            **(self.parity.as_json() if self.parity else {}),
            "gates": {gate.name: gate.as_json() for gate in self.gates},
            "verdict": "fail" if self.failures else "pass",
        }


def questions(
    tokenizer: ChatTokenizer,
    held_out: Sequence[Conversation],
    more: Callable[[], Sequence[Conversation]],
    max_length: int,
) -> Questions:
    """Rows with at least 1,000 tokens together, 300 of them targets.

    Held-out rows, where they have too few tokens `more` rows, and where answers are short the fixed conversations after
    them. DataError where nothing has a target token.
    """

    def rendered(conversations: Sequence[Conversation]) -> Iterator[Example]:
        for conversation in conversations:
            example = render_example(conversation, tokenizer, max_length)
            if example.num_targets:
                yield example

    # a template that refuses even this says why, once
    tokenizer.render_text(gate_conversations()[0], add_generation_prompt=False)
    fixed = fitting(gate_conversations(), tokenizer)
    rows = choose_rows(rendered(held_out))
    if sum(len(row.input_ids_T) for row in rows) < ENOUGH_TOKENS:
        rows += choose_rows(rendered(more()), ENOUGH_TOKENS - sum(len(row.input_ids_T) for row in rows))
    num_tokens, num_targets = sum(len(row.input_ids_T) for row in rows), sum(row.num_targets for row in rows)
    rows += choose_rows(rendered(fixed), ENOUGH_TOKENS - num_tokens, ENOUGH_TARGETS - num_targets)
    if not rows:
        raise DataError("no row with target tokens is left to measure the model on")
    rows_too = [*fixed, *_with_prompts(held_out)] or _with_prompts(more())
    return Questions(tokenizer, rows, rows_too)


def _with_prompts(rows: Sequence[Conversation]) -> list[Conversation]:
    return [row for row in rows if not row.is_text][:GATE_ROWS]


def prove_files(
    origin: Origin,
    files: Mapping[str, Path],
    asked: Questions,
    show: Show,
    *,
    with_importance: Collection[str] = (),
) -> dict[str, FileProof]:
    """Each file (file type → path) against `origin`; `with_importance` are the types that were encoded with it.

    A file that llama.cpp cannot load or run is one that fails.
    """
    proofs = {}
    measured = _compare(origin, files, asked, show)
    forget_models()
    for file_type, path in files.items():
        found = measured[file_type]
        if isinstance(found, Gate):
            proofs[file_type] = FileProof(None, [found])
        else:
            proofs[file_type] = FileProof(found, _gates(origin, path, asked, file_type in with_importance))
    return proofs


def _compare(
    origin: Origin, files: Mapping[str, Path], asked: Questions, show: Show
) -> dict[str, FileParity | Gate]:
    """One file after another: each holds its head in float32."""
    context = max(len(row.input_ids_T) for row in asked.rows)
    reference = origin.backend()
    count = show.counter(f"comparing with {origin.name}", len(asked.rows) * len(files))
    found: dict[str, FileParity | Gate] = {}
    for file_type, path in files.items():
        with contextlib.closing(LlamaCppBackend(path, context=context)) as backend:
            try:
                found[file_type] = compare_file(reference, backend, file_type, asked.rows, count)
            except ModelError as error:
                found[file_type] = Gate("loads", False, error.message)
    return found


def _gates(origin: Origin, path: Path, asked: Questions, with_importance: bool) -> list[Gate]:
    """The questions to a running file, then every block of its weights."""
    from myna.export.gguf import open_source

    few = shortest(asked.conversations, asked.tokenizer)
    longest = max(len(render_prompt(c.prompt(), asked.tokenizer)) for c in few)
    with contextlib.closing(LlamaCppBackend(path, context=longest + 64)) as backend:
        try:
            gates = ask_all(backend, asked.tokenizer, asked.conversations)
        except ModelError as error:
            gates = [Gate("loads", False, error.message)]
    with origin.weights() as weights, open_source(origin.folder, weights) as source:
        shapes = {info.name: info.shape for info in source.infos}
        blocks = compare_blocks(path, shapes, source.rows, with_importance=with_importance)
    return [*gates, Gate("weights", blocks.passes, blocks.sentence())]
