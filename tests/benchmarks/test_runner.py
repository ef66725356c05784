"""Runs: equal starts within a seed, a clock whose parts add up, resumption after anything, divergence, other optimizers."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import curvlib
from benchmarks import methods, runner
from benchmarks.methods import METHODS, MethodError, title_of
from benchmarks.records import PARTS, Point, RecordError, Results, Spec, write_whole
from benchmarks.runner import execute
from tests.benchmarks.tiny import spec, tiny_data

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("tiny")


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Even where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(wanted, folder, *more, **options):
    return execute(wanted, tiny_data(), Results(folder), *more, **options)


def test_methods_of_a_seed_share_start_and_order(tmp_path, monkeypatch):
    seen, real = {}, runner._step
    for name in ("adam", "mbf", "torch.optim:SGD"):
        inputs = []

        def step(bench, arriving, inputs=inputs):
            def noted():
                for batch in arriving:
                    inputs.append(batch.inputs)
                    yield batch

            return real(bench, noted())

        monkeypatch.setattr(runner, "_step", step)
        record = run(spec(name, lr=0.1), tmp_path)
        seen[name] = (record.points[0].train, torch.stack(inputs))
    first = seen["adam"]
    for start, order in seen.values():
        assert start == first[0]
        assert torch.equal(order, first[1])
    assert len(first[1]) == 20
    assert run(spec("adam", seed=1), tmp_path).points[0].train != first[0]


# -- budgets and divergence -------------------------------------------------------------------------------------------


def test_budgets_are_epochs_steps_or_seconds(tmp_path):
    steps = {}
    for budget in ({"epochs": 3}, {"steps": 7}, {"seconds": 0.05}):
        record = run(Spec("tiny", "adam", {}, 0, **budget), tmp_path)
        steps[next(iter(budget))] = record.points[-1].step
        assert record.status == "finished"
    assert (steps["epochs"], steps["steps"]) == (12, 7)
    assert record.points[-1].seconds >= 0.05 > record.points[-1].seconds - 2 * max(0.05, record.step_seconds)
    assert steps["seconds"] > 1


def test_settings_are_chosen_by_validation_data(tmp_path):
    given = replace(tiny_data(), validation=tiny_data().train.first(5))
    results = Results(tmp_path)
    ends = {
        purpose: execute(replace(spec(epochs=1, lr=0.1), purpose=purpose), given, results).points[-1]
        for purpose in ("report", "tuning")
    }
    assert ends["tuning"].train == ends["report"].train
    assert ends["tuning"].test != ends["report"].test
    alone = execute(replace(spec(epochs=1, lr=0.1), purpose="tuning"), tiny_data(), Results(tmp_path / "alone")).points[
        -1
    ]
    assert alone.test == ends["report"].test


def test_divergence_is_a_result(tmp_path):
    record = run(spec("wild"), tmp_path)
    assert record.status == "diverged"
    assert math.isnan(record.points[-1].test)
    assert run(spec("wild"), tmp_path).reproducible() == record.reproducible()


def test_a_search_may_give_a_run_up(tmp_path):
    record = run(spec(), tmp_path, watch=lambda point: point.step >= 6)
    assert (record.status, record.points[-1].step) == ("pruned", 6)


# -- the clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mbf", "kfac", "kbfgs", "adahessian", "adam", "torch.optim:AdamW", "torch.optim:LBFGS"]
)
def test_the_parts_of_a_step_add_up(tmp_path, name):
    record = run(spec(name, epochs=5, lr=1e-3), tmp_path)
    assert set(record.parts) == set(PARTS)
    assert sum(record.parts.values()) == pytest.approx(record.points[-1].seconds, rel=1e-9)
    assert all(value >= 0 for value in record.parts.values())
    assert record.parts["forward and backward"] > 0
    assert record.parts["precondition and apply"] > 0
    assert (record.parts["statistics"] > 0) == (":" not in name)
    assert record.parts["rest"] < 0.5 * record.points[-1].seconds


def test_time_is_counted_where_it_is_spent(tmp_path, monkeypatch, tiny):
    pause = 0.01

    def slow(function):
        def slower(*arguments, **settings):
            time.sleep(pause)
            return function(*arguments, **settings)

        return slower

    from dataclasses import replace

    from benchmarks.problems import PROBLEMS
    from curvlib.cohort import Cohort

    monkeypatch.setitem(PROBLEMS, "tiny", replace(tiny, loss=slow(tiny.loss)))
    monkeypatch.setattr(Cohort, "direct", slow(Cohort.direct))
    monkeypatch.setattr(runner, "evaluate", slow(runner.evaluate))
    record = run(Spec("tiny", "mbf", {}, 0, steps=10), tmp_path, lambda share, average: time.sleep(pause))
    assert 10 * pause < record.parts["forward and backward"] < 30 * pause
    assert record.parts["precondition and apply"] > 10 * pause
    assert record.parts["rest"] < 5 * pause  # neither evaluations nor what watches are timed
    assert record.points[0].seconds == 0


# -- resumption -------------------------------------------------------------------------------------------------------

STOPPED = ["mbf", "mbf-published", "shampoo", "adam", "sgd", "torch.optim:SGD", "pytorch_optimizer:SOAP"]


@pytest.mark.parametrize("name", STOPPED)
@pytest.mark.parametrize("stop", [1, 7, 19])
def test_interrupted_is_uninterrupted(tmp_path, name, stop):
    options = {"lr": 1e-3}
    if name == "mbf-published":
        options |= {**METHODS[name].everywhere, "lr": 1e-3, "damping": 0.1}
    whole = run(spec(name, **options), tmp_path / "whole")
    steps = []

    def interrupt(share, average):
        steps.append(share)
        if len(steps) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(spec(name, **options), tmp_path / "parts", interrupt)
    checkpoint = Results(tmp_path / "parts").checkpoint(spec(name, **options))
    assert checkpoint.is_file()
    torch.rand(3)
    resumed = run(spec(name, **options), tmp_path / "parts")
    assert resumed.reproducible() == whole.reproducible()
    assert resumed.points[-1].seconds == pytest.approx(sum(resumed.parts.values()))
    assert not list(checkpoint.parent.iterdir())


@pytest.mark.parametrize("name", ["mbf", "shampoo", "adam", "sgd"])
def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(tmp_path, monkeypatch, name):
    whole = run(spec(name), tmp_path / "whole")
    real, calls = runner._step, []

    def hit(*arguments):
        loss = real(*arguments)
        calls.append(loss)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)  # weights have moved, the step is not counted yet
        return loss

    monkeypatch.setattr(runner, "_step", hit)
    with pytest.raises(KeyboardInterrupt):
        run(spec(name), tmp_path / "parts")
    assert len(calls) == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = run(spec(name), tmp_path / "parts")
    assert len(calls) == 20
    assert resumed.reproducible() == whole.reproducible()


def test_a_second_ctrl_c_does_not_wait_and_saves_nothing_half_done(tmp_path, monkeypatch):
    whole = run(spec(), tmp_path / "whole")
    real = runner._step

    def hit(*arguments):
        real(*arguments)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runner, "_step", hit)
    with pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path / "parts")
    assert not Results(tmp_path / "parts").checkpoint(spec()).exists()
    monkeypatch.setattr(runner, "_step", real)
    assert run(spec(), tmp_path / "parts").reproducible() == whole.reproducible()


def test_ctrl_c_at_the_step_that_diverges_keeps_the_record(tmp_path, monkeypatch):
    real = runner._step

    def hit(*arguments):
        real(*arguments)
        signal.raise_signal(signal.SIGINT)
        return math.nan

    monkeypatch.setattr(runner, "_step", hit)
    with pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path)
    assert Results(tmp_path).known(spec()).status == "diverged"


def test_killed_or_twice_at_once_a_study_ends_with_the_same_records(tmp_path):
    command = [sys.executable, "-m", "tests.benchmarks.killing", str(tmp_path), "--kills", "4", "--steps", "30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 kills")
    assert done.stdout.endswith("9 records, equal\n")


def test_a_damaged_checkpoint_is_named(tmp_path):
    file = Results(tmp_path).checkpoint(spec())
    write_whole(file, b"junk")
    with pytest.raises(RecordError, match=rf"{file.name} does not fit this run .*remove it"):
        run(spec(), tmp_path)


def test_a_full_disk_stops_a_run_that_goes_on_later(tmp_path, monkeypatch):
    whole = run(spec(), tmp_path / "whole")
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    real, writes = os.fsync, []

    def full(descriptor):
        writes.append(descriptor)
        if len(writes) == 5:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match="the disk is full"):
        run(spec(), tmp_path / "parts")
    resumed = run(spec(), tmp_path / "parts")
    assert len(writes) < 5 + 18  # it did not start anew
    assert resumed.reproducible() == whole.reproducible()


def test_a_finished_run_is_not_repeated(tmp_path):
    first = run(spec(), tmp_path)

    def refuse(*_):
        raise AssertionError("it ran again")

    assert run(spec(), tmp_path, refuse).line() == first.line()


def test_a_run_that_another_process_does_is_left_to_it(tmp_path):
    results = Results(tmp_path)
    lock = results.claim(spec())
    assert run(spec(), tmp_path) is None
    lock.release()
    assert run(spec(), tmp_path).status == "finished"


def test_several_code_versions_in_one_run_are_told(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "commit", lambda: "aaa")
    with pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path, interrupt)
    monkeypatch.setattr(runner, "commit", lambda: "bbb")
    assert run(spec(), tmp_path).warnings == ["Stopped and resumed under several code versions: aaa, bbb."]


# -- methods ----------------------------------------------------------------------------------------------------------


def test_any_optimizer_joins(tmp_path):
    for name in ("torch.optim:AdamW", "pytorch_optimizer:SOAP", "Mine=torch.optim:AdamW", "Same=adam", "curvlib:Adam"):
        record = run(Spec("tiny", name, {"lr": 1e-2, "betas": [0.9, 0.99]}, 0, epochs=5), tmp_path)
        assert record.status == "finished"
        assert record.points[-1].train < record.points[0].train
        assert record.memory > 0
    assert title_of("Mine=torch.optim:AdamW") == "Mine"
    assert title_of("gone.module:Class") == "gone.module:Class"


def test_a_method_of_ones_own_is_a_few_lines(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        """
import torch

class SignSGD(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(group["lr"] * parameter.grad.sign())
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    record = run(Spec("tiny", "mine:SignSGD", {"lr": 1e-2}, 0, epochs=5), tmp_path)
    assert record.points[-1].train < 0.8 * record.points[0].train
    with pytest.raises(MethodError, match=r"mine:SignSGD refuses the settings \{'rho': 1\}"):
        run(Spec("tiny", "mine:SignSGD", {"rho": 1}, 0, epochs=5), tmp_path)


def test_every_named_method_has_settings_that_work():
    for problem in ("digits-autoencoder", "digits-cnn"):
        for one in METHODS.values():
            settings = {key: value for key, value in one.settings_for(problem).items() if key != "warm_start"}
            assert isinstance(one.optimizer(nn.Linear(3, 2), settings), torch.optim.Optimizer)


def test_memory_of_foreign_optimizers_is_counted():
    layer = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.Adam(layer.parameters())
    layer.weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert methods.memory(optimizer) == 2 * 24 + 4
    assert issubclass(curvlib.Adam, torch.optim.Optimizer)
    assert Point(0, 0.0, 1.0, 1.0) != Point(1, 0.0, 1.0, 1.0)
