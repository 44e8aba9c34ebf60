"""The command line: parse, call one function, print, exit. Heavy packages are imported where they are needed."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

import myna
from myna.chat_command import chat
from myna.data_commands import check as data_check
from myna.data_commands import convert as data_convert
from myna.engine.threads import BRIEF_SPIN
from myna.errors import Interrupted, MachineError, MynaError, UsageError
from myna.show import Show
from myna.show_command import show as data_show
from myna.stage_commands import evaluate, export, merge, verify
from myna.terminal import (
    AsJson,
    new_console,
    print_error,
    print_expectations,
    print_json,
    print_outcome,
    print_report,
    run_stage,
    terminal_show,
)

app = typer.Typer(
    help="Teach a small language model your task, prove that it learned, and get the file that runs it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at rows before anything is trained.", no_args_is_help=True)
app.add_typer(data_app, name="data")

# click's own error for a wrong command line; typer brings click along under another name in newer versions
_ClickError: Any = typer.BadParameter.__mro__[2]
assert _ClickError.__name__ == "ClickException"

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting of the recipe")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on where this run stopped")]

Force = Annotated[
    bool, typer.Option("--force", help="with --resume: although recipe, data or base are not what they were")
]
ResumeFrom = Annotated[
    Path | None,
    typer.Option(
        "--resume-from", metavar="PATH", help="go on from a checkpoint, a mirror or a run elsewhere"
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"myna {myna.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Read by typer for the options of `myna` itself."""


@app.command()
def demo(
    name: Annotated[str, typer.Option(help="the run's name")] = "demo",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """The whole way on the packaged model and generated rows; again: goes on, or shows the finished table."""
    from myna.demo import demo_recipe
    from myna.run import RUNS_DIR, Run

    recipe = demo_recipe(RUNS_DIR / "demo-rows", name, overrides or [])
    finished = Run(RUNS_DIR / name).exists() and Run(RUNS_DIR / name).stage("evaluate") is not None
    _run_recipe(recipe, resume=True, as_json=as_json)
    if finished and not as_json:
        print(
            f"\nThis run was finished before. To start afresh: rm -r {RUNS_DIR / name}, or myna demo --name again"
        )


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Force = False,
    resume_from: ResumeFrom = None,
    as_json: AsJson = False,
) -> None:
    """train → merge → export → evaluate (base, tuned, each file) → report, for your own rows."""
    from myna.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    _run_recipe(loaded, resume=resume, force=force, resume_from=resume_from, as_json=as_json)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Resume = False,
    force: Force = False,
    resume_from: ResumeFrom = None,
    as_json: AsJson = False,
) -> None:
    """Train the adapter of a recipe."""
    from myna.pipeline import train_stage
    from myna.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])

    def work(show: Show) -> Mapping[str, Any]:
        made = train_stage(loaded, resume=resume, force=force, resume_from=resume_from, show=show)
        return {"run": str(made.path), "adapter": str(made.adapter_dir), **(made.stage("train") or {})}

    run_stage(work, as_json, lambda result: f"adapter  {result['adapter']}")


