"""report.html: one page that says whether the tuning helped, made from the files of a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from myna.evaluate import file_sections, sections
from myna.evaluate.page import Html, page, tag, text
from myna.evaluate.run_files import RunFiles, read_run_files
from myna.run import Run, write_text

_FOOTER: Final = "Made by myna from the files of this run. Nothing on this page is loaded from anywhere else."


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html and gives its path; what the run does not have is left out with a word.

    Raises DataError where a file of the run is broken, MachineError where the page cannot be written.
    """
    run = Run(run_dir)
    files = read_run_files(run)
    body = [*_all_sections(files), tag("footer", text(_FOOTER))]
    write_text(run.report_path, page(f"{run.name} · myna", *body))
    return run.report_path


def _all_sections(files: RunFiles) -> Iterable[Html]:
    """In reading order."""
    yield sections.headline(files)
    yield sections.results(files)
    yield sections.examples(files)
    yield file_sections.parity(files)
    yield sections.training(files)
    yield file_sections.contents(files)
    yield sections.how_to_chat(files)
    yield sections.inputs(files)
