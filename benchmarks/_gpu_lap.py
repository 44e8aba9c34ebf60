"""One lap of the GPU race, in a process of its own: a Llama of random weights, some steps of LoRA, one JSON line at the end.

    PYTHON benchmarks/_gpu_lap.py '{"variant": "myna", "shape": "1b", …}'

Nothing is downloaded. The peers' laps need what they are named after, and nothing of Myna.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

RANK, ALPHA, RATE = 16, 16, 2e-4
# of a step's tokens, by row: short and long ones as instructions have them
SHARES = (0.02, 0.05, 0.08, 0.1, 0.13, 0.16, 0.2, 0.26)
HALF_SCALE = 2.0**10  # fp16: every side's loss is multiplied by it; nothing is skipped
ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 8192}
# the published config.json of Llama 3.2 1B and Llama 3.1 8B
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": ROPE | {"factor": 32.0},
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": ROPE | {"factor": 8.0},
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}
COMMON = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
COMMON |= {"max_position_embeddings": 131072, "bos_token_id": 0, "eos_token_id": 1}
Row = tuple[list[int], int]  # its tokens, and how many of them at the end are in the loss


def main() -> None:
    lap = json.loads(sys.argv[1])
    try:
        found = LAPS[lap["variant"]](lap)
    except RuntimeError as error:  # what torch raises where a GPU's memory ends is one
        if "out of memory" not in str(error):
            raise
        found = {"out_of_memory": True}
    print(json.dumps(found))


def made_rows(lap: dict[str, Any], step: int) -> list[Row]:
    """The rows of a step: eight of random tokens, `tokens` of them in all, the second half of each in the loss."""
    draw, tokens = random.Random(step), lap["tokens"]
    lengths = [max(2, int(share * tokens)) for share in SHARES]
    lengths[-1] += tokens - sum(lengths)
    vocabulary = (COMMON | SHAPES[lap["shape"]])["vocab_size"]
    return [([draw.randrange(2, vocabulary) for _ in range(n)], n // 2) for n in draw.sample(lengths, 8)]


def new_model(lap: dict[str, Any]) -> Any:
    """The base with random weights, on the device, in the lap's number format."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(lap["device"]):
        config = LlamaConfig(**(COMMON | SHAPES[lap["shape"]]))
        return AutoModelForCausalLM.from_config(config, dtype=_dtype(lap)).requires_grad_(False)


def timed(lap: dict[str, Any], step: Callable[[list[Row]], float]) -> dict[str, Any]:
    """Runs the steps; their losses, and rate and peak of device memory over those that are not warm ones."""
    losses, seconds = [], 0.0
    for number in range(lap["warm"] + lap["steps"]):
        rows = made_rows(lap, number)
        if number == lap["warm"]:
            _finish(lap, reset=True)
        started = time.perf_counter()
        losses.append(step(rows))
        _finish(lap)
        seconds += (time.perf_counter() - started) * (number >= lap["warm"])
    return {"tokens_per_s": lap["tokens"] * lap["steps"] / seconds, "losses": losses, **_memory(lap)}


def myna_lap(lap: dict[str, Any]) -> dict[str, Any]:
    """Myna's step: all rows of a step in one pack."""
    import numpy as np

    from myna.adapters.methods import add_adapter, trainable_parameters
    from myna.data.packing import collate
    from myna.data.render import IGNORE, Example
    from myna.engine.optim import flatten_adapter
    from myna.engine.scaling import LossScale, mean_loss
    from myna.engine.step import best_kernels, choose_kernels, make_stepper
    from myna.engine.threads import usable_cores
    from myna.settings import AdapterSettings, TrainSettings

    model = add_adapter(new_model(lap), AdapterSettings(r=RANK, alpha=ALPHA), seed=0, base_name="random")
    adapter = flatten_adapter(trainable_parameters(model), TrainSettings(learning_rate=RATE))
    name, why = best_kernels(lap["device"], lap["dtype"])
    kernels, layers = choose_kernels(name, usable_cores()), int(lap["checkpointing"])
    stepper = make_stepper(model, "fast", kernels=kernels, checkpoint_layers=layers)
    scaling = LossScale(HALF_SCALE) if lap["dtype"] == "fp16" else None

    def example(ids: list[int], answer: int) -> Example:
        return Example(np.array(ids), np.where(np.arange(len(ids)) < len(ids) - answer, IGNORE, ids))

    def step(rows: list[Row]) -> float:
        batch = collate([example(*row) for row in rows], share=True)
        loss = mean_loss(stepper, batch, len(batch.targets_N), scaling)
        loss.backward()
        if scaling:
            adapter.gradient_P.div_(scaling.scale)
        adapter.clip(1.0)
        adapter.step(RATE)
        stepper.refresh()
        return float(loss.detach()) / (scaling.scale if scaling else 1.0)

    return {**timed(lap, step), "detail": f"{name}{f' ({why})' if why else ''}"}


