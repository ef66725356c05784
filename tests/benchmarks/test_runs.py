"""Runs: equal starts within a seed, resumption, divergence, reports, and the command line."""

from __future__ import annotations

import json
import math
import re
import signal

import pytest
import torch
from rich.console import Console
from torch import nn

import curvlib
from benchmarks import methods, problems, runner
from benchmarks.cli import main
from benchmarks.data import Data, Split
from benchmarks.methods import METHODS, Method
from benchmarks.problems import PROBLEMS, Problem, Target, classification, evaluate
from benchmarks.records import Point, Record, RecordError, Spec, write_whole
from benchmarks.report import write_report
from benchmarks.summary import cells, reached, summarize


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """Even where the tests run in the background of a shell, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def tiny_data(_=None):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 6, generator=generator)
    labels = (inputs[:, :3].argmax(1)).long()
    return Data(Split(inputs[:64], labels[:64]), Split(inputs[64:], labels[64:]))


TINY = Problem(
    "tiny",
    "Tiny",
    "made up",
    lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)),
    tiny_data,
    classification,
    "categorical",
    batch_size=16,
    epochs=5,
    target=Target("train", 0.8),
    points=2,
)
STAND_INS = {
    "torch-sgd": Method(
        "torch-sgd", "SGD", lambda m, **s: torch.optim.SGD(m.parameters(), **s), "#000", "-", {}, {"lr": 0.1}
    ),
    "wild": Method("wild", "Wild", lambda m, **s: curvlib.SGD(m, **s), "#111", "-", {}, {"lr": 1e38}),
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(PROBLEMS, "tiny", TINY)
    for name, method in STAND_INS.items():
        monkeypatch.setitem(METHODS, name, method)


def spec(method="adam", seed=0, epochs=5, **settings):
    return Spec("tiny", method, settings or METHODS[method].settings_for("tiny"), seed, epochs)


def numbers(record):
    return record.status, [(point.step, point.train, point.test) for point in record.points], record.memory


def test_methods_of_a_seed_share_start_and_order(tmp_path, monkeypatch):
    seen = {}
    for name in ("adam", "mbf", "torch-sgd"):
        batches = []
        monkeypatch.setattr(
            runner,
            "_step",
            lambda problem, model, optimizer, batch, batches=batches: batches.append(batch.inputs) or 1.0,
        )
        record = runner.execute(spec(name), tiny_data(), tmp_path / name)
        seen[name] = (record.points[0].train, torch.stack(batches))
    first = seen["adam"]
    for start, order in seen.values():
        assert start == first[0]
        assert torch.equal(order, first[1])
    other = runner.execute(spec("adam", seed=1), tiny_data(), tmp_path)
    assert other.points[0].train != first[0]


def test_every_epoch_sees_every_example_in_another_order():
    batches = torch.stack([batch.labels for batch in runner.batches(tiny_data().train, 16, 3, 0, 8)])
    epochs = batches.view(2, -1)
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("method", ["mbf", "mbf-published", "shampoo", "adam", "sgd", "torch-sgd"])
@pytest.mark.parametrize("stop", [1, 7, 19])
def test_interrupted_is_uninterrupted(tmp_path, method, stop):
    options = {} if method != "mbf-published" else {**METHODS[method].everywhere, "lr": 1e-3, "damping": 0.1}
    whole = runner.execute(spec(method, **options), tiny_data(), tmp_path / "whole")

    def interrupt(step, steps, average):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.execute(spec(method, **options), tiny_data(), tmp_path / "parts", interrupt)
    assert runner.checkpoint_file(tmp_path / "parts", spec(method, **options)).is_file()
    resumed = runner.execute(spec(method, **options), tiny_data(), tmp_path / "parts")
    assert numbers(resumed) == numbers(whole)
    assert not runner.checkpoint_file(tmp_path / "parts", spec(method, **options)).exists()


@pytest.mark.parametrize("method", ["mbf", "shampoo", "adam", "sgd"])
def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(tmp_path, monkeypatch, method):
    whole = runner.execute(spec(method), tiny_data(), tmp_path / "whole")
    real, calls = runner._step, []

    def hit(problem, model, optimizer, batch):
        loss = real(problem, model, optimizer, batch)
        calls.append(loss)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)  # weights have moved, the step is not counted yet
        return loss

    monkeypatch.setattr(runner, "_step", hit)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(spec(method), tiny_data(), tmp_path / "parts")
    assert len(calls) == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = runner.execute(spec(method), tiny_data(), tmp_path / "parts")
    assert len(calls) == 20
    assert numbers(resumed) == numbers(whole)


def test_a_second_ctrl_c_does_not_wait_and_saves_nothing_half_done(tmp_path, monkeypatch):
    whole = runner.execute(spec(), tiny_data(), tmp_path / "whole")
    real = runner._step

    def hit(*arguments):
        real(*arguments)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runner, "_step", hit)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(spec(), tiny_data(), tmp_path / "parts")
    assert not runner.checkpoint_file(tmp_path / "parts", spec()).exists()
    monkeypatch.setattr(runner, "_step", real)
    assert numbers(runner.execute(spec(), tiny_data(), tmp_path / "parts")) == numbers(whole)


def test_ctrl_c_at_the_step_that_diverges_keeps_the_record(tmp_path, monkeypatch):
    def hit(*_):
        signal.raise_signal(signal.SIGINT)
        return math.nan

    monkeypatch.setattr(runner, "_step", hit)
    with pytest.raises(KeyboardInterrupt):
        runner.execute(spec(), tiny_data(), tmp_path)
    assert Record.load(runner.results_file(tmp_path, spec())).status == "diverged"


def test_a_damaged_checkpoint_is_named(tmp_path):
    file = runner.checkpoint_file(tmp_path, spec())
    write_whole(file, b"junk")
    with pytest.raises(RecordError, match=rf"{file.name} does not fit this run .*remove it"):
        runner.execute(spec(), tiny_data(), tmp_path)


def test_a_finished_run_is_not_repeated(tmp_path):
    first = runner.execute(spec(), tiny_data(), tmp_path)

    def refuse(*_):
        raise AssertionError("it ran again")

    assert runner.execute(spec(), tiny_data(), tmp_path, refuse) == first
    assert spec().key != spec(seed=1).key != spec(epochs=2).key
    assert spec("adam", lr=0.1).key != spec("adam", lr=0.2).key


def test_divergence_is_a_result(tmp_path):
    record = runner.execute(spec("wild"), tiny_data(), tmp_path)
    assert record.status == "diverged"
    assert math.isnan(record.points[-1].test)
    (row,) = summarize([record])
    assert row.diverged == 1
    assert math.isinf(row.train[0])
    assert cells(row)[1] == "1 (1 diverged)"
    assert write_report([record], tmp_path, "x").is_file()


def test_a_record_survives_its_file_and_is_written_whole(tmp_path):
    record = runner.execute(spec(), tiny_data(), tmp_path)
    file = runner.results_file(tmp_path, spec())
    assert Record.load(file) == record
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def record_of(method, seed, losses, seconds, memory=100):
    points = tuple(Point(10 * number, seconds * number, loss, loss + 1) for number, loss in enumerate(losses))
    return Record(spec(method, seed), "finished", points, seconds / 10, memory, {})


def test_summaries_are_medians_with_misses_as_infinite():
    records = [
        *(record_of("adam", seed, [3, 2, 0.7], 1.0) for seed in range(3)),
        record_of("mbf", 0, [3, 0.5, 0.1], 2.0),
        record_of("mbf", 1, [3, 0.9, 0.2], 3.0),
        record_of("mbf", 2, [3, 2.0, 0.9], 4.0),
    ]
    mbf, adam = summarize(records)
    assert mbf.train == (0.2, 0.1, 0.9)
    assert mbf.relative == pytest.approx(3.0)
    assert mbf.steps_to_target == 20
    assert reached(records[-1], 0.8) == (math.inf, math.inf)
    assert adam.relative == 1.0
    assert (adam.steps_to_target, adam.seconds_to_target) == (20, 2.0)


def test_the_report_stands_alone(tmp_path):
    records = [runner.execute(spec(name, seed), tiny_data(), tmp_path) for name in ("adam", "mbf") for seed in (0, 1)]
    page = write_report(records, tmp_path, "A <title>")
    text = page.read_text()
    assert "A &lt;title&gt;" in text
    assert text.count("<svg") == 1
    assert not re.findall(r"""(?:src|href)\s*=\s*["']https?:""", text)
    assert "Held-out loss" in text
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 3
    assert len(text) < 1_000_000


