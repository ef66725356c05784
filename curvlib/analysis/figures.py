"""Figures: the inverse of a layer's curvature with blocks drawn in, spectra, and errors against memory and time.

Needs matplotlib, which comes with the extra ``study``. Every structure has one colour and one marker everywhere, after
the palettes of Okabe & Ito and of Tol, which are safe for the colour-blind.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..layers import survey
from ..partition import Partition
from ..recipe import Labels
from .approximation import Approximation, Structure
from .exact import fisher
from .family import FAMILIES
from .objective import Objective, Of
from .table import TOTAL, Comparison, Row

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter
except ImportError:
    raise ImportError("the figures need matplotlib: pip install 'curvlib[study]'") from None

STYLES: Mapping[str, tuple[str, str]] = {
    "diagonal": ("#888888", "o"),
    "kernels": ("#CC79A7", "s"),
    "chunks": ("#E69F00", "D"),
    "tiles": ("#D55E00", "X"),
    "per output": ("#56B4E9", "^"),
    "per input": ("#009E73", "v"),
    "per head": ("#882255", "h"),
    "averaged": ("#B8A200", "<"),
    "Kronecker": ("#0072B2", "P"),
    "full layer": ("#000000", "*"),
    "own block": ("#AA4499", "p"),
}
"""Family -> colour and marker."""

AXES = {
    "frobenius": "‖A − E‖ / ‖E‖, Frobenius",
    "spectral": "‖A − E‖ / ‖E‖, spectral",
    "inverse_frobenius": "error of the damped inverse\n(relative, Frobenius)",
    "inverse_spectral": "error of the damped inverse\n(relative, spectral)",
    "cosine": "cosine to the exact direction",
    "best_decrease": "share of the best decrease\nof the quadratic model",
    "memory": "memory of statistics and roots in kB",
    "apply_ms": "time of one direction in ms",
    "refresh_ms": "time of one refresh in ms",
}

_EXACT = 1e-9
_DASHES = ("-", "--", ":", "-.")

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "path",
    "svg.hashsalt": "curvlib",
}
"""Settings of matplotlib for every figure."""


def inverse_map(
    objective: Objective,
    of: Of,
    overlays: Mapping[str, str | Partition],
    *,
    labels: Labels = "data",
    damping: float = 1e-2,
) -> Figure:
    """|(F + λI)⁻¹| of one weight with the blocks of some partitions drawn in, one panel each.

    The figure that motivates mini-blocks (Bahamou, Goldfarb & Ren 2022): where bright entries gather inside the outlines,
    the partition loses little. In each panel entries are ordered so that blocks lie together; its title says how much of
    what is off the diagonal lies inside the blocks.

    Args:
        objective: model, loss and data.
        of: a weight, or its name.
        overlays: title -> partition with one dense factor.
        labels: of F; ``"data"`` is the empirical Fisher.
        damping: λ as a multiple of F's mean eigenvalue.
    """
    matrix = fisher(objective, labels, of)
    size = len(matrix)
    shift = damping * matrix.trace() / size
    inverse = torch.linalg.inv(matrix + shift * torch.eye(size, dtype=matrix.dtype)).abs()
    sizes = _sizes(objective, of)
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(3.1 * len(overlays) + 0.9, 3.6), layout="constrained")
        panels = figure.subplots(1, len(overlays), squeeze=False)[0]
        shown = None
        for axes, (title, text) in zip(panels, overlays.items(), strict=True):
            partition = text if isinstance(text, Partition) else Partition(text)
            shown = _overlaid(axes, inverse, partition.layout(sizes).labels(), f"{title}:  {partition}")
        assert shown is not None
        bar = figure.colorbar(shown, ax=list(panels), shrink=0.85)
        bar.set_label("|entry| over the largest, logarithm to base 10")
    return figure


def _overlaid(axes: Axes, inverse: Tensor, labels: Tensor, title: str) -> Any:
    order = labels.argsort(stable=True)
    ordered, labels = inverse[order][:, order], labels[order]
    inside = labels[:, None] == labels[None, :]
    apart = ordered.square() * ~torch.eye(len(ordered), dtype=torch.bool)
    mass = (apart * inside).sum() / apart.sum()
    share = (inside.double().sum() - len(ordered)) / (len(ordered) ** 2 - len(ordered))
    picture = (ordered / ordered.max()).clamp_min(1e-4).log10()
    shown = axes.imshow(picture.numpy(), cmap="magma", vmin=-3, vmax=0, interpolation="nearest")
    starts = [0, *((labels.diff() != 0).nonzero().flatten() + 1).tolist(), len(labels)]
    for start, stop in pairwise(starts):
        corner, side = (start - 0.5, start - 0.5), stop - start
        axes.add_patch(matplotlib.patches.Rectangle(corner, side, side, fill=False, edgecolor="#56B4E9", linewidth=0.7))
    axes.set_title(f"{title}\n{share:.1%} of the entries, {mass:.0%} of their squares", fontsize=8.5)
    axes.set_xlabel("weight")
    axes.set_ylabel("weight")
    return shown


def _sizes(objective: Objective, of: Of) -> Mapping[str, int]:
    (name, *others) = objective.names(of)
    if others:
        raise ValueError(f"a map is of one weight, got {name} and {len(others)} more; name one parameter")
    slots, _ = survey(objective.model)
    (slot,) = (slot for parameter, slot in slots.items() if slot.name == name)
    return slot.sizes


def spectra(
    objective: Objective,
    of: Of,
    approximations: Mapping[str, Structure],
    *,
    labels: Labels = "exact",
) -> Figure:
    """Eigenvalues of a layer's exact curvature and of approximations, sorted, over the largest exact one."""
    exact = torch.linalg.eigvalsh(fisher(objective, labels, of)).flip(0)
    names = objective.names(of)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axes = figure.subplots()
        number = range(1, len(exact) + 1)
        top = float(exact[0])
        axes.plot(number, (exact / top).clamp_min(1e-12), color="black", linewidth=3, alpha=0.35, label="exact")
        drawn: list[str] = []
        for title, structure in approximations.items():
            approximation = Approximation(structure, objective, labels, names, repeats=1)
            values = torch.cat([torch.linalg.eigvalsh(held.dense()) for held in approximation.held])
            values = values.sort(descending=True).values.clamp_min(1e-12 * top) / top
            line = _line(approximation.family, drawn)
            axes.plot(range(1, len(values) + 1), values, **line, linewidth=1.4, label=title)
        axes.set_yscale("log")
        axes.set_ylim(1e-8, 3)
        axes.set_xlabel("number of the eigenvalue")
        axes.set_ylabel("eigenvalue over the largest exact one")
        axes.legend(frameon=False, fontsize=8)
    return figure


