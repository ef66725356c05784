"""One look for every page that is written: self-contained, light or dark as the reader's system is, with sortable tables."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --soft: #5b6570; --card: #f6f8fa;
  --mark: #0a6b3d; --warn: #9a5b00; --warncard: #fff6e5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #15181c; --line: #363c44; --soft: #9aa4af; --card: #1d2126; --mark: #6fdca4;
    --warn: #f0c674; --warncard: #2b2618; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 78rem;
  margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; font-size: 1.25rem; }
a { color: inherit; }
p.lead, figcaption, .source, small, nav { color: var(--soft); }
nav a { margin-right: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
td { vertical-align: top; } td small { display: block; font-size: .72rem; }
th:first-child, td:first-child, .words { text-align: left; } td.words { white-space: normal; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; }
th button { all: unset; cursor: pointer; } th button:hover { text-decoration: underline; }
th button:focus-visible, summary:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
th button::after { content: "\\2195"; opacity: .35; margin-left: .25em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
td.best { color: var(--mark); font-weight: 600; }
.note { background: var(--warncard); border-left: 4px solid var(--warn); padding: .5rem .9rem; margin: .8rem 0; }
figure { margin: 1.2rem 0; } figure svg { width: 100%; height: auto; background: #fff; border-radius: 6px; }
figure.small svg { max-width: 48rem; }
svg.key { width: 2rem; height: .7rem; background: #fff; border-radius: 2px; vertical-align: middle; margin-right: .5rem; }
svg.curve { width: 22rem; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
details { background: var(--card); border-radius: 6px; padding: .5rem .9rem; margin: .6rem 0; }
details details { border: 1px solid var(--line); } summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .8rem; }
@media print { details { break-inside: avoid; } th button::after { content: ""; } }
"""

# A heading's button sorts its table; unknown values stay last, and equal rows keep their order.
SORTING = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const key = row => row.cells[place].dataset.order;
    const numbers = [...table.tBodies[0].rows].every(row => !Number.isNaN(Number(key(row))));
    const order = (a, b) => numbers ? (Number(a) > Number(b)) - (Number(a) < Number(b)) : a.localeCompare(b);
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort((first, second) => {
      const [a, b] = [key(first), key(second)];
      return a === "" || b === "" ? (a === "") - (b === "") : sign * order(a, b);
    }));
  }));
}
"""


@dataclass(frozen=True)
class Cell:
    """What a table shows.

    Args:
        text: plain.
        detail: smaller, under it.
        order: what the table is sorted by; a NaN comes last in either direction.
        best: whether nothing in the column is better.
        key: HTML in front of the text.
        words: whether this is text that may be broken into lines.
    """

    text: str
    detail: str = ""
    order: float | str = math.nan
    best: bool = False
    key: str = ""
    words: bool = False


def page(title: str, lead: str, body: str) -> str:
    """A self-contained HTML page.

    Args:
        title: plain text.
        lead: one paragraph of HTML under it.
        body: HTML.
    """
    script = f"<script>{SORTING}</script>" if 'class="sortable"' in body else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="lead">{lead}</p>
{body}
{script}</body></html>
"""


def table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]], caption: str) -> str:
    """A table that its headings sort.

    Args:
        heads: (heading, what it means).
        rows: of cells.
        caption: what the table shows, for who cannot see it.
    """
    words = [any(row[place].words for row in rows) for place in range(len(heads))]
    head = "".join(
        f'<th scope="col"{_class(words=wordy)} title="{html.escape(meaning)}">'
        f'<button type="button">{html.escape(name)}</button></th>'
        for (name, meaning), wordy in zip(heads, words, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="sortable" aria-label="{html.escape(caption)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    order = cell.order if isinstance(cell.order, str) else _number(cell.order)
    detail = f"<small>{html.escape(cell.detail)}</small>" if cell.detail else ""
    kinds = _class(best=cell.best, words=cell.words)
    return f'<td{kinds} data-order="{html.escape(order)}">{cell.key}{html.escape(cell.text)}{detail}</td>'


def _class(**kinds: bool) -> str:
    shown = " ".join(name for name, applies in kinds.items() if applies)
    return f' class="{shown}"' if shown else ""


def _number(value: float) -> str:
    return "" if math.isnan(value) else str(value).replace("inf", "Infinity")


def figure(svg: str, alternative: str, caption: str, small: bool = False) -> str:
    """A figure with its caption.

    Args:
        svg: an SVG element.
        alternative: plain text for who cannot see it.
        caption: HTML.
        small: whether it need not be as wide as the page.
    """
    named = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alternative)}"', 1)
    kind = ' class="small"' if small else ""
    return f"<figure{kind}>{named}<figcaption>{caption}</figcaption></figure>"


def note(text: str) -> str:
    """What a reader must not miss."""
    return f'<p class="note" role="note">{html.escape(text)}</p>'
