"""What a person sees: stages with progress bars on a terminal, plain lines elsewhere, one table at the end."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from myna.errors import MynaError
from myna.show import Show

AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]


@contextlib.contextmanager
def terminal_show(console: Console) -> Iterator[Show]:
    """A Show that writes to a console: bars where it is a terminal, a line a stage where it is not."""
    bar = Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks: dict[str, TaskID] = {}

    def update(label: str, done: int, total: int, facts: str = "") -> None:
        if label not in tasks:
            tasks[label] = bar.add_task(label, total=total, facts=facts)
        bar.update(tasks[label], completed=done, facts=facts)
        if done >= total:
            bar.update(tasks[label], visible=False)

    def step(report: Any) -> None:
        facts = report.facts()
        update("training, step", report.step, report.num_steps, facts)
        if not console.is_terminal and (report.checkpoint or report.step == 1):
            console.print(f"  step {report.step}/{report.num_steps} · {facts}", highlight=False)

    with bar:
        yield Show(
            say=lambda text: console.print(f"  {text}", highlight=False, markup=False),
            stage=lambda name: console.print(f"[bold]{name}[/bold]"),
            step=step,
            progress=update,
        )


def run_stage(work: Callable[[Show], Mapping[str, Any]], as_json: bool, line: Callable[[Any], Any]) -> None:
    """Runs one stage with its progress on standard error, then prints its result."""
    with terminal_show(new_console(stderr=True)) as show:
        result = work(show)
    if as_json:
        print_json(result)
    else:
        new_console().print(line(result), highlight=False)


def new_console(*, stderr: bool = False) -> Console:
    """Standard output or standard error, as rich draws on them."""
    console = Console(stderr=stderr, soft_wrap=not sys.stdout.isatty())
    if stderr:  # nobody reads the progress any more: the work goes on all the same
        console.on_broken_pipe = lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # type: ignore[method-assign,assignment]
    return console


def one_line(text: str) -> str:
    """A place or a name as it may be printed: nothing in it that moves the cursor or begins a line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object that `--json` asks for."""
    print(json.dumps(value, ensure_ascii=False))


def outcome_table(outcome: Mapping[str, Any]) -> Table:
    """base · tuned · each file: exact match with its 95 % interval, field F1, size, speed."""
    has_fields = any(result["field_f1"] is not None for result in outcome["evaluation"].values())
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in ("exact match", "95 % interval", "field F1" if has_fields else "token F1", "MB", "tokens/s"):
        table.add_column(name, justify="right")
    for name, result in outcome["evaluation"].items():
        low, high = result["interval"]
        f1 = result["field_f1"] if has_fields else result["token_f1"]
        table.add_row(
            name,
            f"{result['exact_match']:.1%}",
            f"{low:.1%} – {high:.1%}",
            "" if f1 is None else f"{f1:.3f}",
            f"{result['mb']:,.0f}",
            f"{result['tokens_per_s']:.0f}",
        )
    return table


def print_outcome(console: Console, outcome: Mapping[str, Any], examples: list[Mapping[str, str]]) -> None:
    """The end of `run` and `demo`: three answers before and after, the table, parity, where everything lies."""
    for example in examples:
        console.print(f"\n[bold]›[/bold] {_plain(example['prompt'])}", highlight=False)
        for name in ("base", "tuned"):
            if name in example:
                console.print(f"  [dim]{name:<6}[/dim] {_plain(_shortened(example[name]))}", highlight=False)
    if outcome["evaluation"]:
        num_rows = next(iter(outcome["evaluation"].values()))["num_rows"]
        console.print(f"\n[bold]On {num_rows} held-out rows[/bold]")
        console.print(outcome_table(outcome))
    for name, parity in outcome["parity"].items():
        if isinstance(parity, Mapping) and "mean_kl" in parity:
            console.print(
                f"{name} against {parity.get('origin', 'merged')}: mean KL {parity['mean_kl']:.4f}, "
                f"same top token {parity['same_top']:.1%}",
                highlight=False,
            )
    seconds = outcome["seconds"]
    console.print(
        f"\nrun      {outcome['run']}  ({seconds['total']:.0f} s, of it {seconds['train']:.0f} s training)"
    )
    console.print(f"report   {outcome['files']['report']}", highlight=False)
    ggufs = [path for path in outcome["files"].values() if path.endswith(".gguf")]
    for path in ggufs:
        console.print(f"file     {path}", highlight=False)
    console.print(f"chat     [bold]myna chat {escape(shlex.quote(outcome['run']))}[/bold]", highlight=False)


def print_report(console: Console, lines: Sequence[tuple[str, str, str | None]]) -> None:
    """`doctor`: (status, text, cure) of each finding."""
    colours = {"ok": "green", "warn": "yellow", "missing": "red"}
    for status, text, cure in lines:
        console.print(f"[{colours[status]}]{status:<8}[/]{_plain(text)}", highlight=False)
        if cure:
            console.print(f"        [dim]{_plain(cure)}[/dim]", highlight=False)


def print_expectations(
    console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str
) -> None:
    """`doctor --bench`: the training speed to expect, a line a model."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, head in enumerate(heads):
        table.add_column(head, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console.print("\n[bold]Training speed to expect[/bold]")
    console.print(table)
    console.print(f"[dim]{_plain(note)}[/dim]", highlight=False)


def print_findings(console: Console, story: Sequence[tuple[str, str]], findings: Sequence[Any]) -> None:
    """`verify`: the story, then what was looked at, part by part; digests that hold are counted, not listed."""
    for what, how in story:
        console.print(f"{what:<9}{_plain(how)}", highlight=False)
    colours = {"pass": "green", "fail": "red", "gone": "yellow", "refused": "yellow", "aside": "yellow"}
    for part in dict.fromkeys(finding.part for finding in findings):
        of_part = [finding for finding in findings if finding.part == part]
        console.print(f"\n[bold]{part}[/bold]")
        for finding in of_part:
            colour, digest = colours[finding.verdict], finding.detail
            shown = f"{digest[:16]}…" if len(digest) == 64 and " " not in digest else digest
            console.print(
                f"  [{colour}]{finding.verdict:<7}[/] {_plain(finding.name)}  [dim]{_plain(shown)}[/dim]",
                highlight=False,
            )


def print_error(console: Console, error: MynaError) -> None:
    place = f"[bold]{_plain(one_line(error.where))}[/bold]: " if error.where else ""
    console.print(f"[red]error[/red]: {place}{_plain(error.message)}", highlight=False)
    if error.help:
        console.print(f"  [dim]help:[/dim] {_plain(error.help)}", highlight=False)


def _plain(text: str) -> str:
    return escape(text)


def _shortened(text: str, longest: int = 160) -> str:
    line = " ⏎ ".join(part for part in text.strip().splitlines() if part.strip())
    return line if len(line) <= longest else line[: longest - 1] + "…"
