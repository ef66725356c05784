"""Figures of a study. A method has one colour and one line style in all of them, so that they can be read side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from curvlib.analysis.figures import STYLE

from .answers import SLOWEST, Profile, Trial, best_of, breakdown, costs, finals, profiles, sensitivity, varied
from .methods import title_of
from .records import write_whole
from .sections import Entry, Quantity, Section, band

_CROWD = 10  # curves in one figure, beyond which bands would hide them
_LINE = 0.185  # inches of a line in a legend
_PARTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999", "#56B4E9", "#D55E00", "#F0E442")


Shown = TypeVar("Shown")
Arguments = ParamSpec("Arguments")


def _styled(draw: Callable[Arguments, Shown]) -> Callable[Arguments, Shown]:
    """Draw in the library's style: axes take it when they are made."""

    @wraps(draw)
    def drawn(*arguments: Arguments.args, **options: Arguments.kwargs) -> Shown:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments, **options)

    return drawn


@_styled
def curves(section: Section) -> Figure:
    """Everything measured against steps (left) and seconds of training (right): medians over seeds, bands for few methods."""
    shown = _by_success(section)
    rows = len(section.quantities)
    figure = _canvas([entry.title for entry in shown], 8.2, 0.4 + 2.3 * rows)
    grid = figure.subplots(rows, 2, sharex="col", sharey="row", squeeze=False)
    for quantity, (left, right) in zip(section.quantities, grid, strict=True):
        lines: list[np.ndarray] = []
        for entry in shown:
            for axes, against in ((left, "step"), (right, "seconds")):
                place, low, middle, high = band(entry.records, quantity, against)
                middle = np.where(np.isfinite(middle), middle, np.nan)
                axes.plot(place, middle, linewidth=1.6, label=entry.title, color=entry.colour, linestyle=entry.dash)
                if len(shown) <= _CROWD and len(entry.records) > 1:
                    ends = np.isfinite(low) & np.isfinite(high)
                    axes.fill_between(place, low, high, where=ends, color=entry.colour, alpha=0.15, linewidth=0)
                lines.append(middle)
        _scale(left, quantity, np.stack(lines))
        left.set_ylabel(quantity.title)
        _target(left, right, section, quantity)
    for axes, text in zip(grid[-1], ("steps", "training time in seconds"), strict=True):
        axes.set_xlabel(text)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6))
    _legend(figure, [(entry.title, entry) for entry in shown])
    return figure


@_styled
def profile(found: Sequence[Section]) -> Figure | None:
    """Shares of problems solved within a multiple of the least time (left) and steps (right); ``None`` without targets."""
    tables = [costs(found, against) for against in ("seconds", "step")]
    if not any(math.isfinite(cost) for mine in tables[0].values() for cost in mine):
        return None
    made = [profiles(table) for table in tables]
    looks = {entry.title: entry for section in reversed(found) for entry in section.entries}
    order = sorted(made[0], key=lambda title: -made[0][title].score())
    told, others = order[:_CROWD], order[_CROWD:]
    labels = [f"{title}  {made[0][title].score():.2f}" for title in told]
    figure = _canvas(labels, 8.2, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, mine, text in zip(panels, made, ("time", "steps"), strict=True):
        for title in others:
            axes.step(*_steps(mine[title]), where="post", linewidth=0.7, color="0.8", zorder=1)
        for place, title in enumerate(told):
            tau, share = _steps(mine[title])
            # Equal profiles would hide each other: each is moved by a hair.
            hair = 0.03 * (place - (len(told) - 1) / 2) / len(told)
            look = looks[title]
            axes.step(tau, share + hair, where="post", linewidth=1.6, color=look.colour, linestyle=look.dash)
        axes.set_xlim(1, SLOWEST)
        axes.set_ylim(-0.04, 1.04)
        axes.set_xlabel(f"{text} to target / the least of all methods")
    panels[0].set_ylabel("share of problems")
    panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f} %"))
    grey = [(f"{len(others)} others", replace(looks[others[0]], colour="0.8", dash="-"))] if others else []
    _legend(figure, [*((label, looks[title]) for label, title in zip(labels, told, strict=True)), *grey])
    return figure


def _steps(one: Profile) -> tuple[np.ndarray, np.ndarray]:
    corners = sorted({1.0, SLOWEST, *(tau for tau in one.ratios if 1 < tau < SLOWEST)})
    return np.array(corners), np.array([one.share(tau) for tau in corners])


