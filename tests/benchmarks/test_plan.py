"""Budgets and schedules: what is said most closely holds; runs follow it, and records tell it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plan import Budget, Schedule, StudyError, closest
from benchmarks.records import Results, Spec
from benchmarks.runner import execute
from benchmarks.sections import sections
from benchmarks.study import Study
from tests.benchmarks.made_up import record
from tests.benchmarks.tiny import tiny_data

pytestmark = pytest.mark.usefixtures("tiny")


def test_the_closest_word_counts():
    table = {("p", "m"): "both", "m": "method", "p": "problem"}
    assert closest("all", table, "p", "m") == "both"
    assert closest("all", table, "q", "m") == "method"
    assert closest("all", table, "p", "n") == "problem"
    assert closest("all", table, "q", "n") == "all"
    assert closest(None, {}, "q", "n") is None


def test_step_sizes_fall_at_whole_epochs_however_they_are_rounded():
    for epochs, every in ((200, 60), (150, 50), (100, 40), (7, 1)):
        schedule, steps = Schedule(0.1, every), 391 * epochs
        for count in range(1, epochs // every + 1):
            place = count * every * 391
            assert schedule.after(place / steps * epochs) == pytest.approx(0.1**count)
            assert schedule.after((place - 1) / steps * epochs) == pytest.approx(0.1 ** (count - 1))
    assert Schedule(1, 5).after(17.0) == 1.0


@pytest.mark.parametrize("wrong", [(0, 1), (0.1, 0), (0.1, float("inf")), ("a", 1)])
def test_schedules_that_cannot_be_are_named(wrong):
    with pytest.raises(StudyError, match=r"schedule\.(factor|every) must be a finite number above 0, got"):
        Schedule(*wrong)


def test_a_run_follows_its_schedule_and_a_stopped_one_too(tmp_path, monkeypatch):
    seen, step = [], torch.optim.SGD.step

    def watched(self, closure=None):
        seen.append(self.param_groups[0]["lr"])
        return step(self, closure)

    def interrupt(*_):
        if len(seen) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    spec = Spec("tiny", "torch.optim:SGD", {"lr": 0.5}, 0, epochs=3, schedule={"factor": 0.1, "every": 1})
    with pytest.raises(KeyboardInterrupt):
        execute(spec, tiny_data(), Results(tmp_path), interrupt)
    execute(spec, tiny_data(), Results(tmp_path))
    assert seen == pytest.approx([0.5] * 4 + [0.05] * 4 + [0.005] * 4)
    assert Results(tmp_path).known(spec).spec == spec


def test_methods_of_a_study_may_have_their_own(tmp_path):
    study = Study(
        "",
        ("tiny", "digits-cnn"),
        ("mbf", "Ours=adam"),
        (0,),
        Budget(epochs=4),
        {"Ours": Budget(epochs=6), ("tiny", "mbf"): Budget(steps=9)},
        schedules={"tiny": Schedule(0.1, 2)},
    )
    found = {(spec.problem, spec.method): (spec.budget, spec.schedule) for spec in study.wanted(Results(tmp_path))}
    assert found == {
        ("tiny", "mbf"): ("9 steps", {"factor": 0.1, "every": 2}),
        ("tiny", "Ours=adam"): ("6 epochs", {"factor": 0.1, "every": 2}),
        ("digits-cnn", "mbf"): ("4 epochs", None),
        ("digits-cnn", "Ours=adam"): ("6 epochs", None),
    }


def test_methods_with_their_own_budgets_are_compared_and_budgets_of_one_method_are_not_mixed():
    mine = [record("sgd", budget={"epochs": 200}), record("adam", budget={"epochs": 200})]
    mine += [record("mbf", budget={"epochs": 150}), record("mbf", 1, budget={"epochs": 150})]
    (section,) = sections(mine)
    assert section.budget == "150 epochs (MBF), 200 epochs (Adam, SGD-m)"
    assert (section.name, len(section.entries)) == ("digits-cnn", 3)
    found = sections([*mine, record("adam", budget={"epochs": 150})])
    assert [(one.name, len(one.entries)) for one in found] == [
        ("digits-cnn-150-epochs", 2),
        ("digits-cnn-200-epochs", 2),
    ]


def test_runs_of_different_schedules_are_different_entries():
    slow, fast = (record(settings={"lr": 0.1}, schedule=s) for s in ({"factor": 0.1, "every": 2}, None))
    (section,) = sections([slow, fast])
    assert [entry.title for entry in section.entries] == ["Adam (schedule=× 0.1 every 2 epochs)", "Adam (defaults)"]
