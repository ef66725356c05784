"""Tables of a terminal: nothing is cut at any width, and what tuning chose is shown."""

from __future__ import annotations

import io
import re

import pytest
from made_up import diverged, record
from rich.console import Console

from benchmarks.compare import compare
from benchmarks.records import Results
from benchmarks.study import Chosen
from benchmarks.summary import how_chosen
from benchmarks.terminal import Strip, show, show_table

NAMES = ("mbf", "full-adagrad", "pytorch_optimizer:ScheduleFreeAdamW", "adam")


def study():
    return [
        record(
            name, seed, (3, 0.5, 0.123456 + seed / 100), metric=(0.1, 0.9, 0.97), settings={"lr": 1e-4, "damping": 0.1}
        )
        for name in NAMES
        for seed in range(3)
    ] + [diverged("sgd", metric=(0.1, 0.2), settings={"lr": 1.0})]


CHOSEN = [
    Chosen("digits-cnn", "mbf", {"lr": 1e-4, "damping": 0.1}, 10, 0, ("damping",)),
    Chosen("digits-cnn", "adam", {"lr": 1e-4}, 10, 0, ()),
    Chosen("digits-cnn", "muon", None, 10, 0, ()),
    Chosen("elsewhere", "lion", None, 10, 0, ()),
]


def shown(width):
    console = Console(record=True, width=width, file=io.StringIO())
    show(study(), console, "A study", CHOSEN)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_nothing_is_cut_and_no_word_or_number_is_broken(width):
    text = shown(width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for word in (
        "chunks",
        "pytorch_optimizer:ScheduleFreeAdamW",
        "(0.1235",
        "0.1435)",
        "damping=0.1,",
        "Accuracy",
        "diverged)",
    ):
        assert word in text
    for heading in ("Training loss", "Held-out loss", "Time to target", "Adam would need", "State", "Peak"):
        assert all(word in text for word in heading.split())


def test_wide_terminals_have_one_table():
    rows = [line for line in shown(200).splitlines() if line.startswith("│ MBF ")]
    assert len(rows) == 2  # of results, and of settings
    assert len([line for line in shown(80).splitlines() if line.startswith("│ MBF ")]) > 3


def test_what_tuning_chose_is_shown_and_where_it_ended_too_early():
    text = shown(200)
    assert re.search(
        r"│ MBF +│ damping=0.1, lr=0.0001 +│ best of 10 trials; damping at the end of what was tried +│", text
    )
    assert re.search(r"│ Adam +│ damping=0.1, lr=0.0001 +│ best of 10 trials +│", text)
    assert re.search(r"│ SGD-m +│ lr=1 +│ +│", text)
    assert re.search(r"│ Muon +│ – +│ none of 10 trials finished +│", text)
    assert "Lion" not in text


def test_where_nothing_was_searched_nothing_was_chosen():
    ends = [({}, 1, 0, ()), (None, 1, 0, ()), (None, 3, 1, ())]
    assert [how_chosen(Chosen("digits-cnn", "adam", *end)) for end in ends] == [
        "nothing to choose",
        "none of 1 trial finished",
        "the search is not over",
    ]


def test_a_median_that_diverged_is_called_so():
    (row,) = [line for line in shown(200).splitlines() if line.startswith("│ SGD-m") and "1 (1" in line]
    assert row.count("diverged") == 4
    assert "−∞" not in row


@pytest.mark.parametrize("width", [40, 80, 120])
def test_any_table_fits(width):
    strips = [Strip("Name", ["a name of several parts", "x" * 30], words=True, left=True)]
    strips += [Strip(f"Column {place}", ["1.234 (1.000 to 1.500)"[: 5 + place]] * 2) for place in range(9)]
    strips.append(Strip("Text", ["word " * 30] * 2, words=True, left=True))
    console = Console(record=True, width=width, file=io.StringIO())
    show_table(strips, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert len(re.findall("word", text[text.rindex("Text") :])) == 60
    assert all("1.234 (1.000 to 1.500)"[: 5 + place] in text for place in range(9))


def test_folders_are_compared_in_tables_of_runs_and_of_trials(tmp_path):
    for name, pace in (("old", 0.1), ("new", 0.2)):
        for one in (record("mbf", pace=pace), record("mbf", 100, settings={"lr": 0.3}, purpose="tuning", pace=pace)):
            Results(tmp_path / name).add(one)
    console = Console(record=True, width=80, file=io.StringIO())
    compare(tmp_path / "old", tmp_path / "new", console)
    text = console.export_text()
    titles = [line for line in text.splitlines() if line.startswith("Small CNN on digits")]
    assert titles == ["Small CNN on digits, 5 epochs", "Small CNN on digits, 5 epochs, trials of tuning"]
    assert len(re.findall(r"│ MBF +│ +1 │ +1 │", text)) == 2
    assert "lr=" not in text