@_styled
def best_of_k(section: Section, tried: Mapping[str, Sequence[Trial]]) -> Figure | None:
    """The expected best of k trials against k; ``None`` where no method had more than one trial."""
    several = {name: mine for name, mine in tried.items() if len(mine) > 1}
    if not several:
        return None
    quantity = section.judged
    found = {name: best_of([trial.value for trial in mine], quantity.better) for name, mine in several.items()}
    sign = 1 if quantity.better == "lower" else -1
    order = sorted(found, key=lambda name: sign * found[name][-1].expected)
    figure = _canvas([title_of(name) for name in order], 5.2, 3.4)
    axes = figure.subplots()
    lines = []
    for name in order:
        look = _look(section, name)
        tries = range(1, len(found[name]) + 1)
        middle = np.array([best.expected for best in found[name]])
        marker = "o" if len(middle) <= 30 else ""
        axes.plot(tries, middle, marker=marker, markersize=3, color=look.colour, linestyle=look.dash, linewidth=1.6)
        if len(order) <= _CROWD:
            low, high = ([getattr(best, end) for best in found[name]] for end in ("low", "high"))
            axes.fill_between(tries, low, high, color=look.colour, alpha=0.12, linewidth=0)
        lines.append(middle)
    longest = max(len(line) for line in lines)
    padded = np.stack([np.pad(line, (0, longest - len(line)), constant_values=np.nan) for line in lines])
    _scale(axes, quantity, padded, whole=True)
    axes.set_xlabel("trials of tuning, k")
    axes.set_ylabel(f"{quantity.title},\nexpected best of k trials")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    _legend(figure, [(title_of(name), _look(section, name)) for name in order])
    return figure