def pareto(
    comparison: Comparison,
    *,
    error: str = "inverse_frobenius",
    layer: str | None = None,
    damping: float | None = None,
    title: str = "",
) -> Figure:
    """An error against memory (left) and against the time of one direction (right), one point for each structure.

    Structures that nothing else beats in both respects are joined by a line and named.

    Args:
        comparison: from :func:`curvlib.analysis.compare`.
        error: the column to draw; smaller is better, but for ``"cosine"`` and ``"best_decrease"``.
        layer: which; by default all layers together, or the only one.
        damping: which; by default the first.
        title: of the figure.
    """
    there = list(dict.fromkeys(row.layer for row in comparison))
    layer = layer or (TOTAL if TOTAL in there else there[0])
    damping = comparison.rows[0].damping if damping is None else damping
    rows = comparison.select(layer=layer, damping=damping).rows
    larger = error in ("cosine", "best_decrease")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, cost in ((left, "memory"), (right, "apply_ms")):
            _points(axes, rows, error, cost, larger)
        left.set_ylabel(AXES.get(error, error))
        handles, names = left.get_legend_handles_labels()
        order = sorted(range(len(names)), key=lambda one: FAMILIES.index(names[one]))
        figure.legend(
            [handles[one] for one in order],
            [names[one] for one in order],
            loc="outside lower center",
            ncols=6,
            frameon=False,
        )
        if title:
            figure.suptitle(f"{title}, λ = {damping:.2g}", fontsize=10)
    return figure


