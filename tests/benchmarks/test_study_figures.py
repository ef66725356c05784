"""Figures: what they show, that nothing is cut off or hidden, and that they hold from one method to thirty."""

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from made_up import diverged, record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import figures
from benchmarks.answers import trials
from benchmarks.methods import METHODS
from benchmarks.sections import sections
from curvlib.analysis.figures import as_svg


def study(count, **more):
    """Runs of a number of methods, the last of which are from elsewhere."""
    names = [*METHODS, *(f"some_module.of_somebody:Optimizer{place}" for place in range(30))][:count]
    return [
        record(name, seed, (2.3, 0.9 + place / 40, 0.02 * (1 + place)), metric=(0.1, 0.8, 0.99 - place / 100), **more)
        for place, name in enumerate(names)
        for seed in (0, 1)
    ]


def tuning(count):
    return [
        record(
            name,
            100,
            (2.3, 0.01 * (1 + place + abs(math.log10(lr / 0.1)))),
            settings={"lr": lr, "damping": damping, "eps": eps},
        )
        for place, name in enumerate([*METHODS][:count])
        for lr in (0.01, 0.1, 1.0)
        for damping, eps in ((3e-7, 1e-12), (3.0, 1e-3))
    ]


def shown(figure):
    """All text that can be seen; ticks outside the limits are not drawn, but keep a place."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_visible()]
    return [text for text in texts if text.get_text()]


def whole(figure: Figure) -> None:
    """Nothing is cut off, and no legend entry or axis label lies on another."""
    FigureCanvasAgg(figure).draw()
    page = figure.bbox
    for text in shown(figure):
        box = text.get_window_extent(figure.canvas.get_renderer())
        assert page.x0 - 1 <= box.x0, text
        assert box.x1 <= page.x1 + 1, text
        assert page.y0 - 1 <= box.y0, text
        assert box.y1 <= page.y1 + 1, text
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        for place, axis in enumerate((axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            ticks = [
                tick for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if low <= tick.get_loc() <= high
            ]
            seen = [tick.label1 for tick in ticks if tick.label1.get_visible() and tick.label1.get_text()]
            spans = sorted((*text.get_window_extent(renderer).get_points()[:, place], text.get_text()) for text in seen)
            assert all(before[1] < after[0] for before, after in pairwise(spans)), spans
    labels = [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label) if label.get_text()]
    extents = [label.get_window_extent(renderer) for label in labels]
    for legend in figure.legends:
        extents += [text.get_window_extent(renderer) for text in legend.get_texts()]
        extents += [axes.get_window_extent(renderer) for axes in figure.axes if axes.axison]
    for place, one in enumerate(extents):
        for other in extents[place + 1 :]:
            assert not one.padded(-1).overlaps(other.padded(-1))


@pytest.mark.parametrize("count", [1, 6, 30])
def test_nothing_is_cut_off_or_hidden(count):
    (section,) = sections(study(count))
    whole(figures.curves(section))
    whole(figures.profile([section]))
    whole(figures.steps(section))
    (tried,) = sections(tuning(count))
    whole(figures.best_of_k(tried, trials(tried)))
    whole(figures.sensitivities(tried, trials(tried)))


def test_curves_have_the_colours_of_methods_and_a_legend_in_the_order_of_success():
    (section,) = sections(study(3))
    figure = figures.curves(section)
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["training loss", "held-out loss", "accuracy"]
    drawn = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    first = list(METHODS.values())[:3]
    assert all(drawn[method.title] == (method.colour, method.dash) for method in first)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [method.title for method in first]
    # The target of this problem is a training loss: a line and its name there alone.
    assert ["target" in [text.get_text() for text in axes.texts] for axes in figure.axes] == [False, True, *[False] * 4]


@pytest.mark.parametrize(("train", "mark"), [((3.0, 2.5, 2.0), "target ↓"), ((0.05, 0.04, 0.03), "target ↑")])
def test_a_target_far_from_all_curves_is_pointed_at(train, mark, recwarn):
    (section,) = sections([record("mbf", seed, train) for seed in (0, 1)])
    figure = figures.curves(section)
    whole(figure)
    assert not recwarn.list  # such as of a layout that collapsed
    (text,) = figure.axes[1].texts
    assert text.get_text() == mark
    for axes in figure.axes:
        assert axes.get_window_extent().height > 100


def test_a_curve_that_explodes_does_not_flatten_the_others():
    (section,) = sections([*study(2), record("its.own:Wild", 0, (2.3, 1e8, 1e12)), diverged("its.own:Lost")])
    low, high = figures.curves(section).axes[0].get_ylim()
    assert 0.001 < low < 0.02
    assert 2.3 < high < 5


@pytest.mark.parametrize(
    "records",
    [
        [diverged("adam"), diverged("mbf", 1)],
        [record(train=(3.0,))],
        [record(train=(0.0, 0.0, 0.0))],
        [record(train=(-1.0, -2.0, -3.0))],
        [record(metric=(math.nan, 0.5, math.nan))],
        [record(parts={}, memory=0)],
    ],
)
def test_odd_runs_can_be_drawn(records, tmp_path):
    (section,) = sections(records)
    figures.save(figures.curves(section), tmp_path / "curves")
    steps = figures.steps(section)
    assert (steps is None) == all(sum(one.parts.values()) == 0 for one in records)
    hits = any(point.train <= 0.1 for one in records for point in one.points)
    assert (figures.profile([section]) is not None) == hits
    assert figures.best_of_k(section, trials(section)) is None
    assert figures.sensitivities(section, trials(section)) is None


def test_files_are_of_their_kind_and_the_same_twice(tmp_path):
    for name in ("first", "second"):
        figures.save(figures.steps(sections(study(2))[0]), tmp_path / name)
    for form, magic in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        first, second = ((tmp_path / f"{name}.{form}").read_bytes() for name in ("first", "second"))
        assert first.startswith(magic)
        assert first == second
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first.pdf", "first.png", "second.pdf", "second.png"]


def test_an_svg_is_well_formed():
    text = as_svg(figures.profile(sections(study(2))))
    assert ElementTree.fromstring(text).tag.endswith("svg")


def test_bars_add_up_to_the_step():
    (section,) = sections(study(2))
    figure = figures.steps(section)
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert sum(widths) == pytest.approx(2 * 1e3 * 0.1)
