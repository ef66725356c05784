"""Answers against brute force and numbers computed by hand."""

import itertools
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import diverged, record

from benchmarks import answers, scaling
from benchmarks.intervals import UNKNOWN, median_interval
from benchmarks.problems import PROBLEMS
from benchmarks.sections import band, sections

costs = st.one_of(st.floats(0.1, 1e3), st.just(math.inf))


def brute_interval(values, level):
    medians = sorted(statistics.median(sample) for sample in itertools.product(values, repeat=len(values)))
    tail = (1 - level) / 2
    total = len(medians)
    low = next(x for place, x in enumerate(medians, 1) if place / total >= tail - 1e-12)
    high = next(x for place, x in enumerate(medians, 1) if place / total >= 1 - tail - 1e-12)
    return statistics.median(values), low, high


@given(
    st.lists(st.one_of(st.integers(0, 9).map(float), st.just(math.inf)), min_size=1, max_size=5), st.floats(0.3, 0.97)
)
def test_the_bootstrap_is_that_of_all_resamples(values, level):
    found = median_interval(values, level)
    assert (found.middle, found.low, found.high) == brute_interval(values, level)


@given(st.lists(costs, min_size=1, max_size=30))
def test_an_interval_lies_in_the_sample_around_its_median(values):
    found = median_interval(values)
    assert min(values) <= found.low <= found.middle <= found.high <= max(values)
    assert found == median_interval(values[::-1])
    assert found.middle == pytest.approx(statistics.median(values))


def test_misses_take_part_in_medians_and_reach_into_intervals():
    assert median_interval([1.0, 2.0, math.inf]).middle == 2.0
    assert median_interval([1.0, 2.0, math.inf]).high == math.inf
    assert median_interval([1.0, math.inf]).middle == math.inf
    assert median_interval([-math.inf, 0.5, 0.7]).low == -math.inf
    assert median_interval([]) is UNKNOWN
    with pytest.raises(ValueError, match=r"must not be NaN, got \[nan\]"):
        median_interval([math.nan])


def one(records):
    (section,) = sections(records)
    return section


def test_targets_are_reached_at_the_first_evaluation_there():
    section = one([record(train=(3, 0.5, 0.09, 0.2, 0.01)), record(seed=1, train=(3, 0.5, 0.4, 0.3, 0.2))])
    problem = PROBLEMS["digits-cnn"]
    first, second = section.entries[0].records
    assert answers.hit(first, problem) == (20, 2.0)
    assert answers.hit(second, problem) == (math.inf, math.inf)
    steps, seconds = answers.to_target(section.entries[0], problem)
    assert (steps.low, steps.middle, seconds.low, seconds.high) == (20, math.inf, 2.0, math.inf)
    assert answers.to_target(section.entries[0], None) == (UNKNOWN, UNKNOWN)


def test_a_run_that_diverged_after_the_target_has_reached_it_and_still_ends_worst():
    entry = one([record(train=(3, 0.05, math.nan), status="diverged")]).entries[0]
    assert answers.to_target(entry, PROBLEMS["digits-cnn"])[0].middle == 10
    assert answers.finals(entry, one([diverged()]).quantities[0]).middle == math.inf


@given(
    st.lists(
        st.lists(st.sampled_from([1.0, 2, 3, 5, 6, 12, 40, math.inf]), min_size=3, max_size=3), min_size=1, max_size=5
    )
)
def test_scores_are_integrals_of_shares(table):
    found = answers.profiles({str(place): row for place, row in enumerate(table)})
    grid = np.linspace(1, 4, 30001)
    least = [min(column) for column in zip(*table, strict=True)]
    for place, row in enumerate(table):
        profile = found[str(place)]
        for tau in (1, 2, 4):
            solved = [cost <= tau * best and cost < math.inf for cost, best in zip(row, least, strict=True)]
            assert profile.share(tau) == pytest.approx(np.mean(solved))
        assert profile.score() == pytest.approx((np.array(profile.ratios)[:, None] <= grid).mean(), abs=1e-3)


def test_a_profile_by_hand():
    found = answers.profiles({"a": [1.0, 4.0, math.inf], "b": [2.0, 2.0, math.inf]})
    assert found["a"].ratios == (1.0, 2.0, math.inf)
    assert found["a"].score() == pytest.approx((3 + 2 + 0) / 9)
    assert found["b"].share(1.0) == pytest.approx(1 / 3)


