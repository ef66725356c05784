"""Studies: what is run, in which order, with which settings; their files, checked to the last key."""

from __future__ import annotations

import dataclasses
import re
from itertools import product
from pathlib import Path

import pytest
from torch import nn

from benchmarks.methods import method
from benchmarks.records import Point, Record, Results
from benchmarks.space import Choice, Range
from benchmarks.study import DIGITS, Budget, Study, StudyError, Tuning
from benchmarks.study_file import read_study, written

STUDIES = Path(__file__).parents[2] / "benchmarks" / "studies"
FULL = """
title = "All \\"of\\" it"
problems = ["tiny", "digits-cnn"]
methods = ["mbf", "Ours=torch.optim:NAdam", "adam"]
seeds = [0, 1]
threads = 2
device = "cpu"

[budget]
epochs = 3

[budget.digits-cnn]
seconds = 1.5

[tuning]
search = "random"
trials = 4
seeds = [100, 101]

[settings.Ours]
betas = [0.9, 0.99]
clip = "none"

[settings.Ours.digits-cnn]
eps = 1e-4

[space.Ours]
lr = { low = 1e-3, high = 1.0 }
weight_decay = [0.0, 1e-2]
"""

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture
def read(tmp_path):
    def read(text):
        file = tmp_path / "study.toml"
        file.write_text(text)
        return read_study(file)

    return read


def finish(results, specs, loss=lambda spec: 1.0, status="finished"):
    for spec in specs:
        points = (Point(0, 0.0, 9.0, 9.0, 9.0), Point(5, 1.0, loss(spec), loss(spec), loss(spec)))
        results.add(Record(spec, status, points, 0.2, 10, {}))


def test_a_file_says_all_that_python_says(read):
    study = read(FULL)
    assert study == Study(
        title='All "of" it',
        problems=("tiny", "digits-cnn"),
        methods=("mbf", "Ours=torch.optim:NAdam", "adam"),
        seeds=(0, 1),
        budget=Budget(epochs=3),
        budgets={"digits-cnn": Budget(seconds=1.5)},
        settings={"Ours": {"betas": [0.9, 0.99], "clip": None, "digits-cnn": {"eps": 1e-4}}},
        spaces={"Ours": {"lr": Range(1e-3, 1.0), "weight_decay": Choice((0.0, 1e-2))}},
        tuning=Tuning("random", 4, (100, 101)),
        threads=2,
    )
    assert read(written(study)) == study
    assert read(written(DIGITS)) == DIGITS


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.toml")), ids=lambda file: file.stem)
def test_the_studies_of_this_project_can_be_made(file):
    study = read_study(file)
    for problem, name in product(study.problems, study.methods):
        settings = study.fixed_for(problem, name)
        settings.pop("warm_start", None)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
        method(name).optimizer(model, settings)


