"""The blocks of a recipe: every setting with its default and what it does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PathText = Annotated[str, Field(min_length=1)]
DEFAULT_MAX_LENGTH = 2048  # tokens, where the base reads as many
CHECKPOINTING = ("auto", "none", "all")


def _checkpointing(value: Any) -> str | int:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not is_number and value not in CHECKPOINTING:
        raise PydanticCustomError("checkpointing", "is one of auto, none, all, or a number of layers from 1")
    found: str | int = value
    return found


class Section(BaseModel):
    """One block of the recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSettings(Section):
    name: str | None = Field(
        None, description="the run's folder under ./runs; default: the stem of data.train"
    )


class ModelSettings(Section):
    base: str = Field(
        "smollm2-135m", description="packaged name · hf:org/name@revision · ./folder · ./file.gguf"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="what the frozen base computes in; auto: bf16 where this machine is fast at it, else fp16 on a GPU "
        "and fp32 on a CPU, which is slow at fp16",
    )
    quantize: Literal["none", "int8"] = Field(
        "none",
        description="storage of the frozen base: none · int8 (one byte a weight; faster where the CPU has VNNI)",
    )


class MixedRows(Section):
    """Rows of another file, beside those of data.train; what is not said here holds for all files."""

    train: PathText
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    format: str = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    system: str | None = None
    group_by: PathText | None = None


class DataSettings(Section):
    train: PathText = Field(
        description="rows to learn: a file, a folder of files, a pattern of names, or hf:org/name:split (docs/data.md)"
    )
    test: str | None = Field(None, description="held-out rows; default: a part of data.train")
    test_fraction: Fraction = Field(0.1, description="the part of data.train held out where no test is given")
    mix: list[MixedRows] = Field(
        default_factory=list,
        description="rows of other files too, {train: FILE, weight: 0.5} has half of them an epoch (docs/data.md)",
    )
    validation: PathText | None = Field(
        None, description="rows whose loss is taken at every checkpoint; default: a part of data.train"
    )
    validation_fraction: Fraction = Field(
        0.0, description="the part of data.train held out for that where no validation is given"
    )
    group_by: PathText | None = Field(
        None,
        description="a key of the rows: rows with the same value there (a customer, a text) stay on one side",
    )
    stratify: bool = Field(False, description="hold out the same part of each label (text/label rows)")
    format: str = Field(
        "auto", description="auto, or a shape by its name (docs/data.md): messages · alpaca · squad …"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our key: your key, where they differ")
    system: str | None = Field(None, description="system text for conversations that have none")
    on_bad_row: Literal["fail", "skip", "quarantine"] = Field(
        "fail",
        description="rows that cannot be used: fail · skip · quarantine (skip, and keep them in the run)",
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="the assistant turns that are learnt: all · last (earlier ones are context)"
    )
    no_answer: PathText = Field(
        "unanswerable", description="the answer to a question that its text does not answer (SQuAD v2)"
    )
    paths: Literal["best", "all"] = Field(
        "best", description="of a tree of replies: the best ranked path · all"
    )
    language: str | None = Field(
        None, description="of trees of replies, those in this language alone: en, de, fa"
    )
    assistant: str | None = Field(None, description="of logs of chats: the speaker who is the assistant")
    max_length: Annotated[int, Field(ge=8)] | None = Field(
        None, description="longest row in tokens; default: the model's context, at most 2048"
    )
    cut_long: bool = Field(False, description="cut longer rows even where that is more than 1 % of them")


class AdapterSettings(Section):
    method: Literal["lora", "rslora"] = Field("lora", description="lora · rslora")
    r: Annotated[int, Field(ge=1)] = Field(16, description="rank")
    alpha: Annotated[float, Field(gt=0)] = Field(16, description="scale of the adapter: alpha / r")
    dropout: Fraction = Field(0.0, description="dropout before the adapter, a mask for each target module")
    target_modules: str | list[str] = Field("all-linear", description="all-linear, or names of layers")


class TrainSettings(Section):
    epochs: Annotated[int, Field(ge=1)] = Field(1, description="times through the rows")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="stop after so many steps, where the epochs have more"
    )
    max_rows: Annotated[int, Field(ge=1)] | None = Field(
        None, description="read so many rows of data.train, and of each file of data.mix"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(8, description="rows a step")
    order: Literal["shuffled", "length", "file"] = Field(
        "shuffled",
        description="of the rows of an epoch: shuffled · length (short ones first) · file (as there)",
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak; default: by method and width"
    )
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear", description="after the warm-up: linear · cosine · constant · wsd (falls in the last 20 %)"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(5, description="steps from 0 to the peak")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.01, description="of AdamW, on the adapter's matrices"
    )
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.999], description="of AdamW: how long its two averages remember"
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="gradients are scaled to it; 0: off"
    )
    save_every_steps: Annotated[int, Field(ge=1)] = Field(25, description="steps between checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=1)] = Field(3, description="the newest n stay")
    packed: bool = Field(True, description="rows side by side; false takes the reference path")
    pack_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="tokens computed at once; default: 1024"
    )
    gradient_checkpointing: Annotated[str | int, PlainValidator(_checkpointing)] = Field(
        "auto",
        description="run layers again in the backward: none · all · N (every N layers); auto: where memory asks for it",
    )
    checkpoint_to: Literal["device", "cpu", "disk"] = Field(
        "device",
        description="where gradient checkpointing keeps layers' inputs: device · cpu (memory, from a GPU) · disk",
    )
    seed: Annotated[int, Field(ge=0)] = Field(42, description="of order, split and adapter")


class CheckpointSettings(Section):
    every_minutes: Annotated[float, Field(gt=0)] | None = Field(
        10.0, description="minutes between checkpoints, where train.save_every_steps is longer; null: off"
    )
    keep_best: bool = Field(
        True,
        description="the checkpoint with the least validation loss stays, where there are validation rows",
    )
    keep_every_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="checkpoints whose step is a multiple of it stay too"
    )
    adapter: Literal["last", "best"] = Field(
        "last", description="what becomes the adapter: the last step · the best validation loss"
    )
    mirror: PathText | None = Field(
        None, description="a folder that gets a copy of each checkpoint, on another disk or drive"
    )


class EvaluateSettings(Section):
    max_rows: Annotated[int, Field(ge=1)] = Field(200, description="held-out rows that are answered")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="longest answer; default: the longest expected one and a quarter more, at most 512"
    )


class ExportSettings(Section):
    quantize: list[str] = Field(
        default_factory=lambda: ["Q4_K_M", "Q8_0"], description="GGUF files to write, as upstream spells them"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of merged/")
    importance: bool = Field(
        False, description="weigh columns by what training rows put into them; worth it below 4 bits"
    )