def test_what_was_not_run_is_missed_in_the_profile():
    elsewhere = record("mbf", train=(40, 19, 18), problem="digits-autoencoder")
    found = sections([record("mbf", train=(3, 0.05, 0.01)), record("adam", train=(3, 1, 0.05)), elsewhere])
    assert answers.costs(found, "step") == {"MBF": [10, 10], "Adam": [math.inf, 20]}


@given(st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=6), st.sampled_from(["lower", "higher"]))
def test_best_of_k_is_the_mean_over_all_orders(values, better):
    best = min if better == "lower" else max
    for k, found in enumerate(answers.best_of(values, better), start=1):
        ends = sorted(best(order[:k]) for order in itertools.permutations(values))
        assert found.expected == pytest.approx(statistics.fmean(ends))
        # A quartile lies where a quarter of all orders is not above it.
        assert sum(end <= found.low for end in ends) >= len(ends) / 4
        assert sum(end < found.low for end in ends) <= len(ends) / 4 or better == "higher"
        assert sum(end >= found.high for end in ends) >= len(ends) / 4


def test_best_of_k_with_trials_that_are_lost():
    found = answers.best_of([math.inf, 1.0, 3.0])
    assert [best.expected for best in found] == [math.inf, pytest.approx(5 / 3), 1.0]
    assert answers.best_of([-math.inf, 1.0], "higher")[0].expected == -math.inf


def test_trials_are_medians_over_tuning_seeds_and_no_worse_than_no_training():
    tuned = [
        record("sgd", 100, (3, 0.4), settings={"lr": 0.1}),
        record("sgd", 101, (3, 0.6), settings={"lr": 0.1}),
        diverged("sgd", 100, settings={"lr": 1.0}),
        record("sgd", 101, (3, 50.0), settings={"lr": 1.0}),
    ]
    found = answers.trials(one(tuned))["sgd"]
    assert [(trial.settings["lr"], trial.value, trial.lost) for trial in found] == [(0.1, 0.5, 0), (1.0, 3.0, 1)]


def test_sensitivity_sorts_values_and_leaves_out_what_is_no_number():
    tried = [
        answers.Trial({"lr": 0.1, "nesterov": True, "damping": 1e-3}, 2.0),
        answers.Trial({"lr": 0.01, "nesterov": False, "damping": 1e-3}, 3.0),
        answers.Trial({"lr": 0.1, "nesterov": False, "beta": 0.9}, 1.0),
    ]
    assert answers.varied(tried) == ["lr"]
    assert answers.sensitivity(tried, "lr") == {0.01: [3.0], 0.1: [2.0, 1.0]}


def test_parts_of_a_step_add_up_over_runs_of_different_lengths():
    entry = one([record(), record(seed=1, train=(3, 2, 1, 0.5))]).entries[0]
    parts = answers.breakdown(entry)
    assert parts == {"forward and backward": pytest.approx(0.075), "statistics": pytest.approx(0.025)}


@given(st.floats(0.5, 50), st.floats(0.1, 3), st.floats(0, 2), st.floats(10, 1e4))
def test_power_laws_are_found_again(a, b, c, length):
    places = np.linspace(0.1, 1, 60) * length
    values = a * (places / length) ** -b + c
    law = scaling.fit(places, values)
    assert law.error < 1e-5
    reached = a * 3**-b + c
    assert law.place(reached) == pytest.approx(3 * length, rel=0.05)


def test_inside_adams_curve_nothing_is_fitted():
    places, values = np.array([0.0, 10.0, 20.0]), np.array([4.0, 2.0, 1.0])
    assert scaling.at(places, values, 1.5, 5.0) == scaling.Longer(3.0, "measured")
    assert scaling.at(places, values, 5.0, 5.0).factor == 0.0
    assert scaling.at(places, values, 0.5, 5.0) == scaling.Longer(4.0, "more than")


