"""The report of a study: one self-contained HTML page, CSV tables and figures, from its records alone."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from curvlib.analysis.figures import as_svg

from . import figures
from .answers import Trial, costs, profiles, reference, to_target, trials
from .caveats import caveats
from .details import environments, runs, swatch
from .methods import title_of
from .page import Cell, figure, note, page, table
from .records import Record, RecordError, write_whole
from .sections import Entry, Section, sections, settings_text
from .study import Chosen
from .summary import Row, columns, curves_csv, interval_cell, runs_csv, summarize, summary_csv, time_text, used

_LEAD = (
    "Within a seed all methods start from the same weights and see the same batches. The clock stops during evaluations. "
    "Numbers are medians over seeds, with 95 % bootstrap intervals under them; a missed target counts as ∞ and takes part "
    "in the median, and so does the loss of a run that diverged. The training loss is a running average over batches."
)
_CURVES = (
    "Medians over seeds; bands, where there are few enough methods, reach from the least to the largest run. The left panels "
    "compare progress for each step, the right ones for each second of training on this machine. The legend begins with the "
    "method that ends best."
)
_PROFILE = (
    "Performance profile: the share of problems on which a method's median cost of reaching the target is within a factor of "
    "the least cost of any method here. The number beside each name is AlgoPerf's score, the mean height of the left curve "
    "between 1 and 4; 1.00 is first everywhere. Equal curves are moved apart by a hair."
)
_BREAKDOWN = "Mean time of a step, split into its parts, which add up to the whole."
_BEST = (
    "What tuning buys: the expected best of k trials over all orders in which the trials could have been made, with "
    "quartiles as bands. A trial is the median over tuning seeds; one that diverged or was pruned counts as the network "
    "that training began with."
)
_SENSITIVITY = "Every dot is a trial of tuning. Lines go through the best trial with each value of the setting."
_ADAM = (
    '<p class="source">“Adam would need” is how much longer Adam (here: {}) takes to the loss at which a method ends: '
    "read off Adam's own curve where it gets there; marked “(fit)” where it does not, by extrapolating the power law "
    "a·D<sup>−b</sup> + c fitted to the last nine tenths of it; “&gt;” where even ten times Adam's budget would not do.</p>"
)


def write_report(
    records: Sequence[Record],
    folder: Path,
    title: str,
    tuning: Sequence[Record] = (),
    chosen: Sequence[Chosen] = (),
) -> Path:
    """Write ``index.html``, ``summary.csv``, ``runs.csv``, ``curves.csv`` and the figures; returns the page.

    Args:
        records: finished runs on the reporting seeds.
        folder: where to.
        title: of the page.
        tuning: finished runs on the tuning seeds, which no result is drawn from.
        chosen: what tuning came to.

    Raises:
        RecordError: where there is nothing to report.
    """
    tuning = [*tuning, *(record for record in records if record.spec.purpose == "tuning")]
    told = {record.spec.key for record in tuning}
    records = [record for record in records if record.spec.key not in told]
    found, tried = sections(records, tuning), sections(tuning, records)
    if not found and not tried:
        raise RecordError(f"{folder} holds no finished run to report; run the study first")
    rows = {section.name: summarize(section) for section in found}
    parts = [
        _notes([*found, *tried]),
        _navigation(found, tried),
        _targets(found, folder),
        _adam(found),
        *(_section(section, rows[section.name], folder, chosen) for section in found),
        *(_tuning(section, folder) for section in tried),
        runs(found, [*records, *tuning]),
        environments([*records, *tuning]),
    ]
    uses = [*(("report", section) for section in found), *(("tuning", section) for section in tried)]
    for name, content in (
        ("summary.csv", summary_csv(row for mine in rows.values() for row in mine)),
        ("runs.csv", runs_csv(uses)),
        ("curves.csv", curves_csv(uses)),
    ):
        write_whole(folder / name, content.encode())
    file = folder / "index.html"
    write_whole(file, page(title, _LEAD, "".join(parts)).encode())
    return file


def _notes(found: Sequence[Section]) -> str:
    whose: dict[str, dict[str, None]] = {}
    for section in found:
        for text in caveats(section):
            whose.setdefault(text, {})[section.title] = None
    return "".join(note(f"{', '.join(titles)}: {text}") for text, titles in whose.items())


def _adam(found: Sequence[Section]) -> str:
    """What is meant by Adam, where there is one."""
    titles = dict.fromkeys(adam.title for section in found if (adam := reference(section)) is not None)
    return _ADAM.format(html.escape(" or ".join(titles))) if titles else ""


def _navigation(found: Sequence[Section], tried: Sequence[Section]) -> str:
    links = [(section.name, section.title) for section in found]
    links += [(f"tuning-{section.name}", f"Tuning: {section.title}") for section in tried]
    links += [("runs", "Runs"), ("environments", "Where this was measured")]
    listed = "".join(f'<a href="#{html.escape(name)}">{html.escape(title)}</a>' for name, title in links)
    files = "".join(f'<a href="{name}">{name}</a>' for name in ("summary.csv", "runs.csv", "curves.csv"))
    return f'<nav aria-label="Contents"><p>{listed}</p><p>{files}</p></nav>'


def _targets(found: Sequence[Section], folder: Path) -> str:
    """Who reached the targets how fast."""
    aimed = [section for section in found if section.goal]
    if not aimed:
        return ""
    items = "".join(f"<li>{html.escape(_headline(section))}</li>" for section in aimed)
    scores = [
        {title: one.score() for title, one in profiles(costs(aimed, name)).items()} for name in ("seconds", "step")
    ]
    order = sorted(scores[0], key=lambda title: -scores[0][title])
    looks = {entry.title: entry for section in aimed for entry in section.entries}
    rows = []
    for title in order:
        cells = [Cell(title, order=title, key=swatch(looks[title]))]
        cells += [
            Cell(f"{mine[title]:.2f}", order=mine[title], best=0 < mine[title] == max(mine.values())) for mine in scores
        ]
        cells += [_cost(section, title) for section in aimed]
        rows.append(cells)
    heads = [
        ("Method", ""),
        ("Score, time", "AlgoPerf's score of the performance profile in time; 1 is first everywhere"),
        ("Score, steps", "the same in steps"),
        *((section.title, f"training time to {section.goal}") for section in aimed),
    ]
    drawn = figures.profile(aimed)
    shown = _figure(drawn, folder / "profile", "Performance profiles in time and steps", _PROFILE) if drawn else ""
    return (
        f"<h2>Who reached the targets, how fast</h2><ul>{items}</ul>"
        f"{table(heads, rows, 'Time to target of every method on every problem')}{shown}"
    )


def _headline(section: Section) -> str:
    """One sentence on a problem."""
    times = [(to_target(entry, section.problem)[1].middle, entry.title) for entry in section.entries]
    reached = sorted(one for one in times if math.isfinite(one[0]))
    start = f"{section.title}, {section.goal}: "
    if not reached:
        return f"{start}no method reached it in half of its runs within {section.budget}."
    first = ", ".join(f"{title} ({time_text(seconds)})" for seconds, title in reached[:3])
    missed = [title for seconds, title in times if math.isinf(seconds)]
    lost = (
        f" Missed by {', '.join(missed)}." if 0 < len(missed) <= 6 else f" Missed by {len(missed)}." if missed else ""
    )
    return f"{start}reached by {len(reached)} of {len(times)} methods, first {first}.{lost}"


def _cost(section: Section, title: str) -> Cell:
    entry = next((one for one in section.entries if one.title == title), None)
    if entry is None:
        return Cell("not run")
    steps, seconds = to_target(entry, section.problem)
    least = min(to_target(one, section.problem)[1].middle for one in section.entries)
    first = math.isfinite(seconds.middle) and seconds.middle == least
    detail = "" if math.isinf(steps.middle) else f"{steps.middle:.0f} steps"
    return Cell(interval_cell(seconds, time_text).text, detail, seconds.middle, best=first)


def _section(section: Section, rows: Sequence[Row], folder: Path, chosen: Sequence[Chosen]) -> str:
    shown = columns(section)
    cells = [[column.cell(row) for column in shown] for row in rows]
    named = [
        [Cell(mine[0].text, mine[0].detail, mine[0].order, key=swatch(row.entry)), *mine[1:]]
        for row, mine in zip(rows, cells, strict=True)
    ]
    heads = [(column.heading, column.meaning) for column in shown]
    drawn = _figure(figures.curves(section), folder / f"{section.name}-curves", f"Curves: {section.title}", _CURVES)
    split = figures.steps(section)
    if split is not None:
        drawn += _figure(split, folder / f"{section.name}-steps", f"Time of a step: {section.title}", _BREAKDOWN, True)
    return (
        f'<h2 id="{section.name}">{html.escape(section.title)}</h2><p class="source">{html.escape(_about(section))}</p>'
        f"{table(heads, named, section.title)}{_used(section, chosen)}{drawn}"
    )


def _used(section: Section, chosen: Sequence[Chosen]) -> str:
    """With which settings every method ran, and how they were chosen."""
    heads = [("Method", ""), ("Settings", "of the runs above"), ("Chosen", "how")]
    rows = [
        [
            Cell(one.title, order=one.title, key=swatch(one.entry) if one.entry else ""),
            Cell(one.settings, order=one.settings, words=True),
            Cell(one.how, order=one.how, words=True),
        ]
        for one in used(section, chosen)
    ]
    width = 3 if chosen else 2
    caption = f"Settings: {section.title}"
    return (
        f"<details open><summary>Settings{', and how they were chosen' if chosen else ''}</summary>"
        f"{table(heads[:width], [row[:width] for row in rows], caption)}</details>"
    )


def _about(section: Section) -> str:
    parts = [section.problem.source if section.problem is not None else "This version does not know the problem"]
    if section.problem is not None:
        parts.append(f"Batches of {section.problem.batch_size}")
    parts += [f"Budget: {section.budget}", f"Target: {section.goal}" if section.goal else "No target"]
    return ". ".join(parts) + "."


def _tuning(section: Section, folder: Path) -> str:
    tried = trials(section)
    count = sum(map(len, tried.values()))
    drawn = ""
    for name, made, caption in (
        ("best-of-k", figures.best_of_k(section, tried), _BEST),
        ("sensitivity", figures.sensitivities(section, tried), _SENSITIVITY),
    ):
        if made is not None:
            alternative = f"Tuning, {name.replace('-', ' ')}: {section.title}"
            drawn += _figure(made, folder / f"{section.name}-{name}", alternative, caption, small=name == "best-of-k")
    sign = 1 if section.judged.better == "lower" else -1
    listed = sorted(
        ((section.entries, name, trial) for name, mine in tried.items() for trial in mine),
        key=lambda one: sign * one[2].value,
    )
    rows = [_trial(entries, name, trial) for entries, name, trial in listed]
    heads = [("Method", ""), (section.judged.title, f"{section.judged.better} is better"), ("Settings", "")]
    seeds = sorted({record.spec.seed for entry in section.entries for record in entry.records})
    return (
        f'<h2 id="tuning-{section.name}">Tuning: {html.escape(section.title)}</h2><p class="source">{count} trials, seeds '
        f"{', '.join(map(str, seeds))}; judged by the {html.escape(section.judged.title)} at the end of {section.budget}.</p>"
        f"{drawn}<details><summary>All trials</summary>{table(heads, rows, f'Trials: {section.title}')}</details>"
    )


def _trial(entries: Sequence[Entry], name: str, trial: Trial) -> list[Cell]:
    look = next(entry for entry in entries if entry.method == name)
    title = title_of(name)
    lost = f"{trial.lost} of {trial.runs} diverged or pruned" if trial.lost else ""
    value = Cell(f"{trial.value:#.4g}", lost, trial.value)
    text = settings_text(trial.settings) or "defaults"
    return [Cell(title, order=title, key=swatch(look)), value, Cell(text, order=text, words=True)]


def _figure(made: Figure, stem: Path, alternative: str, caption: str, small: bool = False) -> str:
    """Write a figure's files, and return it for the page."""
    figures.save(made, stem)
    links = f' <a href="{stem.name}.png">PNG</a> <a href="{stem.name}.pdf">PDF</a>'
    return figure(as_svg(made), alternative, html.escape(caption) + links, small)
