from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from myna.errors import DataError
from myna.evaluate.chart import MAX_POINTS, loss_points, moving_mean, ticks
from myna.evaluate.page import tag, text
from myna.evaluate.report import write_report
from myna.evaluate.run_files import read_metrics
from myna.evaluate.words import duration, four_decimals, power
from myna.interval import wilson_interval

HOSTILE = "\"'><img src=http://x.example/a onerror=alert(1)>&amp;<script>1</script>\ud800"


class Reader(HTMLParser):
    """Reads the page strictly: every tag closed in order; keeps tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def result(num_right: int, num_rows: int = 100, **other: Any) -> dict[str, Any]:
    return {
        "exact_match": num_right / num_rows,
        "interval": list(wilson_interval(num_right, num_rows)),
        "field_f1": 0.5,
        "token_f1": 0.5,
        "num_rows": num_rows,
        "mb": 541.1,
        "tokens_per_s": 300.1,
        "loss": 1.25,
    } | other


def evaluation() -> dict[str, Any]:
    answers = {"base": "Sure!", "tuned": '{"a":1}', "Q4_K_M": ""}
    return {
        "rows": 100,
        "scorer": "exact_match",
        "results": {"base": result(0), "tuned": result(99), "Q4_K_M": result(98, mb=105.5, loss=None)},
        "examples": [{"prompt": f"order {i}", "expected": '{"a": 1}', **answers} for i in range(5)],
    }


def parity() -> dict[str, Any]:
    types = {"Q5_0": 180, "F32": 61, "Q8_0": 31}
    kl = {"mean_kl": 0.016, "same_top": 0.991, "mean_kl_all": 0.1, "same_top_all": 0.872}
    return {
        "verdict": "pass",
        "num_tokens": 1200,
        "merged": {"max_abs": 1.6e-4, "relative": 1.3e-6, "bound": 1e-5},
        "tokens_equal": True,
        "files": {"Q4_K_M": {**kl, "bound": 0.2, "types": types, "bytes": 105_500_000, "verdict": "pass"}},
    }


def info() -> dict[str, Any]:
    return {
        "name": "orders",
        "created": "2026-03-01T12:00:00Z",
        "base": {"name": "SmolLM2", "sha256": "ab" * 32},
        "data": {"train": {"path": "train.jsonl", "sha256": "cd" * 32, "rows": 4000}},
        "versions": {"torch": "2.13.0"},
        "stages": {"train": {"seconds": 200.4, "steps": 30, "trainable_parameters": 4_884_480}},
    }


def metrics(num_steps: int = 30) -> str:
    lines = [
        {"step": n, "loss": 3 / n, "learning_rate": 1e-3, "target_tokens": 10, "tokens_per_s": 99.0 + n}
        | {"grad_norm": 1.0, "peak_mb": 1900 + n}
        for n in range(1, num_steps + 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def fill(run_dir: Path) -> Path:
    """A whole run as the stages leave it, as far as the report reads it."""
    (run_dir / "gguf").mkdir(parents=True)
    (run_dir / "gguf" / "orders-Q4_K_M.gguf").touch()
    (run_dir / "metrics.jsonl").write_text(metrics())
    (run_dir / "recipe.yaml").write_text("data: {train: train.jsonl}\nadapter: {r: 8, alpha: 32}\n")
    for name, value in (("run", info()), ("evaluation", evaluation()), ("parity", parity())):
        (run_dir / f"{name}.json").write_text(json.dumps(value))
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return fill(tmp_path / "orders")


def read(run_dir: Path) -> Reader:
    return Reader(write_report(run_dir).read_text(encoding="utf-8"))


def test_the_whole_page_says_what_the_files_say(run_dir: Path) -> None:
    page = read(run_dir)
    for words in (
        "SmolLM2 · 4,000 rows · lora r 8, alpha 32 · 1 March 2026",
        "It helped. On 100 held-out rows, exactly right answers went from 0.0\u00a0% (0.0 to 3.7)"
        " to 99.0\u00a0% (94.6 to 99.8).",
        "Q4_K_M is 5.1 times smaller than tuned and 1.0 points lower.",
        "Verdict: pass.",
        "1.3\u00a0×\u00a010⁻⁶ (bound 1\u00a0×\u00a010⁻⁵)",
        "Over 1,200 tokens",
        "the same token ids",
        "180 × Q5_0 · 61 × F32 · 31 × Q8_0",
        "3 min 20 s",
        "3.000 → 0.100",
        "4,884,480",
        "cd" * 32,
        "step 7 · loss 0.4286",
        f"myna chat {run_dir}",
        f"myna chat {run_dir / 'gguf' / 'orders-Q4_K_M.gguf'}",
    ):
        assert words in page.words, words
    assert "order 2" in page.words
    assert "order 3" not in page.words
    assert page.words.count("✓ right") == 3
    assert page.words.count("✗ wrong") == 6
    assert "(nothing)" in page.words


def test_the_page_asks_for_nothing_from_anywhere(run_dir: Path) -> None:
    page = read(run_dir)
    assert page.names().isdisjoint({"script", "img", "iframe", "object", "a"})
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "onload", "onerror", "onclick")
            assert name != "href" or value == "data:,"
    raw = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "url(" not in raw
    assert "@import" not in raw
    assert "://" not in raw
    policies = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and str(policies[0]).startswith("default-src 'none'")


def poison(value: Any) -> Any:
    """Every text of a JSON value, and every key that a run chooses, followed by markup."""
    if isinstance(value, dict):
        chosen = value.keys() & {"Q4_K_M", "Q5_0", "torch"}
        return {key + HOSTILE if key in chosen else key: poison(child) for key, child in value.items()}
    if isinstance(value, list):
        return [poison(child) for child in value]
    return value + HOSTILE if isinstance(value, str) and value != "exact_match" else value


def test_no_text_of_a_run_becomes_markup(run_dir: Path) -> None:
    clean = read(run_dir).names()
    for name in ("run", "evaluation", "parity"):
        path = run_dir / f"{name}.json"
        path.write_text(json.dumps(poison(json.loads(path.read_text()))))
    page = read(run_dir)
    assert page.names() == clean
    assert page.words.count("<img src=http://x.example/a onerror=alert(1)>&amp;") > 30


def test_the_rounding_of_a_merged_model_in_few_bits_is_told(run_dir: Path) -> None:
    assert "Writing it in" not in read(run_dir).words
    found = parity()
    found["merged"] |= {"dtype": "bf16", "dtype_relative": 2.5e-3, "dtype_max_abs": 0.1}
    (run_dir / "parity.json").write_text(json.dumps(found))
    assert "Writing it in bf16 moves the logits by 2.5\u00a0×\u00a010⁻³ more." in read(run_dir).words


@pytest.mark.parametrize(
    ("missing", "word"),
    [
        ("evaluation.json", "Not evaluated yet"),
        ("evaluation.json", "No evaluation.json"),
        ("metrics.jsonl", "No metrics.jsonl"),
        ("parity.json", "No parity.json"),
        ("run.json", "No run.json"),
        ("recipe.yaml", "4,000 rows · 1 March 2026"),
    ],
)
def test_a_missing_file_is_left_out_with_a_word(run_dir: Path, missing: str, word: str) -> None:
    assert word not in read(run_dir).words
    (run_dir / missing).unlink()
    page = read(run_dir)
    assert word in page.words
    assert "Talk to it" in page.words


def test_a_run_with_nothing_in_it_has_a_page(tmp_path: Path) -> None:
    assert "Not evaluated yet" in read(tmp_path).words


@pytest.mark.parametrize(
    ("base", "tuned", "sentence"),
    [
        (result(2), result(90), "It helped."),
        (result(50), result(52), "It may have helped."),
        (result(52), result(50), "It did not help."),
        (result(90), result(2), "It did harm."),
        (result(5), result(5), "It made no difference."),
    ],
)
def test_the_answer_in_one_sentence(
    run_dir: Path, base: dict[str, Any], tuned: dict[str, Any], sentence: str
) -> None:
    found = evaluation()
    found["results"] = {"base": base, "tuned": tuned}
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    words = read(run_dir).words
    assert sentence in words
    assert ("intervals overlap" in words) == (sentence in ("It may have helped.", "It did not help."))


def test_free_text_is_judged_by_its_own_scorer(run_dir: Path) -> None:
    found = evaluation() | {"scorer": "token_f1"}
    found["results"] = {"base": result(0, token_f1=0.2), "tuned": result(0, token_f1=0.8)}
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    words = read(run_dir).words
    assert "It helped. On 100 held-out rows, token f1 went from 20.0\u00a0% to 80.0\u00a0%." in words
    assert "token F1, %" in words
    assert "✗ wrong" not in words


@pytest.mark.parametrize(
    ("num_right", "words"), [(98, "1.0 points lower."), (99, "as often right."), (100, "1.0 points higher.")]
)
def test_what_a_file_costs(run_dir: Path, num_right: int, words: str) -> None:
    found = evaluation()
    found["results"]["Q4_K_M"] = result(num_right, mb=541.1 / 4)
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    assert f"Q4_K_M is 4.0 times smaller than tuned and {words}" in read(run_dir).words


def test_columns_that_nothing_fills_are_not_there(run_dir: Path) -> None:
    assert "field F1, %" in read(run_dir).words
    assert "token F1, %" not in read(run_dir).words
    found = evaluation()
    for entry in found["results"].values():
        entry["field_f1"] = entry["loss"] = entry["mb"] = None
    (run_dir / "evaluation.json").write_text(json.dumps(found))
    page = read(run_dir)
    assert "field F1, %" not in page.words
    assert "times smaller" not in page.words


def test_steps_done_again_after_a_resume_count_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    again = metrics(12).splitlines(keepends=True)[9:]
    path.write_text(metrics(11) + "".join(again).replace("0.3,", "0.7,") + '{"step": 13, "lo')
    lines = read_metrics(path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[9]["loss"] == 0.7


@pytest.mark.parametrize("bad", ['{"step": 1', "[1]", '{"loss": 2}'])
def test_a_broken_line_of_metrics_is_named(run_dir: Path, bad: str) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text(metrics(2) + bad + "\n" + metrics(2))
    with pytest.raises(DataError) as caught:
        write_report(run_dir)
    assert caught.value.where == f"{path}:3"


def test_a_loss_that_is_not_finite_does_not_break_the_curve(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(metrics(3).replace("1.5,", "NaN,"))
    words = read(run_dir).words
    assert "step 1 · loss" in words and "step 3 · loss" in words
    assert "step 2 · loss" not in words


@pytest.mark.parametrize("num_steps", [1, 2, 3, 500])
def test_a_curve_of_any_length_stays_inside_its_frame(run_dir: Path, num_steps: int) -> None:
    (run_dir / "metrics.jsonl").write_text(metrics(num_steps))
    page = read(run_dir)
    curves = [str(attributes["points"]) for tag, attributes in page.tags if tag == "polyline"]
    assert len(curves) == (2 if num_steps > 20 else 1)
    places = [[float(x) for x in place.split(",")] for curve in curves for place in curve.split()]
    assert len(places) <= 2 * MAX_POINTS
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in places)
    columns = [attributes for tag, attributes in page.tags if tag == "rect"]
    assert sum(float(str(column["width"])) for column in columns) == pytest.approx(100, abs=2)


def test_many_steps_become_few_points_with_the_same_mean() -> None:
    points = loss_points(range(1, 961), [float(n) for n in range(1, 961)])
    assert len(points) == 240
    assert (points[0].first_step, points[0].step, points[0].loss) == (1, 4, 2.5)
    assert sum(point.loss for point in points) / 240 == pytest.approx(sum(range(1, 961)) / 960)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 2.9), (0, 3), (0, 0.004), (1, 150), (7, 8), (0, 0), (3, 90_000)]
)
def test_ticks_are_round_and_reach_around(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high
    assert 4 <= len(marks) <= 7
    gaps = {round(b - a, 9) for a, b in itertools.pairwise(marks)}
    assert len(gaps) == 1
    mantissa = float(f"{gaps.pop():e}".split("e")[0])
    assert mantissa in (1, 2, 2.5, 5)


def test_the_moving_mean_follows_a_line_and_calms_noise() -> None:
    line = [float(n) for n in range(100)]
    assert moving_mean(line) == pytest.approx(line)
    noise = [(-1.0) ** n for n in range(100)]
    assert max(abs(value) for value in moving_mean(noise)[10:-10]) < 0.2


def test_markup_is_made_of_text_alone() -> None:
    assert tag("b", text("<"), title='" x="', class_=None) == '<b title="&quot; x=&quot;">&lt;</b>'


def test_words_for_numbers() -> None:
    assert [duration(s) for s in (4.24, 59.99, 200.4, 7500)] == [
        "4.2 s",
        "1 min 0 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert power(0) == "0"
    assert power(12_345.0) == "1.2\u00a0×\u00a010⁴"
    assert (four_decimals(2e-5), four_decimals(0), four_decimals(0.016)) == ("<0.0001", "0.0000", "0.0160")
    assert text("<a & 'b'>") == "&lt;a &amp; &#x27;b&#x27;&gt;"
