"""Is the file the model? Every file against what it was made from: divergence, and the gates of `export/gates.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.backends import Backend
from myna.backends.llama_cpp import LlamaCppBackend
from myna.data.conversation import Conversation
from myna.data.render import ChatTokenizer, Example, render_example
from myna.engine.memory import forget_models
from myna.errors import DataError
from myna.export.blocks import compare_blocks
from myna.export.conversations import fitting, gate_conversations
from myna.export.gates import Gate, ask_all
from myna.export.parity import ENOUGH_TOKENS, FileParity, choose_rows, compare_files
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


@dataclass(frozen=True)
class Questions:
    """What is asked of every file: rows to score, conversations to render."""

    tokenizer: ChatTokenizer
    rows: Sequence[Example]
    conversations: Sequence[Conversation]

    @property
    def num_tokens(self) -> int:
        return sum(len(row.input_ids_T) for row in self.rows)

    def texts(self) -> list[str]:
        return [self.tokenizer.render_text(c, add_generation_prompt=False) for c in self.conversations]


@dataclass(frozen=True)
class FileProof:
    """What was found of one file."""

    parity: FileParity
    gates: Sequence[Gate]

    @property
    def failures(self) -> list[str]:
        """Why it is not the model, a sentence each; none where it is."""
        return [
            *self.parity.failures,
            *(f"{gate.name}: {gate.detail}" for gate in self.gates if not gate.passes),
        ]

    def sentence(self, file_type: str, origin: str) -> str:
        """One line for the terminal."""
        parity = self.parity
        passed = [gate.name for gate in self.gates if gate.passes]
        return (
            f"{file_type} = {origin}: mean KL {parity.mean_kl:.4f}, same top token {parity.same_top:.1%} over "
            f"{parity.num_targets:,} target tokens (all {parity.num_tokens:,}: {parity.mean_kl_all:.4f}); "
            f"the same: {', '.join(passed) or 'nothing'}"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            **self.parity.as_json(),
            "gates": {gate.name: gate.as_json() for gate in self.gates},
            "verdict": "fail" if self.failures else "pass",
        }


def questions(
    tokenizer: ChatTokenizer,
    held_out: Sequence[Conversation],
    more: Callable[[], Sequence[Conversation]],
    max_length: int,
) -> Questions:
    """Held-out rows with at least 1,000 tokens together; where they have fewer, `more` rows and then fixed ones.

    DataError where nothing has a target token.
    """

    def rendered(conversations: Sequence[Conversation]) -> list[Example]:
        examples = (render_example(conversation, tokenizer, max_length) for conversation in conversations)
        return [example for example in examples if example.num_targets]

    fixed = fitting(gate_conversations(), tokenizer)
    rows = rendered(held_out)
    for source in (more, lambda: fixed):
        if sum(len(row.input_ids_T) for row in rows) < ENOUGH_TOKENS:
            rows += rendered(source())
    chosen = choose_rows(rows)
    if not chosen:
        raise DataError("no row with target tokens is left to measure the model on")
    return Questions(tokenizer, chosen, [*fixed, *held_out[:GATE_ROWS]])


def prove_files(
    origin: Origin,
    files: Mapping[str, Path],
    asked: Questions,
    show: Show,
    *,
    with_importance: bool = False,
) -> dict[str, FileProof]:
    """Each file (file type → path) against `origin`."""
    measured = _compare(origin, files, asked, show)
    forget_models()
    return {
        file_type: FileProof(measured[file_type], _gates(origin, path, asked, with_importance))
        for file_type, path in files.items()
    }


def _compare(
    origin: Origin, files: Mapping[str, Path], asked: Questions, show: Show
) -> dict[str, FileParity]:
    context = max(len(row.input_ids_T) for row in asked.rows)
    reference = origin.backend()
    with ExitStack() as stack:
        backends = {t: LlamaCppBackend(path, context=context) for t, path in files.items()}
        for backend in backends.values():
            stack.callback(backend.close)
        return compare_files(
            reference, backends, asked.rows, show.counter(f"comparing with {origin.name}", len(asked.rows))
        )


def _gates(origin: Origin, path: Path, asked: Questions, with_importance: bool) -> list[Gate]:
    """The questions to a running file, then every block of its weights."""
    from myna.export.gguf import open_source

    longest = max(len(asked.tokenizer.encode(text)) for text in asked.texts())
    with contextlib.closing(LlamaCppBackend(path, context=longest + 64)) as backend:
        gates = ask_all(backend, asked.tokenizer, asked.conversations)
    with origin.weights() as weights, open_source(origin.folder, weights) as source:
        blocks = compare_blocks(path, source.rows, with_importance=with_importance)
    return [*gates, Gate("weights", blocks.passes, blocks.sentence())]
