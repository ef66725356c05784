"""Figures show what was computed."""

from __future__ import annotations

import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlib.analysis import Comparison, Objective, compare, fisher
from curvlib.analysis.family import FAMILIES

figures = pytest.importorskip("curvlib.analysis.figures", reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    return Objective(model, F.cross_entropy, torch.randn(50, 6), torch.randint(0, 3, (50,)), dtype=torch.float64)


@pytest.fixture(scope="module")
def comparison(objective):
    structures = {"all": "| ...", "neurons": "o | i", "inputs": "i | o", "diagonal": "... |", "tiles": "| o/2 i/2"}
    return compare(objective, structures, damping=[0.1, 1.0], of="0.weight", repeats=1)


def test_the_map_outlines_blocks_and_says_how_much_they_hold(objective):
    figure = figures.inverse_map(objective, "0.weight", {"neurons": "o | i", "inputs": "i | o"}, damping=0.5)
    matrix = fisher(objective, "data", "0.weight")
    inverse = torch.linalg.inv(matrix + 0.5 * matrix.trace() / 24 * torch.eye(24, dtype=torch.float64))
    off = inverse.square() - inverse.square().diag().diag()
    neuron, feature = torch.arange(24) // 6, torch.arange(24) % 6
    for axes, labels, blocks in zip(figure.axes, (neuron, feature), (4, 6), strict=False):
        inside = labels[:, None] == labels[None, :]
        share, mass = (inside.sum() - 24) / (24 * 23), (off * inside).sum() / off.sum()
        assert f"{share:.1%} of the entries, {mass:.0%} of their squares" in axes.get_title()
        assert len(axes.patches) == blocks
        assert axes.get_xlabel() == axes.get_ylabel() == "weight"
        shown = torch.as_tensor(axes.images[0].get_array())
        order = labels.argsort(stable=True)
        wanted = (inverse.abs() / inverse.abs().max())[order][:, order].clamp_min(1e-4).log10()
        assert torch.allclose(shown, wanted)
    with pytest.raises(ValueError, match=r"a map is of one weight, got 0\.weight and 1 more"):
        figures.inverse_map(objective, "0", {"neurons": "o | i"})


def test_spectra_are_sorted_eigenvalues_over_the_largest_exact_one(objective):
    figure = figures.spectra(objective, "0.weight", {"neurons": "o | i", "all": "| ..."})
    exact = torch.linalg.eigvalsh(fisher(objective, of="0.weight")).flip(0)
    lines = {line.get_label(): torch.as_tensor(line.get_ydata()) for line in figure.axes[0].lines}
    assert list(lines) == ["exact", "neurons", "all"]
    assert torch.allclose(lines["exact"], (exact / exact[0]).clamp_min(1e-12))
    assert torch.allclose(lines["all"], lines["exact"], atol=1e-12)
    assert (lines["neurons"].diff() <= 0).all()


def front(rows, cost, error):
    """Names that no other row beats in both respects."""
    return {
        row.approximation
        for row in rows
        if not any(
            cost(other) <= cost(row)
            and error(other) <= error(row)
            and (cost(other), error(other)) != (cost(row), error(row))
            for other in rows
        )
    }


def test_the_front_is_what_nothing_beats(comparison):
    rows = comparison.select(damping=0.1).rows
    places = {row.approximation: (row.statistics_bytes + row.roots_bytes, row.inverse_frobenius) for row in rows}
    assert set(figures._front(places, larger=False)) == front(
        rows, lambda row: places[row.approximation][0], lambda row: row.inverse_frobenius
    )
    negative = {name: (x, -y) for name, (x, y) in places.items()}
    assert figures._front(negative, larger=True) == figures._front(places, larger=False)


def test_every_structure_has_its_own_colour_and_marker(comparison):
    assert set(figures.STYLES) == set(FAMILIES)
    assert len({colour for colour, _ in figures.STYLES.values()}) == len(FAMILIES)
    assert len({marker for _, marker in figures.STYLES.values()}) == len(FAMILIES)
    figure = figures.pareto(comparison, title="Layer")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "diagonal",
        "tiles",
        "per output",
        "per input",
        "full layer",
    ]
    left, right = figure.axes
    assert left.get_xlabel() == "memory of statistics and roots in kB"
    assert right.get_xlabel() == "time of one direction in ms"
    assert "error of the damped inverse" in left.get_ylabel()
    assert "λ = 0.1" in figure.get_suptitle()
    assert "all (exact)" in [text.get_text() for text in left.texts]
    assert len(figures.pareto(comparison, error="cosine", damping=1.0).axes) == 2


def test_a_sweep_has_a_line_for_every_structure(comparison):
    figure = figures.sweep(comparison)
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert set(lines) == {row.approximation for row in comparison}
    assert lines["neurons"] == [row.cosine for row in comparison if row.approximation == "neurons"]


def test_lines_of_one_family_differ_in_their_dashes(comparison):
    twice = Comparison(
        comparison.rows + tuple(replace(row, approximation=f"{row.approximation} again") for row in comparison), ""
    )
    lines = figures.sweep(twice).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 10


def test_svg_is_well_formed_and_always_the_same(comparison):
    text = figures.as_svg(figures.sweep(comparison))
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert text == figures.as_svg(figures.sweep(comparison))


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "curvlib.analysis.figures")
    with pytest.raises(ImportError, match=r"pip install 'curvlib\[study\]'"):
        import curvlib.analysis.figures  # noqa: F401