def plain_lap(lap: dict[str, Any]) -> dict[str, Any]:
    """transformers and peft as they are: `micro` rows at a time, padded to the longest of them."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = new_model(lap)
    if lap["checkpointing"]:
        # under its older name where transformers has no newer one
        name = "activation_checkpointing_enable"
        getattr(base, name, base.gradient_checkpointing_enable)({"use_reentrant": False})
    targets = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, targets).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, fused=True)
    scale = HALF_SCALE if lap["dtype"] == "fp16" else 1.0

    def step(rows: list[Row]) -> float:
        total = 0.0
        num_targets = sum(answer for _, answer in rows)
        for first in range(0, len(rows), lap["micro"]):
            ids, mask, labels = _padded(rows[first : first + lap["micro"]], lap["device"])
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            sums = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
            (sums * (scale / num_targets)).backward()
            total += float(sums.detach()) / num_targets
        for parameter in trained:
            parameter.grad /= scale
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return {**timed(lap, step), "detail": f"{lap['micro']} rows at once"}


def trl_lap(lap: dict[str, Any]) -> dict[str, Any]:
    """TRL's SFTTrainer with Liger's kernels."""
    import liger_kernel  # noqa: F401
    from peft import LoraConfig

    targets = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return _trainer_lap(lap, new_model(lap), use_liger_kernel=True, peft_config=targets)


def unsloth_lap(lap: dict[str, Any]) -> dict[str, Any]:
    """Unsloth's model in TRL's SFTTrainer. It reads models from folders only, so the random weights are written to one."""
    from unsloth import FastLanguageModel  # before transformers: it changes classes there

    with tempfile.TemporaryDirectory() as folder:
        new_model(lap).save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        settings = {"max_seq_length": lap["tokens"], "dtype": _dtype(lap), "load_in_4bit": False}
        model, _ = FastLanguageModel.from_pretrained(folder, **settings)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    again = "unsloth" if lap["checkpointing"] else False
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=ALPHA, target_modules=names, use_gradient_checkpointing=again
    )
    return _trainer_lap(lap, model)


def _trainer_lap(
    lap: dict[str, Any], model: Any, *, use_liger_kernel: bool = False, peft_config: Any = None
) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    num_steps = lap["warm"] + lap["steps"]
    rows = [row for step in range(num_steps) for row in made_rows(lap, step)]
    masks = [[0] * (len(ids) - answer) + [1] * answer for ids, answer in rows]
    data = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "completion_mask": masks})

    class Clock(TrainerCallback):
        seconds, started = 0.0, 0.0

        def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            _finish(lap, reset=state.global_step == lap["warm"])
            self.started = time.perf_counter()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            _finish(lap)
            self.seconds += (time.perf_counter() - self.started) * (state.global_step > lap["warm"])

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=num_steps,
            per_device_train_batch_size=len(SHARES),
            learning_rate=RATE,
            max_length=lap["tokens"],
            gradient_checkpointing=lap["checkpointing"],
            use_liger_kernel=use_liger_kernel,
            bf16=lap["dtype"] == "bf16",
            fp16=lap["dtype"] == "fp16",
            use_cpu=lap["device"] == "cpu",
            train_sampling_strategy="sequential",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            completion_only_loss=True,
        )
        clock = Clock()
        trainer = SFTTrainer(
            model,
            args=settings,
            train_dataset=data,
            processing_class=_tokenizer(),
            peft_config=peft_config,
            callbacks=[clock],
        )
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    rate = lap["tokens"] * lap["steps"] / clock.seconds
    return {"tokens_per_s": rate, "losses": losses, **_memory(lap), "detail": f"{len(SHARES)} rows at once"}


def _tokenizer() -> Any:
    """A tokenizer that has what a trainer asks for; the rows are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def _padded(rows: list[Row], device: str) -> Any:
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids_BL = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BL, labels_BL = torch.zeros_like(ids_BL), torch.full_like(ids_BL, -100)
    for number, (ids, answer) in enumerate(rows):
        ids_BL[number, : len(ids)] = torch.tensor(ids)
        mask_BL[number, : len(ids)] = 1
        labels_BL[number, len(ids) - answer : len(ids)] = torch.tensor(ids[len(ids) - answer :])
    return ids_BL.to(device), mask_BL.to(device), labels_BL.to(device)


def _dtype(lap: dict[str, Any]) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[lap["dtype"]]


def _finish(lap: dict[str, Any], *, reset: bool = False) -> None:
    """Waits for the device; `reset`: its peak of memory begins anew."""
    if lap["device"] == "cpu":
        return
    import torch

    torch.cuda.synchronize()
    if reset:
        torch.cuda.reset_peak_memory_stats()


def _memory(lap: dict[str, Any]) -> dict[str, float]:
    """The device's peak in MB; of a CPU, who started this process knows it."""
    if lap["device"] == "cpu":
        return {}
    import torch

    return {"peak_mb": torch.cuda.max_memory_allocated() / 1e6}


LAPS = {
    "myna": myna_lap,
    "padded": plain_lap,
    "unpacked": plain_lap,
    "trl-liger": trl_lap,
    "unsloth": unsloth_lap,
}

if __name__ == "__main__":
    main()