def _points(axes: Axes, rows: Sequence[Row], error: str, cost: str, larger: bool) -> None:
    # Exact structures have an error of rounding; a logarithmic axis shows them at its lower end.
    floor = min((getattr(row, error) for row in rows if getattr(row, error) > _EXACT), default=1.0) / 2
    places = {}
    for row in rows:
        x = (row.statistics_bytes + row.roots_bytes) / 1e3 if cost == "memory" else getattr(row, cost)
        y = getattr(row, error)
        places[row.approximation] = (x, y if larger else max(y, floor))
    exact = {row.approximation for row in rows if not larger and getattr(row, error) <= _EXACT}
    for row in rows:
        colour, marker = STYLES[row.family]
        x, y = places[row.approximation]
        first = row.approximation == next(one.approximation for one in rows if one.family == row.family)
        axes.scatter(x, y, s=46, color=colour, marker=marker, zorder=3, label=row.family if first else None)
    front = _front(places, larger)
    axes.step(
        [places[name][0] for name in front], [places[name][1] for name in front], where="post", color="0.6", lw=0.9
    )
    axes.set_xscale("log")
    costs = [x for x, _ in places.values()]
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if max(costs) > 100 * min(costs) else (1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    if not larger:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.14)
    axes.set_xlabel(AXES[cost])
    named: list[Any] = []
    for name in front:
        at = axes.transAxes.inverted().transform(axes.transData.transform(places[name]))
        if all(abs(at - other).max() > 0.07 for other in named):  # one name where several would cover each other
            named.append(at)
            label = f"{name} (exact)" if name in exact else name
            axes.annotate(label, places[name], xytext=(4, 5), textcoords="offset points", fontsize=7, zorder=4)


def _front(places: Mapping[str, tuple[float, float]], larger: bool) -> list[str]:
    """The names of those that are not beaten, by growing cost."""
    front: list[str] = []
    best = -float("inf") if larger else float("inf")
    for name, (_, y) in sorted(places.items(), key=lambda one: (one[1][0], -one[1][1] if larger else one[1][1])):
        if y > best if larger else y < best:
            front.append(name)
            best = y
    return front


def sweep(comparison: Comparison, *, column: str = "cosine", layer: str | None = None) -> Figure:
    """One column against the damping, a line for each structure."""
    there = list(dict.fromkeys(row.layer for row in comparison))
    rows = comparison.select(layer=layer or (TOTAL if TOTAL in there else there[0])).rows
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axes = figure.subplots()
        drawn: list[str] = []
        for name in dict.fromkeys(row.approximation for row in rows):
            mine = sorted((row for row in rows if row.approximation == name), key=lambda row: row.damping)
            axes.plot(
                [row.damping for row in mine],
                [getattr(row, column) for row in mine],
                **_line(mine[0].family, drawn),
                marker=STYLES[mine[0].family][1],
                markersize=4,
                linewidth=1.3,
                label=name,
            )
        axes.set_xscale("log")
        axes.set_xlabel("damping λ")
        axes.set_ylabel(AXES.get(column, column))
        axes.legend(frameon=False, fontsize=7, ncols=2)
    return figure


def _line(family: str, drawn: list[str]) -> dict[str, Any]:
    """Colour and dash of the next line of a family."""
    dash = _DASHES[drawn.count(family) % len(_DASHES)]
    drawn.append(family)
    return {"color": STYLES[family][0], "linestyle": dash}


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element; equal figures give equal text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