@_styled
def sensitivities(section: Section, tried: Mapping[str, Sequence[Trial]]) -> Figure | None:
    """A panel for each setting that tuning varied: the best that each of its values led to, and all trials as dots."""
    names = {name: None for mine in tried.values() for name in varied(mine)}
    if not names:
        return None
    panels = sorted(names, key=lambda name: (name != "lr", name != "damping"))[:6]
    across = 2 if len(panels) in (2, 4) else min(3, len(panels))
    down = math.ceil(len(panels) / across)
    shown = [name for name, mine in tried.items() if varied(mine)]
    quantity = section.judged
    best = min if quantity.better == "lower" else max
    figure = _canvas([title_of(name) for name in shown], max(5.2, 3.4 * across), 0.4 + 2.8 * down)
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    values = np.array([trial.value for name in shown for trial in tried[name]])
    for axes, setting in zip(grid.flat, panels, strict=False):
        for name in shown:
            table = sensitivity(tried[name], setting)
            if len(table) < 2:
                continue
            look = _look(section, name)
            axes.plot(
                list(table),
                [best(ends) for ends in table.values()],
                color=look.colour,
                linestyle=look.dash,
                linewidth=1.6,
            )
            dots = [(value, end) for value, ends in table.items() for end in ends]
            axes.scatter(*zip(*dots, strict=True), s=9 if len(shown) <= _CROWD else 4, color=look.colour, linewidth=0)
        places = [value for name in shown for value in sensitivity(tried[name], setting)]
        if min(places) > 0 and max(places) >= 8 * min(places):
            axes.set_xscale("log")
            _decades(axes.xaxis)
        axes.set_xlabel({"lr": "learning rate"}.get(setting, setting.replace("_", " ")))
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    _scale(grid[0, 0], quantity, values[None], whole=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{quantity.title} at the end")
    _legend(figure, [(title_of(name), _look(section, name)) for name in shown])
    return figure


@_styled
def steps(section: Section) -> Figure | None:
    """Where the time of a step goes: stacked bars, the fastest on top; ``None`` where it was not measured."""
    bars = {entry.title: breakdown(entry) for entry in section.entries}
    bars = {title: parts for title, parts in bars.items() if sum(parts.values()) > 0}
    if not bars:
        return None
    order = sorted(bars, key=lambda title: sum(bars[title].values()))
    names = list(dict.fromkeys(name for title in order for name in bars[title]))
    figure = Figure(figsize=(8.2, 1.1 + 0.26 * len(order)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(order))
    for place, name in enumerate(names):
        widths = np.array([1e3 * bars[title].get(name, 0.0) for title in order])
        axes.barh(order, widths, left=left, height=0.72, color=_PARTS[place % len(_PARTS)], label=name)
        left += widths
    for place, total in enumerate(left):
        axes.annotate(f"{total:.3g}", (total, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlabel("milliseconds a step")
    axes.set_xlim(0, 1.08 * left.max())
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.grid(False, axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper left", ncols=min(len(names), 5), frameon=False, handlelength=1, columnspacing=1.4)
    return figure


@_styled
def save(figure: Figure, stem: Path) -> None:
    """Write PNG and PDF; equal figures give equal files."""
    dated: Mapping[str, Mapping[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}}
    for form, metadata in dated.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=160, metadata=dict(metadata))
        write_whole(stem.with_name(f"{stem.name}.{form}"), buffer.getvalue())


def _by_success(section: Section) -> list[Entry]:
    """Entries in the order in which their curves end, the best first: the legend can be read along them."""
    judged = section.judged
    sign = 1 if judged.better == "lower" else -1
    return sorted(section.entries, key=lambda entry: sign * finals(entry, judged).middle)


def _look(section: Section, method: str) -> Entry:
    return next(entry for entry in section.entries if entry.method == method)


def _canvas(titles: Sequence[str], width: float, height: float) -> Figure:
    """A figure with room for a legend on its right."""
    height = max(height, _LINE * min(len(titles), 14))
    beside = _beside(len(titles), height) * (0.55 + 0.068 * max(len(_short(title)) for title in titles))
    return Figure(figsize=(width + beside, height), layout="constrained")


def _beside(names: int, height: float) -> int:
    """The number of columns in a legend of a given height."""
    return math.ceil(names * _LINE / (height - 0.1))


def _legend(figure: Figure, looks: Sequence[tuple[str, Entry]]) -> None:
    handles = [
        Line2D([], [], color=look.colour, ls=look.dash, linewidth=1.6, label=_short(title)) for title, look in looks
    ]
    columns = _beside(len(looks), figure.get_figheight())
    figure.legend(
        handles=handles, loc="outside right upper", ncols=columns, frameon=False, handlelength=2.6, fontsize=8
    )


def _short(title: str) -> str:
    return title if len(title) <= 34 else f"{title[:31]}…"


def _scale(axes: Axes, quantity: Quantity, lines: np.ndarray, whole: bool = False) -> None:
    """Limits and ticks by what the lines ``[n, points]`` do; a curve that explodes, or has just begun, does not set them."""
    sound = lines[np.isfinite(lines)]
    if not sound.size:
        return
    starts = sound if whole else lines[:, 0][np.isfinite(lines[:, 0])]
    if quantity.better == "higher":
        late = sound if whole else lines[:, lines.shape[1] // 10 :]
        low, high = float(np.nanquantile(late[np.isfinite(late)], 0.02)), float(sound.max())
        room = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-3)
        axes.set_ylim(low - room, high + room)
        return
    low, high = float(sound.min()), float(starts.max() if starts.size else sound.max())
    if low <= 0 or high <= low:
        return
    axes.set_yscale("log")
    axes.set_ylim(low / (high / low) ** 0.04, high * (high / low) ** 0.04)
    _decades(axes.yaxis)


def _decades(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, between powers of ten only where it spans little more than one."""
    low, high = axis.get_view_interval()
    span = math.log10(high / low)
    plain = FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e5 else f"{value:.0e}".replace("e-0", "e-"))
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(plain)
    if span > 2.1:
        axis.set_minor_formatter(NullFormatter())
        return
    axis.set_minor_locator(LogLocator(subs=(2, 5) if span > 0.7 else (1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)))
    axis.set_minor_formatter(plain)
    axis.set_tick_params(which="both", length=3.5, pad=3.5)


def _target(left: Axes, right: Axes, section: Section, quantity: Quantity) -> None:
    if section.problem is None or not section.goal or section.problem.target.of != quantity.name:
        return
    value = section.problem.target.value
    for axes in (left, right):
        axes.axhline(value, color="0.4", linewidth=0.8, zorder=0)
    low, high = left.get_ylim()  # by the curves: a target beyond them is pointed at
    text = "target" if low <= value <= high else "target ↓" if value < low else "target ↑"
    place: Any = (1.01, min(max(value, low), high))
    right.annotate(text, place, xycoords=("axes fraction", "data"), va="center", fontsize=8, color="0.3")
