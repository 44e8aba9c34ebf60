"""The sections of the report about the exported files: are they the model, and what do they hold?"""

from __future__ import annotations

from collections.abc import Mapping

from myna.evaluate.page import (
    NOTHING,
    Html,
    cell,
    heading,
    join,
    missing,
    paragraph,
    row_name,
    section,
    table,
    tag,
    text,
)
from myna.evaluate.run_files import Entry, RunFiles
from myna.evaluate.words import count, four_decimals, optional, percent, power


def parity(files: RunFiles) -> Html:
    """Is each file the model that was trained?"""
    title = "Is the file the model that was trained?"
    found = files.parity
    if found is None:
        return section(title, missing("No parity.json in this run: nothing was exported."))
    return section(title, _merged_words(found), _parity_table(found.get("files", {})))


def _merged_words(found: Entry) -> Html:
    verdict = str(found.get("verdict", "unknown"))
    parts = [tag("b", text(f"Verdict: {verdict}."), class_="right" if verdict == "pass" else "wrong")]
    merged = found.get("merged")
    if merged:
        bound = f" (bound {power(merged['bound'])})" if "bound" in merged else ""
        parts.append(
            text(
                f" Over {count(found.get('num_tokens', 0))} tokens the merged model's logits are"
                f" {power(merged['relative'])}{bound} from base and adapter, relative by norm;"
                f" the largest difference of one logit, max |Δ|, is {power(merged['max_abs'])}."
            )
        )
    if merged and merged.get("dtype", "fp32") != "fp32":
        rounding = power(merged["dtype_relative"])
        parts.append(text(f" Writing it in {merged['dtype']} moves the logits by {rounding} more."))
    if "tokens_equal" in found:
        same = "the same" if found["tokens_equal"] else "different"
        parts.append(text(f" The tokenizer and the file turn conversations into {same} token ids."))
    return paragraph(*parts)


def _parity_table(files: Mapping[str, Entry]) -> Html:
    if not files:
        return missing("No file was compared.")
    head = [heading(""), heading("mean KL", "number"), heading("bound", "number")]
    head += [heading("same top token, %", "number"), heading("mean KL, all", "number")]
    head += [heading("same top, all, %", "number"), heading("verdict")]
    note = (
        "Against the merged model, over target tokens and over all tokens, held-out rows first. Mean KL: how far"
        " apart the probabilities of the next token lie, in nats. Same top token: how often both rank"
        " the same one first."
    )
    rows = [_parity_row(name, entry) for name, entry in files.items()]
    return join([table(head, rows), paragraph(text(note), class_="quiet small")])


def _parity_row(name: str, entry: Entry) -> Html:
    verdict = str(entry.get("verdict", "–"))
    return tag(
        "tr",
        row_name(name),
        cell(optional(entry.get("mean_kl"), four_decimals), "number"),
        cell(optional(entry.get("bound"), lambda bound: f"{bound:g}"), "number"),
        cell(optional(entry.get("same_top"), percent), "number"),
        cell(optional(entry.get("mean_kl_all"), four_decimals), "number"),
        cell(optional(entry.get("same_top_all"), percent), "number"),
        cell(verdict, "right" if verdict == "pass" else "wrong"),
    )


def contents(files: RunFiles) -> Html:
    """Which GGUF types each file really holds: a name like Q4_K_M says only what was asked for."""
    entries = {name: e for name, e in (files.parity or {}).get("files", {}).items() if e.get("types")}
    if not entries:
        return NOTHING
    head = [heading(""), heading("MB", "number"), heading("tensors by type")]
    rows = []
    for name, entry in entries.items():
        by_count = sorted(entry["types"].items(), key=lambda item: -item[1])
        held = " · ".join(f"{num} × {tensor_type}" for tensor_type, num in by_count)
        size = cell(optional(entry.get("bytes"), lambda size: f"{size / 1e6:,.1f}"), "number")
        rows.append(tag("tr", row_name(name), size, cell(held)))
    return section("What each file holds", table(head, rows))
