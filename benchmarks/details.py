"""The end of a report: every run with its settings and its curve, and the machines that were measured on."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence

from .records import Record
from .sections import Entry, Quantity, Section, settings_text, told
from .summary import bytes_text, time_text

_DASHES = {"-": "", "--": "7 3", ":": "2 2", "-.": "7 2 2 2"}
_WIDTH, _HEIGHT, _EDGE = 320, 90, 6


def swatch(entry: Entry) -> str:
    """The colour and line style of an entry, as a small SVG element."""
    dash = _DASHES[entry.dash] if isinstance(entry.dash, str) else " ".join(f"{one:g}" for one in entry.dash[1])
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        '<svg class="key" viewBox="0 0 40 14" aria-hidden="true">'
        f'<line x1="4" y1="7" x2="36" y2="7" stroke="{entry.colour}" stroke-width="3"{dashed}/></svg>'
    )


def runs(found: Sequence[Section], everything: Sequence[Record]) -> str:
    """Details of every run, section by section; environments are numbered as by :func:`environments` of everything."""
    known = _environments(everything)
    parts = []
    for section in found:
        listed = "".join(_run(section, entry, record, known) for entry in section.entries for record in entry.records)
        count = sum(len(entry.records) for entry in section.entries)
        parts.append(f"<details><summary>{html.escape(section.title)}: {count} runs</summary>{listed}</details>")
    return f'<h2 id="runs">Runs</h2>{"".join(parts)}'


def environments(records: Sequence[Record]) -> str:
    """Every machine and version that took part."""
    shown = "".join(
        f'<details id="environment-{number}"><summary>Environment {number}: {html.escape(_brief(text))}</summary>'
        f"<pre>{html.escape(text)}</pre></details>"
        for text, number in _environments(records).items()
    )
    return f'<h2 id="environments">Where this was measured</h2>{shown}'


def _environments(records: Sequence[Record]) -> dict[str, int]:
    """Each environment as text -> its number."""
    texts = sorted({_text(record) for record in records})
    return {text: number for number, text in enumerate(texts, start=1)}


def _text(record: Record) -> str:
    return json.dumps(dict(record.environment), indent=1, sort_keys=True, default=str)


def _brief(text: str) -> str:
    content = json.loads(text)
    names = ("processor", "device", "threads", "precision", "commit")
    return ", ".join(f"{name} {content[name]}" for name in names if name in content) or "not recorded"


def _run(section: Section, entry: Entry, record: Record, known: dict[str, int]) -> str:
    spec, last = record.spec, record.points[-1]
    ends = ", ".join(f"{one.title} {getattr(last, one.name):.5g}" for one in section.quantities)
    parts = ", ".join(f"{name} {time_text(seconds)}" for name, seconds in record.parts.items())
    number = known[_text(record)]
    facts = {
        "Settings": settings_text(told(spec)) or "the optimizer's defaults",
        "Budget": spec.budget,
        "At the end": f"{last.step} steps, {time_text(last.seconds)}, {ends}",
        "Parts of the time": parts,
        "Memory": f"state {bytes_text(record.memory)}" + (f", peak {bytes_text(record.peak)}" if record.peak else ""),
        "Data": record.note,
        "Warnings": " ".join(record.warnings),
        "Record": spec.key,
    }
    listed = "".join(f"<li>{name}: {html.escape(text)}</li>" for name, text in facts.items() if text)
    return (
        f"<details><summary>{html.escape(entry.title)} · seed {spec.seed} · {html.escape(record.status)}</summary>"
        f'<ul>{listed}<li>Environment: <a href="#environment-{number}">{number}</a></li></ul>'
        f"{_curve(record, section.judged, entry.colour)}</details>"
    )


def _curve(record: Record, quantity: Quantity, colour: str) -> str:
    """The judged quantity over steps, on a logarithmic axis where it is a loss."""
    logarithmic = quantity.better == "lower" and all(quantity.of(point) > 0 for point in record.points)
    places = [(point.step, quantity.of(point)) for point in record.points if math.isfinite(quantity.of(point))]
    values = [math.log(value) if logarithmic else value for _, value in places]
    if len(places) < 2:
        return ""
    low, span = min(values), (max(values) - min(values)) or 1.0
    right = places[-1][0] or 1
    wide, high = _WIDTH - 2 * _EDGE, _HEIGHT - 2 * _EDGE
    corners = " ".join(
        f"{_EDGE + wide * step / right:.1f},{_EDGE + high * (1 - (value - low) / span):.1f}"
        for (step, _), value in zip(places, values, strict=True)
    )
    shown = f"{quantity.title} over steps, from {places[0][1]:.4g} to {places[-1][1]:.4g}"
    return (
        f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(shown)}">'
        f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/></svg>'
    )
