"""Every fault in every format that can carry it: code, place, field and cure, and the other rows are read all the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Command
from faults_table import FAULTS
from faulty_files import ENDINGS, Planted

from myna.data.check import CODES, CURES
from myna.data.review import review_rows

PLANTED = [
    (name, form, file)
    for name, fault in FAULTS.items()
    for form, file in fault.files.items()
    if isinstance(file, Planted)
]


@pytest.mark.parametrize(
    ("name", "form", "file"), PLANTED, ids=[f"{name}-{form}" for name, form, _ in PLANTED]
)
def test_a_fault_is_told_where_it_stands(tmp_path: Path, name: str, form: str, file: Planted) -> None:
    fault = FAULTS[name]
    path = tmp_path / f"rows{file.ending or ENDINGS[form]}"
    path.write_bytes(file.content)
    test = tmp_path / "test.jsonl"
    test.write_bytes(file.test or b"")
    review = review_rows(path, test=test if file.test else None, private=fault.code == "D036")
    assert [f.code for f in review.findings] == [file.code or fault.code], review.findings
    (finding,) = review.findings
    where, message = finding.places[0]
    assert where == (file.where if file.where == "all rows" else f"{path}{file.where}")
    assert re.search(fault.says, message), message
    assert any(re.search(fault.cure, cure) for cure in finding.cures), finding.cures
    if file.num_good is None:
        assert review.num_conversations == review.num_rows - 1 > 0
        return
    assert review.num_conversations == file.num_good
    refused = (
        file.num_good == 0 and not file.where
    )  # a file that is not opened has no rows, one that is has its fault
    counted = file.num_good + 1 if file.num_rows is None else file.num_rows
    assert review.num_rows in ((0, 1) if refused else (counted,))


def test_the_table_has_every_fault_in_every_format_or_says_why_not() -> None:
    planted = {fault.code for fault in FAULTS.values()}
    of_settings = {"D020", "D040", "D041", "D042"}  # nothing left, and what a recipe's tokenizer tells
    assert len(FAULTS) >= 40 and CODES.keys() - planted == of_settings
    for name, fault in FAULTS.items():
        assert fault.files.keys() == ENDINGS.keys(), name
        assert any(isinstance(file, Planted) for file in fault.files.values()), name
        assert all(file for file in fault.files.values() if isinstance(file, str)), name


def test_every_code_of_an_error_has_a_cure() -> None:
    assert CURES.keys() == {code for code in CODES if code < "D030"}
    assert all(CURES.values())


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a comma that is missing", "JSONL"),
        ("a prompt that is empty", "CSV"),
        ("a late system message", "Parquet"),
        ("a key twice", "JSON"),
        ("an e-mail address", "CSV"),
    ],
)
def test_the_command_says_so_too(myna: Command, tmp_path: Path, name: str, form: str) -> None:
    fault = FAULTS[name]
    file = fault.files[form]
    assert isinstance(file, Planted)
    (tmp_path / f"rows{ENDINGS[form]}").write_bytes(file.content)
    done = myna("data", "check", f"rows{ENDINGS[form]}")
    assert done.returncode == (3 if fault.code < "D030" else 0), done.stderr
    assert f"[{fault.code}]" in done.stdout and f"rows{ENDINGS[form]}{file.where}: " in done.stdout
    assert re.search(fault.says, done.stdout) and re.search(fault.cure, done.stdout)
