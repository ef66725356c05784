"""What a reader must know: data, warnings, machines, and settings that nobody chose."""

from __future__ import annotations

import warnings

import pytest
import torch
from made_up import record

from benchmarks.caveats import caveats
from benchmarks.records import Results
from benchmarks.runner import execute
from benchmarks.sections import sections
from tests.benchmarks.tiny import spec, tiny_data


def told(records):
    (section,) = sections(records)
    return caveats(section)


def tuned(method="adam", seed=0, **more):
    return record(method, seed, settings={"lr": 0.1}, **more)


def test_of_what_is_as_it_should_be_nothing_is_said():
    assert told([tuned(), tuned(seed=1), tuned("mbf")]) == []


def test_data_are_told_and_so_is_their_mixture():
    assert told([tuned(note="Made up."), tuned(seed=1, note="Made up.")]) == ["Made up."]
    mixed = told([tuned(note="Made up."), tuned(seed=1), tuned("mbf")])
    assert mixed == ["Made up. So in 1 of 3 runs, which stand side by side."]


def test_warnings_are_told_once_with_whose_they_are():
    texts = ["nothing is heard"]
    found = told([tuned(warnings=texts), tuned(seed=1, warnings=texts), tuned("mbf", warnings=texts), tuned("sgd")])
    assert found == ["MBF, Adam: nothing is heard"]


def test_mixed_machines_are_told():
    here = {"commit": "abc", "threads": 1, "jobs": 1, "packages": {"torch": "2.11"}}
    there = {**here, "threads": 2, "packages": {"torch": "2.12"}}
    (text,) = told([tuned(environment=here), tuned(seed=1, environment=here), tuned("mbf", environment=there)])
    assert text == (
        "Runs of different environments stand side by side: threads 1 (2 runs), 2 (1 run); torch 2.11 (2 runs), 2.12 (1 run)."
    )


def test_a_shared_machine_is_told():
    (text,) = told([tuned(environment={"jobs": 4}), tuned("mbf", environment={"jobs": 4})])
    assert text.startswith("Up to 4 runs shared the machine")
    assert "times are not" in text


def test_untuned_defaults_are_told():
    plain = [record("adam"), record("sgd", settings={"momentum": 0.9}), tuned("mbf"), record("not.here:Class")]
    (text,) = told(plain)
    assert text.startswith(
        "Untuned defaults: nothing that a search would choose was chosen here of Adam, SGD-m, not.here:Class;"
    )
    assert "tune" in text


def warning(model, lr=0.1):
    """An optimizer that warns when it is made, and at every step."""
    warnings.warn("made", UserWarning, stacklevel=1)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    optimizer.register_step_pre_hook(lambda *_: warnings.warn("made, and it\n steps", UserWarning, stacklevel=1))
    return optimizer


@pytest.mark.usefixtures("tiny")
def test_what_is_warned_of_in_a_run_is_recorded_once_and_not_shown(tmp_path, recwarn):
    wanted = spec("tests.benchmarks.test_caveats:warning", epochs=2, lr=0.1)

    def interrupt(share, _):
        if share == 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(wanted, tiny_data(), Results(tmp_path), interrupt)
    record = execute(wanted, tiny_data(), Results(tmp_path), jobs=3)
    assert record.warnings == ["made, and it steps"]
    assert Results(tmp_path).known(wanted).warnings == record.warnings
    assert record.environment["jobs"] == 3
    assert not recwarn.list


@pytest.mark.usefixtures("tiny")
def test_what_cannot_be_heard_is_recorded(tmp_path):
    record = execute(spec("kfac", epochs=1, lr=0.1), tiny_data(), Results(tmp_path))
    (text,) = record.warnings
    assert "batch normalisation in training mode" in text
    assert told([record])[0].startswith("KFAC: ")
