"""Figures: loss against steps and against training time, the median over seeds with a band from least to largest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from curvlib.analysis.figures import STYLE

from .methods import METHODS
from .problems import PROBLEMS
from .records import Record

_POINTS = 120
_CROWD = 12  # methods in one figure, beyond which bands would hide the curves


def curves(records: Sequence[Record]) -> Figure:
    """Training loss of one problem against steps (left) and seconds of training (right); bands for up to twelve methods."""
    problem = PROBLEMS[records[0].spec.problem]
    runs = {name: [record for record in records if record.spec.method == name] for name in METHODS}
    runs = {name: mine for name, mine in runs.items() if mine}
    # The legend has the order in which curves end.
    runs = dict(sorted(runs.items(), key=lambda item: -_band(item[1], "step")[2][-1]))
    columns = 1 if len(runs) <= _CROWD else 2
    height = max(3.3, 0.4 + 0.22 * math.ceil(len(runs) / columns))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0 + 1.6 * columns, height), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for name, mine in runs.items():
            method = METHODS[name]
            for axes, against in ((left, "step"), (right, "seconds")):
                grid, low, middle, high = _band(mine, against)
                if len(runs) <= _CROWD:
                    axes.fill_between(grid, low, high, color=method.colour, alpha=0.18, linewidth=0)
                axes.plot(grid, middle, color=method.colour, linestyle=method.dash, linewidth=1.6, label=method.title)
        for axes in (left, right):
            axes.axhline(problem.target, color="0.4", linewidth=0.8)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            # Between powers of ten labels stand only where the axis spans little more than one.
            axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))
            axes.set_xlim(left=0)
        left.annotate(
            "target", (1, problem.target), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
        left.set_xlabel("steps")
        left.set_ylabel("training loss (running average)")
        right.set_xlabel("training time in seconds")
        handles, names = right.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", ncols=columns, frameon=False)
    return figure


def _band(records: Sequence[Record], against: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(grid, least, median, largest) over runs, each interpolated on the part of the axis that all of them cover."""
    places = [np.array([getattr(point, against) for point in record.points], float) for record in records]
    losses = [np.array([point.train for point in record.points]) for record in records]
    grid = np.linspace(0.0, min(place[-1] for place in places), _POINTS)
    values = np.stack([np.interp(grid, place, loss) for place, loss in zip(places, losses, strict=True)])
    return grid, values.min(0), np.median(values, 0), values.max(0)
