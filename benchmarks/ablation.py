"""Each trick of the training step switched off in turn: what it buys. The page goes to benchmarks/results/.

    python benchmarks/ablation.py --data ROWS.jsonl [--rounds 3] [--steps 8]

Every lap is a process of its own and runs the engine's step on the packaged model with the labs' recipe; the variants take
turns, and each is compared with what is shipped in the same round.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _children import run_child  # noqa: E402
from _laps import BASE, BATCH_SIZE, MAX_LENGTH  # noqa: E402
from _machine import RESULTS_DIR, commit, load_average, machine, say, shown_command, today, versions  # noqa: E402

from myna.engine.threads import BRIEF_SPIN, fast_in_bfloat16, fast_in_int8, usable_cores  # noqa: E402

NUM_WARM = 2


@dataclass(frozen=True)
class Variant:
    """What is changed against what is shipped: settings of the lap, and variables of its process."""

    description: str
    changes: Mapping[str, Any]
    variables: Mapping[str, str]


def _variant(description: str, variables: Mapping[str, str] | None = None, **changes: Any) -> Variant:
    return Variant(description, changes, BRIEF_SPIN if variables is None else variables)


VARIANTS: Mapping[str, Variant] = {
    "shipped": _variant("as shipped: bf16, C kernels"),
    "torch": _variant("no C compiler: torch kernels", kernels="torch"),
    "narrow": _variant("bf16 products as torch has them", widen=False),
    "wide": _variant("bf16 weights multiplied in fp32", widen=True),
    "wide-torch": _variant(
        "bf16 weights multiplied in fp32 by torch's products", widen=True, products="torch"
    ),
    "dropout": _variant("LoRA dropout 0.05", dropout=0.05, share=False),
    "unshared": _variant("shared beginnings computed in every row", share=False),
    "unpacked": _variant("every row a pack of its own", unpacked=True),
    "ungrouped": _variant(
        "low-rank parts, and q, k, v and gate, up, as products of their own", ungrouped=True
    ),
    "all-targets": _variant("loss, and so the head, on every token of a row", all_targets=True),
    "collector": _variant("Python's garbage collector left on", collector=True),
    "trimmed": _variant("memory given back to the system after every step", trimmed=True),
    "checkpointed": _variant("gradient checkpointing of every layer", checkpoint_layers=1),
    "reference": _variant("reference path: transformers + peft, padded", path="reference", share=False),
    "default-spin": _variant("OpenMP spins as it does by default", variables={}),
    "passive": _variant("OpenMP does not spin at all", variables={"OMP_WAIT_POLICY": "PASSIVE"}),
    "int8": _variant("int8 base", int8=True),
    "int8-narrow": _variant("int8 base, products in integers", int8=True, int8_products="int8"),
    "int8-wide": _variant("int8 base, products in fp32", int8=True, int8_products="fp32"),
    "int8-torch": _variant("int8 base, torch kernels", int8=True, kernels="torch"),
}


@dataclass(frozen=True)
class Lap:
    """Settings of one measured lap, in the process that runs it."""

    kernels: str = "native"
    widen: bool = not fast_in_bfloat16()
    products: str = "native"
    path: str = "fast"
    share: bool = True
    unpacked: bool = False
    ungrouped: bool = False
    all_targets: bool = False
    collector: bool = False
    trimmed: bool = False
    checkpoint_layers: int = 0
    int8: bool = False
    int8_products: str = "int8" if fast_in_int8() else "fp32"
    dropout: float = 0.0


def main() -> None:
    arguments = _arguments()
    if arguments.lap:
        print(json.dumps(run_lap(replace(Lap(), **VARIANTS[arguments.lap].changes), arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.variants}
    before = load_average()
    for turn in range(arguments.rounds):
        for name in arguments.variants:
            words = ["--lap", name, "--data", str(arguments.data), "--steps", str(arguments.steps)]
            command = [sys.executable, str(Path(__file__).resolve()), *words]
            child = run_child(command, cwd=ROOT, variables=VARIANTS[name].variables)
            found[name].append(json.loads(child.stdout.splitlines()[-1]) | {"process_mb": child.peak_mb})
            say(f"round {turn + 1}: {name} {found[name][-1]['tokens_per_s']:.0f} tokens/s")
    text = page(found, arguments, before)
    place = arguments.results / f"{today()}-ablation-{arguments.data.stem}.md"
    arguments.results.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")
    print(text)


def page(
    found: Mapping[str, Sequence[Mapping[str, float]]], arguments: argparse.Namespace, before: str
) -> str:
    """The result as Markdown; each figure is a median, each ratio the median of the ratios within a round."""
    lines = [
        f"# Ablation of the training step, {today()}",
        "",
        f"{machine()}; {', '.join(f'{k} {v}' for k, v in versions(sys.executable).items())}; checkout {commit()}; "
        f"load before: {before}.",
        "",
        f"`{shown_command(sys.argv)}`: {BASE}, {BATCH_SIZE} rows a step, r 16, medians of {arguments.rounds} rounds.",
        "",
        "| changed | tokens/s | of what is shipped | peak RSS, MB |",
        "| --- | ---: | ---: | ---: |",
    ]
    shipped = [lap["tokens_per_s"] for lap in found["shipped"]]
    for name, laps in found.items():
        rates = [lap["tokens_per_s"] for lap in laps]
        ratio = statistics.median(rate / base for rate, base in zip(rates, shipped, strict=True))
        memory = statistics.median(lap["process_mb"] for lap in laps)
        rate = statistics.median(rates)
        lines.append(f"| {VARIANTS[name].description} | {rate:,.0f} | {ratio:.2f} | {memory:,.0f} |")
    return "\n".join(lines) + "\n"


def run_lap(lap: Lap, arguments: argparse.Namespace) -> dict[str, float]:
    """Trains in this process and tells the rate over the steps that are not warm ones."""
    import torch

    from myna.adapters.methods import add_adapter, trainable_parameters
    from myna.data.packing import collate
    from myna.engine.optim import flatten_adapter
    from myna.engine.step import choose_kernels, make_stepper
    from myna.model.load import load_base
    from myna.model.sources import resolve_base
    from myna.settings import AdapterSettings, TrainSettings

    threads = usable_cores()
    torch.set_num_threads(threads)
    base = resolve_base(BASE, say)
    examples = _examples(base.folder, arguments)
    if lap.all_targets:
        examples = [replace(example, labels_T=example.input_ids_T) for example in examples]
    model = load_base(base.folder, "bf16")
    model = add_adapter(model, AdapterSettings(r=16, alpha=16, dropout=lap.dropout), seed=0, base_name=BASE)
    adapter = flatten_adapter(trainable_parameters(model), TrainSettings(learning_rate=2e-4))
    steps = [examples[n * BATCH_SIZE :][:BATCH_SIZE] for n in range(NUM_WARM + arguments.steps)]
    stepper = make_stepper(
        model,
        lap.path,  # type: ignore[arg-type]
        kernels=choose_kernels(lap.kernels, threads, widen=lap.widen, products=lap.products),  # type: ignore[arg-type]
        quantize_with=collate(steps[0], share=True) if lap.int8 else None,
        int8_products=lap.int8_products,  # type: ignore[arg-type]
        checkpoint_layers=lap.checkpoint_layers,
    )
    if lap.ungrouped:
        for group in stepper.decoder.groups():  # type: ignore[attr-defined]
            group.frozen = SplitWeight(group)
    if not lap.collector:
        gc.freeze()
        gc.disable()
    tokens, seconds = 0, 0.0
    for number, rows in enumerate(steps):
        packs = [[row] for row in rows] if lap.unpacked else [rows]
        draws = [(0, number, pack) if lap.dropout else None for pack in range(len(packs))]
        batches = [collate(pack, share=lap.share, draw=draw) for pack, draw in zip(packs, draws, strict=True)]
        started = time.perf_counter()
        _step(stepper, adapter, batches, lap)
        if number >= NUM_WARM:
            seconds += time.perf_counter() - started
            tokens += sum(sum(batch.lengths) for batch in batches)
    return {"tokens_per_s": tokens / seconds}


def _step(stepper: Any, adapter: Any, batches: Sequence[Any], lap: Lap) -> None:
    from myna.engine.memory import give_back_memory

    num_targets = sum(len(batch.targets_N) for batch in batches)
    for batch in batches:
        (stepper.loss(batch) / num_targets).backward()
    adapter.clip(1.0)
    adapter.step(2e-4)
    stepper.refresh()
    if lap.trimmed:
        give_back_memory()


class SplitWeight:
    """The products of a group one by one, each with its low-rank part in a product of its own, behind the same seam."""

    def __init__(self, group: Any) -> None:
        self.dense, self.parts = group.frozen, group.parts
        for name in ("num_out", "num_in", "rank", "low"):
            setattr(self, name, getattr(self.dense, name))

    def product(self, xh: Any, kernels: Any) -> Any:
        import torch

        dense, num_in = self.dense, self.dense.num_in
        x = xh[:, :num_in].contiguous()
        answers = []
        for part in self.parts:
            h = xh[:, num_in + part.ranks.start : num_in + part.ranks.stop]
            answers.append(
                torch.addmm(x @ dense.weight_NK[part.rows].T, h, dense.low.b_NR[part.rows, part.ranks].T)
            )
        return torch.cat(answers, 1)

    def product_back(self, ggh: Any, kernels: Any) -> Any:
        import torch

        dense, total = self.dense, None
        for part in self.parts:
            gh = ggh[:, dense.num_out + part.ranks.start : dense.num_out + part.ranks.stop]
            back = torch.addmm(ggh[:, part.rows] @ dense.weight_NK[part.rows], gh, dense.low.a_RK[part.ranks])
            total = back if total is None else total.add_(back)
        return total


def _examples(folder: Path, arguments: argparse.Namespace) -> list[Any]:
    from myna.data.render import load_chat_tokenizer, render_example
    from myna.data.rows import load_conversations

    count = (NUM_WARM + arguments.steps) * BATCH_SIZE
    rows = load_conversations(arguments.data, format_name="auto", columns={}, max_rows=count).conversations
    tokenizer = load_chat_tokenizer(folder)
    return [render_example(row, tokenizer, MAX_LENGTH) for row in rows]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="rows, as `myna train` reads them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--variants", type=lambda text: text.split(","), default=list(VARIANTS))
    parser.add_argument("--results", type=Path, default=RESULTS_DIR)
    parser.add_argument("--lap", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
