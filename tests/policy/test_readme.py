"""Every `myna …` line in README.md and docs/ is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from source_tree import ROOT

README = ROOT / "README.md"
PAGES = [
    page
    for page in (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if page.exists()
]


def command_lines(page: str) -> Iterator[tuple[int, str]]:
    """(line number, what follows `myna`) of each command in a fenced block; `\\` at the end goes on below."""
    inside, pending, start = False, "", 0
    for number, line in enumerate(page.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            inside, pending = not inside, ""
            continue
        if not inside:
            continue
        start = number if not pending else start
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        match = re.match(r"(?:\$ )?(?:\w+=\S* )*(?:\.?\.?[\w./-]*/)?myna (?=[\w-])(.*)", pending)
        pending = ""
        if match:
            yield start, match[1]


def arguments(line: str) -> list[str]:
    """The words of a command, up to a pipe or a redirection; `[--option]` of a synopsis counts as given."""
    words = shlex.split(re.sub(r"\[(-[^\]]*)\]", r"\1", line), comments=True)
    ends = [n for n, word in enumerate(words) if re.match(r"(\||&|&&|;|[12]?>{1,2}|<).*$", word)]
    return words[: ends[0]] if ends else words


def fault_of(command: Any, words: list[str]) -> str | None:
    """Why the command line would refuse these words; None where it takes them."""
    try:
        context = type(command).context_class(command)
        _, rest, _ = command.make_parser(context).parse_args(list(words))
    except Exception as error:  # click's, or the copy of it that typer carries
        return str(error)
    below = getattr(command, "commands", None)
    if below is None:
        return f"too many arguments: {rest}" if rest else None
    if not rest:
        return None
    if rest[0] not in below:
        return f"no command {rest[0]}"
    return fault_of(below[rest[0]], rest[1:])


def whole_command() -> Any:
    import typer.main

    from myna.cli import app

    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_exist(page: Path) -> None:
    command = whole_command()
    lines = command_lines(page.read_text(encoding="utf-8"))
    faults = [(number, line, fault_of(command, arguments(line))) for number, line in lines]
    wrong = [f"{page.name}:{number}: myna {line}: {fault}" for number, line, fault in faults if fault]
    assert not wrong, "\n".join(wrong)


def test_the_readme_shows_commands() -> None:
    assert len(list(command_lines(README.read_text(encoding="utf-8")))) >= 3


def test_a_planted_command_is_refused() -> None:
    command = whole_command()
    assert fault_of(command, ["--help"]) is None
    for words in (["no-such-command"], ["--no-such-option"]):
        assert fault_of(command, words), words
    for name, below in command.commands.items():
        assert fault_of(command, [name, "--no-such-option"]), name
        assert below.help, f"{name} has no help"


def test_commands_are_found_in_fenced_blocks_alone() -> None:
    page = (
        "myna no\n```sh\n$ myna run a.yaml # go\nMYNA_CACHE=x .venv/bin/myna chat \\\n  r --raw | tee x\n"
        "myna: told\nmynah x\n```\nmyna no\n"
    )
    found = list(command_lines(page))
    assert [number for number, _ in found] == [3, 4]
    assert [arguments(line) for _, line in found] == [["run", "a.yaml"], ["chat", "r", "--raw"]]
    assert arguments("train RECIPE [--resume]") == ["train", "RECIPE", "--resume"]