def test_the_page_on_studies_has_a_file_that_works(read):
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    study = read(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    assert study.fixed_for("digits-cnn", "Big eps=adam") == {"eps": 1e-2}
    assert study.fixed_for("digits-cnn", "adam") == {"weight_decay": 1e-4}
    assert set(study.space_for("digits-cnn", "torch.optim:NAdam")) == {"lr", "weight_decay"}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("title =", "titel =", "unknown key 'titel' of a study; did you mean 'title'? there are title, problems"),
        ("trials =", "trails =", "unknown key 'trails' in tuning; did you mean 'trials'?"),
        ("epochs = 3", "epoch = 3", "unknown key 'epoch' in budget; did you mean 'epochs'?"),
        ("epochs = 3", "epochs = 0", "budget.epochs must be a whole number from 1, got 0"),
        ("epochs = 3", "epochs = true", "budget.epochs must be a whole number from 1, got True"),
        ("epochs = 3", "epochs = 3\nsteps = 4", "budget must have one of epochs, steps, seconds, got epochs, steps"),
        ("seconds = 1.5", "seconds = -1", "budget.seconds must be a finite number above 0, got -1"),
        ("[budget.digits-cnn]", "[budget.digits-cn]", "unknown key 'digits-cn' in budget; did you mean 'digits-cnn'?"),
        ("[settings.Ours]", "[settings.Urs]", "unknown key 'Urs' in settings; did you mean 'Ours'?"),
        ("[space.Ours]", "[space.sgd]", "unknown key 'sgd' in space"),
        ("high = 1.0 }", "hi = 1.0 }", "space.Ours.lr: must be a list of values or { low = 1e-4, high = 1e-1"),
        ('"random"', '"rnadom"', "tuning.search is 'rnadom'; did you mean 'random'?"),
        ("[100, 101]", "[1, 100]", "seeds 1 are of tuning and of the report"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds must be different whole numbers from 0"),
        ("seeds = [0, 1]", "seeds = 3", "seeds must be a list, got 3"),
        ("threads = 2", "threads = 0", "threads must be a whole number from 1, got 0"),
        ('device = "cpu"', 'device = "gpu"', "device must be cpu, cuda, cuda:N, mps or xpu, got 'gpu'"),
        ('"digits-cnn"]', '"digits-cn"]', "unknown problem 'digits-cn'; did you mean 'digits-cnn'?"),
        ('"mbf"', '"mfb"', "unknown method 'mfb'; did you mean 'mbf'?"),
        ("optim:NAdam", "optim:NAdm", "module torch.optim has no 'NAdm'; did you mean 'NAdam'?"),
        ("torch.optim:", "torch.optimm:", "there is no module 'torch.optimm'"),
        ("torch.optim:NAdam", "torch.nn:Linear", "is a class, but no torch.optim.Optimizer"),
        ('"mbf"', '"adam"', "methods must be different ones"),
        ('title = "', 'title = 3 # "', "title must be a text, got 3"),
        ("seeds = [0, 1]", "seeds = [0, 1", "Unclosed array"),
        ('problems = ["tiny", "digits-cnn"]', "", "problems is missing"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(read, before, after, words):
    assert before in FULL
    with pytest.raises(StudyError) as caught:
        read(FULL.replace(before, after, 1))
    assert "study.toml: " in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(StudyError, match=r"no\.toml does not exist"):
        read_study(tmp_path / "no.toml")


def test_without_tuning_runs_come_seed_by_seed_with_known_settings(tmp_path):
    study = Study(
        "", ("digits-cnn", "tiny"), ("mbf", "adam"), (0, 1), settings={"adam": {"lr": 3.0, "tiny": {"lr": 4.0}}}
    )
    wanted = study.wanted(Results(tmp_path))
    order = [(spec.problem, spec.seed, spec.method) for spec in wanted]
    assert order == [(p, s, m) for p in study.problems for s in (0, 1) for m in study.methods]
    assert [spec.settings["lr"] for spec in wanted[:2]] == [3e-2, 3.0]
    assert wanted[-1].settings["lr"] == 4.0
    assert (wanted[0].epochs, wanted[-1].epochs) == (15, 5)


@pytest.mark.parametrize("tuning", [None, Tuning("grid", 3)])
def test_slices_are_a_partition(tmp_path, tuning):
    study = Study("", ("digits-cnn", "tiny"), ("mbf", "adam", "sgd"), (0, 1, 2), tuning=tuning)
    whole = study.wanted(Results(tmp_path))
    parts = [study.wanted(Results(tmp_path), part=(number, 4)) for number in range(1, 5)]
    assert sorted(spec.key for part in parts for spec in part) == sorted(spec.key for spec in whole)
    assert all(parts)


def test_tuning_comes_first_and_its_choice_is_reported(tmp_path):
    tuning = Tuning("grid", 5, (100, 101))
    study = Study("", ("tiny",), ("adam", "sgd"), (0, 1, 2), settings={"adam": {"eps": 1e-3}}, tuning=tuning)
    results = Results(tmp_path)
    assert set(study.space_for("tiny", "adam")) == {"lr"}
    assert study.left(results) == {("tiny", "adam"): 13, ("tiny", "sgd"): 13}
    counts = {"tuning": 0, "report": 0}
    while wanted := study.wanted(results):
        for spec in wanted:
            counts[spec.purpose] += 1
            assert (spec.seed in tuning.seeds) == (spec.purpose == "tuning")
        finish(results, wanted, lambda spec: abs(spec.settings["lr"] - 3e-2))
    assert counts == {"tuning": 2 * 5 * 2, "report": 2 * 3}
    reported = [record for record in study.records(results) if record.spec.purpose == "report"]
    assert {record.spec.settings["lr"] for record in reported} == {3e-2}
    assert {record.spec.settings.get("eps") for record in reported} == {1e-3, None}
    assert len(study.records(results)) == 26
    assert [(one.settings, one.trials, one.missing, one.open) for one in study.chosen(results)] == [
        ({"lr": 3e-2}, 5, 0, ()),
        ({"lr": 3e-2}, 5, 0, ()),
    ]
    assert not any(study.left(results).values())
    assert study.wanted(Results(tmp_path)) == []


def test_a_search_goes_on_where_records_end(tmp_path):
    study = Study("", ("tiny",), ("adam",), tuning=Tuning("grid", 6))
    loss = lambda spec: spec.settings["lr"]  # noqa: E731
    one = Results(tmp_path / "one")
    while wanted := study.wanted(one):
        finish(one, wanted, loss)
    other = Results(tmp_path / "other")
    while wanted := study.wanted(Results(tmp_path / "other")):
        finish(other, wanted[:1], loss)
    assert {r.spec.key for r in one.records()} == {r.spec.key for r in other.records()}


def test_where_every_trial_diverged_nothing_is_reported(tmp_path):
    study, results = Study("", ("tiny",), ("adam",), tuning=Tuning("grid", 3)), Results(tmp_path)
    while wanted := study.wanted(results):
        finish(results, wanted, status="diverged")
    assert study.reported(results, ("tiny", "adam")) == []
    assert study.left(results) == {("tiny", "adam"): 0}
    assert len(study.records(results)) == 3


def test_known_settings_of_a_problem_do_not_enter_a_search(tmp_path):
    study = Study("", ("digits-cnn",), ("sophia",), tuning=Tuning())
    assert study.fixed_for("digits-cnn", "sophia") == {"weight_decay": 0.0}
    untuned = dataclasses.replace(study, tuning=None)
    assert "rho" in untuned.fixed_for("digits-cnn", "sophia")
