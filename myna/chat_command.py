"""The options of `myna chat`, and which kind of talk they ask for."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from myna.errors import UsageError

Target = Annotated[
    str,
    typer.Argument(
        metavar="RUN|FILE.gguf|FOLDER|BASE",
        help="a run, a .gguf file, an adapter or model folder, a base model by name, or hf:org/name@revision",
    ),
]
PromptFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="ask what stands in a file, as one turn; then end")
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="end the answer where this text comes")]


def chat(
    target: Target,
    once: Annotated[str | None, typer.Option(metavar="TEXT", help="ask one question, then end")] = None,
    prompt_file: PromptFile = None,
    raw: Annotated[bool, typer.Option("--raw", help="continue the file without a chat template")] = False,
    stop: Stop = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="default: the run's data.system")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="longest answer [default: 90 for one answer, 512 in a chat]")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token")] = 0.2,
    top_p: Annotated[float, typer.Option(help="choose among the likeliest tokens of this share")] = 0.9,
    repeat_penalty: Annotated[float, typer.Option(help="above 1: tokens said before are less likely")] = 1.0,
    repeat_last_n: Annotated[int, typer.Option(help="over how many last tokens")] = 64,
    seed: Annotated[int, typer.Option(help="the same seed gives the same answer")] = 0,
    file: Annotated[
        str | None, typer.Option(metavar="TYPE", help="which exported file of a run: Q8_0, …")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="SPEC", help="the base of an adapter folder; default: its config's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Talk to a run (before any export too), to a .gguf file, to an adapter on its base, or to a base model."""
    from myna import talk

    if once is not None and prompt_file is not None:
        raise UsageError("--once and --prompt-file exclude each other")
    if raw and prompt_file is None:
        raise UsageError("--raw continues a file", help="--prompt-file FILE --raw")
    if prompt_file is not None:
        talk.read_prompt_file(prompt_file)  # refused before a model is loaded
    single = once is not None or prompt_file is not None
    default_tokens = talk.ONCE_MAX_TOKENS if single else talk.LOOP_MAX_TOKENS
    sampling = talk.ChatSampling(
        max_tokens=default_tokens if max_tokens is None else max_tokens,
        temperature=temperature,
        top_p=top_p,
        repeat_penalty=repeat_penalty,
        repeat_last_n=repeat_last_n,
        seed=seed,
    )
    _talk(target, base, file, once, prompt_file, raw, stop or [], system, sampling, as_json)


def _talk(
    target: str,
    base: str | None,
    file: str | None,
    question: str | None,
    prompt_file: Path | None,
    raw: bool,
    stop: list[str],
    system: str | None,
    sampling: object,
    as_json: bool,
) -> None:
    from myna import chat as chatting
    from myna import talk
    from myna.backends.open import open_text_model

    assert isinstance(sampling, talk.ChatSampling)
    # words about the chat go to standard error, the answer to standard output
    notes = Console(stderr=True)
    console = Console(quiet=as_json)
    with open_text_model(
        target, lambda text: notes.print(text, style="dim", highlight=False), file_type=file, base=base
    ) as opened:
        model = talk.BackendChat(opened)
        text = None
        if question is not None:
            text = talk.once(model, question, console=console, system=system, sampling=sampling, stop=stop)
        elif prompt_file is not None:
            text = talk.continue_file(
                model, prompt_file, raw=raw, stop=stop, console=console, system=system, sampling=sampling
            )
        if as_json:
            typer.echo(
                json.dumps(
                    {"model": model.name, **({} if text is None else {"text": text})}, ensure_ascii=False
                )
            )
        if text is None:
            if sys.stdin.isatty():
                with contextlib.suppress(ImportError):  # Windows has none
                    import readline  # noqa: F401 - line editing and history for input()
            chatting.chat_loop(
                model,
                console=Console(stderr=as_json),
                read_line=input,
                system=system,
                sampling=sampling,
                save_dir=Path(),
            )