def test_beyond_adams_curve_the_fit_answers_and_says_so():
    places = np.linspace(1, 100, 200)
    law = 5 * places**-0.5 + 0.1
    assert scaling.at(places, law, 5 * 250**-0.5 + 0.1, 50.0) == scaling.Longer(pytest.approx(5.0, rel=1e-3), "fit")
    assert scaling.at(places, law, 0.05, 50.0) == scaling.Longer(20.0, "more than")
    assert scaling.Longer(2.0, "fit").text == "2× (fit)"
    assert scaling.Longer(20.0, "more than").text == "> 20×"
    assert scaling.fit(places, np.full(200, 2.0)) is None
    assert scaling.fit(places[:4], law[:4]) is None


def test_adam_needs_as_long_as_adam():
    section = one([record(seed=seed, train=(3, 2, 1 + seed / 10)) for seed in range(3)])
    adam = answers.reference(section)
    assert scaling.longer(adam, adam, section.judged, "step") == scaling.Longer(pytest.approx(1.0), "measured")
    lost = one([diverged("mbf")]).entries[0]
    assert scaling.longer(adam, lost, section.judged, "step").text == "–"


def test_of_several_adams_the_best_is_the_reference():
    section = one([record(train=(3, 2), settings={"lr": 0.1}), record(train=(3, 1), settings={"lr": 0.2})])
    assert answers.reference(section).title == "Adam (lr=0.2)"


def test_adam_is_known_by_what_it_is():
    names = ("Mine=adam", "mbf", "torch.optim:NAdam", "torch.optim:SGD")
    assert answers.reference(one([record(name) for name in names])).title == "Mine"
    assert answers.reference(one([record(name) for name in names[1:]])) is None


def test_step_times_are_paired_by_seed():
    section = one(
        [
            record(pace=0.1),
            record(seed=1, pace=0.4),
            record("mbf", pace=0.2),
            record("mbf", 1, pace=0.4),
            record("mbf", 2),
        ]
    )
    mbf, adam = section.entries
    assert answers.paired(mbf, adam).middle == pytest.approx(1.5)


def test_bands_end_where_a_run_does_and_runs_that_diverge_are_worst():
    section = one([record(train=(4, 2, 1)), record(seed=1, train=(2, 1)), diverged(seed=2)])
    place, low, middle, high = band(section.entries[0].records, section.quantities[0], "step", 11)
    assert place[-1] == 10
    assert (low[-1], middle[-1], high[-1]) == (1.0, 2.0, math.inf)
    assert np.isfinite(high[0])


def test_sections_are_problems_and_budgets_and_variants_are_told_apart():
    found = sections(
        [
            record(settings={"lr": 0.1, "eps": 1e-8}),
            record(settings={"lr": 0.1, "eps": 1e-8}),
            record(settings={"lr": 0.2, "eps": 1e-8}),
            record(budget={"epochs": 40}),
            record(budget={"epochs": 1}),
            record(budget={"seconds": 2.5}),
            record("its.own:Method", problem="elsewhere"),
            replace(record(), points=()),
        ]
    )
    assert [(section.name, section.title) for section in found] == [
        ("digits-cnn-1-epoch", "Small CNN on digits, 1 epoch"),
        ("digits-cnn-5-epochs", "Small CNN on digits, 5 epochs"),
        ("digits-cnn-40-epochs", "Small CNN on digits, 40 epochs"),
        ("digits-cnn-2.5-seconds", "Small CNN on digits, 2.5 seconds"),
        ("elsewhere", "elsewhere"),
    ]
    first = found[1].entries
    assert [(entry.title, len(entry.records)) for entry in first] == [("Adam (lr=0.1)", 1), ("Adam (lr=0.2)", 1)]
    assert first[0].colour != first[1].colour
    assert found[4].goal == ""


def test_every_method_looks_the_same_on_a_page_and_outside_ones_differ():
    names = [f"a.module:Class{place}" for place in range(20)]
    reports = [record(name) for name in names[:10]]
    tuning = [record(name, 100, settings={"lr": lr}) for name in names for lr in (0.1, 0.2)]
    looks = {entry.method: (entry.colour, entry.dash) for entry in one(tuning).entries[::-1]}
    beside = {entry.method: (entry.colour, entry.dash) for entry in sections(reports, tuning)[0].entries}
    assert len(set(beside.values())) == 10
    assert all(looks[name] == look for name, look in beside.items())
