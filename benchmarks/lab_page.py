"""The page of the laboratory: every figure with two sentences on how to read it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from curvlib.analysis import Row

from .lab import Result
from .page import page
from .records import environment, write_whole

_READ = {
    "inverse": "The absolute inverse of the empirical Fisher (damped by a hundredth of its mean eigenvalue), entries ordered "
    "so that the blocks of a structure lie together inside the blue outlines. Bright entries inside the outlines are kept "
    "by the structure, others are lost; the titles say which share of the entries off the diagonal lies inside, and which "
    "share of their squares.",
    "spectra": "Eigenvalues of the exact Fisher of the model's own labels (grey, wide) and of each approximation, sorted. "
    "A line above the grey one on the right claims curvature where there is none, and so takes steps that are too short.",
    "pareto": "How wrong the damped inverse is, against the memory (left) and the time of one direction (right). "
    "Structures on the grey line are beaten by nothing that is cheaper; every marker below and to the left is better.",
    "sweep": "How well each structure's direction agrees with the exact natural gradient, against the damping. "
    "To the right every structure becomes gradient descent, so that what a structure is worth shows on the left.",
}


def write_page(results: Sequence[Result], folder: Path) -> Path:
    """Write ``index.html``; returns it."""
    sections = "".join(_section(result) for result in results)
    shown = html.escape(json.dumps(environment(), indent=1))
    lead = (
        "Block structures on one axis system: what each loses of the exact curvature of a trained network's layer, and what "
        "it costs. Everything is computed in float64; times are of one layer alone, the least of several, on this machine."
    )
    body = f"{sections}<h2>Where this was measured</h2><pre>{shown}</pre>"
    file = folder / "index.html"
    write_whole(file, page("curvlib: the laboratory", lead, body).encode())
    return file


def _section(result: Result) -> str:
    specimen = result.specimen
    figures = "".join(
        f"<figure>{svg}<figcaption>{_READ[name.partition('-')[0]]}</figcaption></figure>"
        for name, svg in result.figures.items()
    )
    return f"""
<h2>{html.escape(specimen.title)}</h2>
<p class="source">{html.escape(specimen.about)} Held-out accuracy {result.accuracy:.1%}; {result.data}.
The mean eigenvalue of the layer's exact Fisher is {result.mean:.2g}.
All numbers: <a href="{specimen.name}.csv">CSV</a>, <a href="{specimen.name}.json">JSON</a>.</p>
{figures}
{_table(result)}
"""


_COLUMNS = {
    "approximation": "Structure",
    "frobenius": "Curvature, Frobenius",
    "inverse_frobenius": "Inverse, Frobenius",
    "cosine": "Cosine",
    "norm_ratio": "Norm ratio",
    "best_decrease": "Share of best decrease",
    "condition": "Condition",
    "memory": "Memory, kB",
    "refresh_ms": "Refresh, ms",
    "apply_ms": "Direction, ms",
}


def _table(result: Result) -> str:
    rows = result.comparison.select(damping=result.damping).rows
    head = "".join(f"<th>{heading}</th>" for heading in _COLUMNS.values())
    body = "".join(f"<tr>{''.join(f'<td>{_cell(row, name)}</td>' for name in _COLUMNS)}</tr>" for row in rows)
    return (
        f'<details open><summary>Errors and costs at λ = {result.damping:.2g}</summary><div class="scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _cell(row: Row, name: str) -> str:
    if name == "approximation":
        return html.escape(row.approximation)
    if name == "memory":
        return f"{(row.statistics_bytes + row.roots_bytes) / 1e3:.1f}"
    value = getattr(row, name)
    return f"{value:.2f}" if name.endswith("_ms") else f"{value:.3g}"
