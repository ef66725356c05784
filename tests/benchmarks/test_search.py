"""Searches: functions of what was tried, with the same budget for everybody."""

from __future__ import annotations

import importlib.util
import math

import pytest

from benchmarks.methods import METHODS
from benchmarks.records import Point
from benchmarks.search import (
    SEARCHES,
    SearchError,
    Trial,
    best,
    grid,
    open_ends,
    optuna_watch,
    quasi_random,
    score_of,
)
from benchmarks.space import Choice, Range, dimension

LR = Range(1e-4, 1e-1)


def searched(propose, space, loss, trials):
    """All that a search tries of a function of settings."""
    tried = []
    while proposed := propose(space, tried, trials):
        tried += [Trial(settings, loss(**settings)) for settings in proposed]
    return tried


def distance(value, target):
    return abs(math.log10(value / target))


@pytest.mark.parametrize("name", SEARCHES)
def test_where_there_is_nothing_to_choose_there_is_one_trial(name):
    assert searched(SEARCHES[name], {}, lambda: 1.0, 12) == [Trial({}, 1.0)]


def test_the_grid_is_that_of_the_papers():
    assert [LR.grid(place) for place in range(-4, 5)] == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
    assert [Range(0.0, 1.0, "linear").grid(place) for place in range(-3, 4)] == [None, 0.0, 0.25, 0.5, 0.75, 1.0, None]
    assert [Choice((1, 2, 3)).grid(place) for place in range(-2, 3)] == [None, 1, 2, 3, None]


@pytest.mark.parametrize("target", [1e-7, 3e-3, 1e2])
def test_a_grid_goes_on_beyond_its_ends_until_the_best_is_interior(target):
    space = {"lr": LR}
    tried = searched(grid, space, lambda lr: distance(lr, target), 14)
    assert best(tried).settings["lr"] == target
    assert open_ends(space, tried) == []
    assert open_ends(space, tried[:3]) == ([] if target == 3e-3 else ["lr"])


def test_a_grid_looks_at_every_dimension_and_spends_the_budget():
    space = {"lr": LR, "damping": Range(1e-3, 1.0), "eps": Choice((1e-8, 1e-4))}
    tried = searched(
        grid, space, lambda lr, damping, eps: distance(lr, 1e-2) + distance(damping, 1.0) + (eps == 1e-4), 20
    )
    assert len(tried) == 20
    assert len({tuple(trial.settings.values()) for trial in tried}) == 20
    assert best(tried).settings == {"lr": 1e-2, "damping": 1.0, "eps": 1e-8}
    assert open_ends(space, tried) == []


def test_a_grid_of_choices_ends():
    tried = searched(grid, {"a": Choice((1, 2)), "b": Choice(("x", "y", "z"))}, lambda a, b: a, 50)
    assert len(tried) == 6


def test_where_all_diverge_the_grid_goes_both_ways():
    tried = searched(grid, {"lr": LR}, lambda lr: 1.0 if lr <= 1e-6 else math.inf, 16)
    assert best(tried).settings["lr"] <= 1e-6


def test_nothing_wins_that_diverged_or_was_given_up():
    assert best([Trial({}, math.inf), Trial({}, 0.1, pruned=True)]) is None


def test_a_prefix_of_a_quasi_random_search_is_a_search():
    space = {"lr": LR, "momentum": Range(0.0, 1.0, "linear"), "nesterov": Choice((False, True))}
    few, many = quasi_random(space, [], 8), quasi_random(space, [], 32)
    assert many[:8] == few
    assert quasi_random(space, [Trial(one, 0.0) for one in few], 32) == many[8:]
    halves = [sum(one["lr"] < math.sqrt(1e-5) for one in many[start : start + 8]) for start in range(0, 32, 8)]
    assert halves == [4, 4, 4, 4]  # every eighth of the sequence fills the space evenly
    assert all(1e-4 <= one["lr"] <= 1e-1 for one in many)


@pytest.mark.parametrize("name", ["grid", "random"])
def test_a_search_is_a_function_of_what_was_tried(name):
    propose, space = SEARCHES[name], {"lr": LR, "damping": Range(1e-2, 1.0)}
    tried = searched(propose, space, lambda lr, damping: distance(lr, 1e-3) + damping, 10)
    assert len(tried) == 10
    for number in range(10):
        assert propose(space, tried[:number], 10)[0] == tried[number].settings


def test_without_optuna_the_way_out_is_named():
    if importlib.util.find_spec("optuna") is not None:
        pytest.skip("Optuna is installed")
    with pytest.raises(SearchError, match=r"pip install 'curvlib\[tune\]', or take search = 'grid'"):
        SEARCHES["optuna"]({"lr": LR}, [], 3)


def test_optuna_searches_resumes_and_gives_up():
    pytest.importorskip("optuna")
    space = {"lr": LR, "nesterov": Choice((False, True))}
    propose = SEARCHES["optuna"]
    tried = searched(propose, space, lambda lr, nesterov: distance(lr, 1e-3) + nesterov, 15)
    assert propose(space, tried[:12], 15) == [dict(tried[12].settings)]
    assert distance(best(tried).settings["lr"], 1e-3) < 0.5
    earlier = [Trial({"lr": 1e-3, "nesterov": False}, 1.0, curve={1: 2.0, 2: 1.0})] * 6
    for loss, gives_up in ((9.0, True), (0.5, False)):
        watch = optuna_watch(space, earlier, score_of("train", "lower"))
        assert watch(Point(1, 0.0, loss, loss)) is gives_up


def test_scores_are_minimised():
    point = Point(1, 0.0, 1.0, 2.0, 0.75)
    values = {("train", "lower"): 1.0, ("test", "lower"): 2.0, ("metric", "higher"): -0.75, ("metric", "lower"): 0.75}
    assert {given: score_of(*given)(point) for given in values} == values
    assert score_of("test", "lower")(Point(1, 0.0, 1.0, math.nan)) == math.inf


def test_dimensions_are_read_as_a_study_file_has_them():
    assert dimension({"low": 1, "high": 10}) == Range(1.0, 10.0)
    assert dimension([1, [2, 3]]) == Choice((1, (2, 3)))
    for wrong in ({"low": 1}, {"low": 1, "high": "x"}, {"low": 2, "high": 1}, {"low": 0, "high": 1}, 3, "x", []):
        with pytest.raises(ValueError, match=r"low|list"):
            dimension(wrong)


def test_every_named_method_has_a_space_of_settings_that_it_takes():
    from torch import nn

    for method in METHODS.values():
        assert 1 <= len(method.space) <= 3
        settings = {name: one.grid(0) for name, one in method.space.items()}
        method.optimizer(nn.Linear(3, 2), settings)
