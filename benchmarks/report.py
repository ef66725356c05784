"""The report of a study: one self-contained HTML page, a CSV table and the figures, from its records."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

from curvlib.analysis.figures import as_svg

from .figures import curves
from .page import page
from .problems import PROBLEMS
from .records import Record, write_whole
from .summary import HEADINGS, Row, as_csv, cells, summarize


def write_report(records: Sequence[Record], folder: Path, title: str, tuning: Sequence[Record] = ()) -> Path:
    """Write ``index.html``, ``summary.csv`` and the figures; returns the page.

    Args:
        records: finished runs.
        folder: where to.
        title: of the page.
        tuning: trials.
    """
    rows = summarize(records)
    names = list(dict.fromkeys(row.problem for row in rows))
    figures = {name: as_svg(curves([record for record in records if record.spec.problem == name])) for name in names}
    for name, figure in figures.items():
        write_whole(folder / f"{name}.svg", figure.encode())
    write_whole(folder / "summary.csv", as_csv(rows).encode())
    file = folder / "index.html"
    sections = "".join(_section(name, [row for row in rows if row.problem == name], figures[name]) for name in names)
    write_whole(file, _page(title, sections, records).encode())
    return file


def _section(name: str, rows: Sequence[Row], figure: str) -> str:
    problem = PROBLEMS[name]
    return f"""
<h2>{html.escape(problem.title)}</h2>
<p class="source">{html.escape(problem.source)}. Batches of {problem.batch_size}; target: a training loss of
{problem.target:g}.</p>
<figure>{figure}<figcaption>Lower is better. Lines are medians over seeds, bands reach from the least to the largest.
The left panel compares progress for each step, the right one for each second of training on this machine.</figcaption>
</figure>
<div class="scroll"><table><thead><tr>{"".join(f"<th>{heading}</th>" for heading in HEADINGS)}</tr></thead><tbody>
{"".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells(row))}</tr>" for row in rows)}
</tbody></table></div>
"""


def _page(title: str, sections: str, records: Sequence[Record]) -> str:
    ordered = sorted(records, key=lambda one: (one.spec.problem, one.spec.method, one.spec.seed))
    runs = "".join(_details(record) for record in ordered)
    environments = {json.dumps(dict(record.environment), sort_keys=True) for record in records}
    shown = "".join(f"<pre>{html.escape(json.dumps(json.loads(one), indent=1))}</pre>" for one in sorted(environments))
    lead = (
        "Within a seed all methods start from the same weights and see the same batches. The loss is a running average "
        "over batches (weight 0.9). The clock stops during evaluations. “× Adam” is the median time of a step over Adam's "
        "with the same seed; memory is the optimizer's own state; “–” is a target that fewer than half of the runs "
        "reached. A run that diverged counts as ∞."
    )
    return page(title, lead, f"{sections}<h2>Runs</h2>{runs}<h2>Where this was measured</h2>{shown}")


def _details(record: Record) -> str:
    spec = record.spec
    settings = json.dumps(dict(spec.settings), indent=1)
    heading = f"{PROBLEMS[spec.problem].title} · {spec.method} · seed {spec.seed} · {record.status}"
    last = record.points[-1]
    return (
        f"<details><summary>{html.escape(heading)}</summary><p>{last.step} steps, {last.seconds:.2f} s, training loss "
        f"{last.train:.5g}, held-out loss {last.test:.5g}. Record {spec.key}. Settings that differ from the optimizer's "
        f"defaults:</p><pre>{html.escape(settings)}</pre></details>"
    )