def run(*arguments):
    console = Console(record=True, width=200, force_terminal=False)
    return main([*arguments], console), console.export_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "cifar"), "unknown problem 'cifar'; there are"),
        (("run", "tiny", "--methods", "adam", "tiger"), "unknown method 'tiger'; there are"),
        (("run", "tiny", "--seeds", "0"), "--seeds must be a whole number from 1, got 0"),
        (("run", "tiny", "--threads", "-1"), "--threads must be a whole number from 1, got -1"),
        (("run", "mnist-autoencoder", "--data", "no/such/folder"), "no/such/folder does not exist"),
        (("report", "no/such/folder"), "holds no finished runs"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CURVLIB_DATA", raising=False)
    status, text = run(*arguments)
    assert status == 2
    assert words in text
    assert text.count("\n") == 1


def test_a_study_runs_stops_resumes_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    command = ("run", "tiny", "--methods", "adam", "mbf", "--seeds", "2", "--epochs", "3", "--out", str(tmp_path))
    real, calls = runner._step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(runner, "_step", interrupted)
    status, text = run(*command)
    assert status == 130
    assert "The same command goes on" in text
    monkeypatch.setattr(runner, "_step", real)
    status, text = run(*command)
    assert status == 0
    assert "known already" in text
    assert "Report: " in text
    assert (tmp_path / "index.html").is_file()
    status, text = run("report", str(tmp_path))
    assert status == 0
    (tmp_path / "runs" / "0.json").write_text(json.dumps({"spec": {}}))
    assert run("report", str(tmp_path))[0] == 2


def test_a_results_folder_that_cannot_be_used_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    file = tmp_path / "file"
    file.touch()
    status, text = run("run", "tiny", "--out", str(file))
    assert (status, text.count("\n")) == (2, 1)
    assert str(file) in text


def test_a_damaged_record_is_named_and_not_run_over(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    command = ("run", "tiny", "--methods", "adam", "--seeds", "1", "--out", str(tmp_path))
    assert run(*command)[0] == 0
    (record,) = (tmp_path / "runs").iterdir()
    good = record.read_text()
    record.write_text(good[:100])
    status, text = run(*command)
    assert (status, text.count("\n")) == (2, 1)
    assert f"{record.name} is no record of a run" in text
    record.write_text(good.replace('"tiny"', '"gone"'))
    status, text = run("report", str(tmp_path))
    assert status == 2
    assert "unknown problem 'gone'" in text


def test_a_method_named_twice_is_run_once_and_budgets_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    command = ("run", "tiny", "--methods", "adam", "adam", "--seeds", "2", "--out", str(tmp_path))
    for epochs in ("1", "2"):
        assert run(*command, "--epochs", epochs)[0] == 0
        (row,) = (tmp_path / "summary.csv").read_text().splitlines()[1:]
        assert row.startswith("tiny,adam,2,0,")
    status, text = run("report", str(tmp_path))
    assert status == 2
    assert "runs of adam on tiny that differ in settings or budget" in text


def test_every_problem_builds_and_every_method_has_settings_that_work():
    for problem in PROBLEMS.values():
        torch.manual_seed(0)
        model = problem.build()
        for method in METHODS.values():
            settings = {key: value for key, value in method.settings_for(problem.name).items() if key != "warm_start"}
            assert isinstance(method.optimizer(model, settings), torch.optim.Optimizer)
    widths = [
        module.out_features
        for module in problems.PROBLEMS["mnist-autoencoder"].build()
        if isinstance(module, nn.Linear)
    ]
    assert widths == [1000, 500, 250, 30, 250, 500, 1000, 784]


def test_evaluation_leaves_the_model_training_and_weighs_chunks():
    model = TINY.build()
    data = tiny_data()
    many = Split(data.train.inputs.repeat(17, 1), data.train.labels.repeat(17))
    assert evaluate(model, TINY, many) == pytest.approx(evaluate(model, TINY, data.train), rel=1e-5)
    assert model.training


def test_memory_of_foreign_optimizers_is_counted():
    layer = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.Adam(layer.parameters())
    layer.weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert methods.memory(optimizer) == 2 * 24 + 4
