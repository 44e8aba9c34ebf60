"""TRL with PEFT as its users resume it, in lives that can be ended: run by the peer's own interpreter, one job a line.

A job is {"output": FOLDER, "model": FOLDER, "rows": FILE, "steps": N, "kill_after": SECONDS | null, "in_save": bool}; the
answer {"code", "saving", "said"}. Children are forked from a process that has imported all and computed nothing, as
tests/survival/nursery.py does for Myna.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import sys
import time
from typing import Any

LONGEST = 180.0


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(live(json.loads(line))), flush=True)


def live(job: dict[str, Any]) -> dict[str, Any]:
    page = mmap.mmap(-1, 1)
    reading, writing = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        code = 1
        try:
            train(job, page)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    said, killed, entered = b"", False, None
    while True:
        now = time.monotonic()
        if entered is None and (page[0] if job.get("in_save") else True):
            entered = now if job.get("in_save") else started
        after = job.get("kill_after")
        due = after is not None and entered is not None and now - entered >= after
        if not killed and (due or now - started > LONGEST):
            killed, saving = True, bool(page[0])
            os.kill(pid, signal.SIGKILL)
        if select.select([reading], [], [], 0.0005)[0]:
            block = os.read(reading, 1 << 16)
            said += block
            if not block:
                break
    _, status = os.waitpid(pid, 0)
    os.close(reading)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "saving": killed and saving, "said": said.decode(errors="replace")[-3000:]}


def train(job: dict[str, Any], page: mmap.mmap) -> None:
    """A script as the documentation has it: the last checkpoint where there is one, saved at every step, three kept."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTConfig, SFTTrainer

    with open(job["rows"], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in rows
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"])
    config = SFTConfig(
        output_dir=job["output"],
        per_device_train_batch_size=4,
        max_steps=job["steps"],
        learning_rate=1e-2,
        logging_steps=1,
        max_length=256,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        seed=42,
        gradient_checkpointing=False,
    )
    lora = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules="all-linear")
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, peft_config=lora, processing_class=tokenizer
    )
    honest = trainer._save_checkpoint

    def save(*arguments: Any, **settings: Any) -> None:
        page[0] = 1
        try:
            honest(*arguments, **settings)
        finally:
            page[0] = 0

    trainer._save_checkpoint = save  # type: ignore[method-assign]
    last = get_last_checkpoint(job["output"]) if os.path.isdir(job["output"]) else None
    print(f"resumes from {last}", flush=True)
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(os.path.join(job["output"], "final"))


if __name__ == "__main__":
    main()