@app.command()
def init(
    rows: Annotated[Path, typer.Argument(metavar="FILE", help="your rows: a file, a folder, hf:org/name")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="a setting of the recipe that is written"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="replace a recipe.yaml that is here")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a data file and write a commented recipe.yaml here."""
    from myna.first_recipe import init_recipe

    path, said = init_recipe(rows, Path("recipe.yaml"), overrides or [], overwrite=yes)
    if as_json:
        print_json({"recipe": str(path), "said": said})
        return
    print(
        "\n".join(
            [*said, f"wrote {path}; `myna run {path}` does the rest, `myna data show {path}` shows rows"]
        )
    )


for command in (merge, export, evaluate, verify, chat):
    app.command()(command)


data_app.command("check")(data_check)
data_app.command("convert")(data_convert)


data_app.command("show")(data_show)


@app.command()
def doctor(
    bench: Annotated[
        bool, typer.Option("--bench", help="measure this machine, and say how fast it will train")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Versions, cores and what they can do, free memory and disk, extras and how to get them."""
    from myna.doctor import as_lines, examine

    report, measured = examine(), None
    if bench:
        from myna.doctor_bench import as_table, run_bench

        measured = run_bench()
        report = measured.joined(report)
    if as_json:
        print_json(report.to_json() | ({"training": measured.to_json()} if measured else {}))
    else:
        print_report(new_console(), as_lines(report))
        if measured:
            print_expectations(new_console(), *as_table(measured))
    if report.problems:
        raise typer.Exit(4)


def _run_recipe(
    recipe: Any, *, resume: bool, as_json: bool, force: bool = False, resume_from: Path | None = None
) -> None:
    from myna.pipeline import run_recipe
    from myna.run import read_json

    with terminal_show(new_console(stderr=True)) as show:
        result = run_recipe(recipe, resume=resume, force=force, resume_from=resume_from, show=show)
    if as_json:
        print_json(result)
        return
    evaluation = Path(result["run"]) / "evaluation.json"
    examples = read_json(evaluation)["examples"] if evaluation.is_file() else []
    print_outcome(new_console(), result, examples)


class _Stopped(BaseException):
    """HUP or TERM, on its way out as Ctrl-C is: no `except Exception` on the way takes it for a failure of its own."""


def _terminate(number: int, _: FrameType | None) -> None:
    raise _Stopped(number)


def _goes_on(arguments: Sequence[str]) -> str:
    resumes = next((a for a in arguments if not a.startswith("-")), "") in ("train", "run")
    return f"the same command {'with --resume' if resumes else 'again'} goes on"


def main() -> None:
    """Sets up what must stand before torch is loaded, runs the command, and turns failures into exit codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    os.environ.update({**BRIEF_SPIN, **os.environ})  # what the user set stays
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminate)
    sys.exit(exit_code(sys.argv[1:]))


def exit_code(arguments: list[str]) -> int:
    """Runs one command line; what `myna ARGUMENTS` would end with."""
    as_json = "--json" in arguments
    try:
        result = app(args=arguments, prog_name="myna", standalone_mode=False)
        if result == 128 + signal.SIGINT:  # typer makes an exit code of Ctrl-C, without a word
            raise KeyboardInterrupt
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except _Stopped as stopped:
        _tell(Interrupted("stopped", signal_number=stopped.args[0], help=_goes_on(arguments)), as_json)
        return 128 + int(stopped.args[0])
    except Interrupted as error:
        _tell(error, as_json)
        return 128 + error.signal_number
    except MynaError as error:
        _tell(error, as_json)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _tell(
            Interrupted("stopped", signal_number=signal.SIGINT, help=_goes_on(arguments)),
            as_json,
        )
        return 128 + signal.SIGINT
    except typer.Exit as error:
        return error.exit_code
    except _ClickError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else _command_in(arguments)
        _tell(UsageError(error.format_message(), help=f"{command} --help"), as_json)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has gone; nothing is left to say
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print has no room either
            _tell(
                MachineError(f"could not be written: {error.strerror}", help="make room on the disk"), as_json
            )
            return MachineError.exit_code
        traceback.print_exc()
        if as_json:
            print_json({"error": {"code": "bug", "message": repr(error), "where": None, "help": None}})
        return 1


def _command_in(arguments: list[str]) -> str:
    """The command that a command line names, for errors of the parser, which does not say whose option it was at."""
    command, names = typer.main.get_command(app), ["myna"]
    for argument in arguments:
        below = getattr(command, "commands", {}).get(argument)
        if below is None:
            break
        command = below
        names.append(argument)
    return " ".join(names)


def _tell(error: MynaError, as_json: bool) -> None:
    if as_json:
        print_json({"error": error.as_json()})
    else:
        print_error(new_console(stderr=True), error)


if __name__ == "__main__":
    main()
