"""Which way of solving is used where: numbers by device, and how a user overrides them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from curvlib import Calibration, CurvatureOptimizer, Damping, Moment, Recipe, Root, calibrate, calibration, solvers
from curvlib.calibration import KINDS, read
from curvlib.solvers import How, chosen, suited

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    monkeypatch.setattr(calibration, "KINDS", dict(KINDS))
    calibration._known.cache_clear()
    yield
    calibration._known.cache_clear()


def test_open_choices_go_by_size():
    calibrate({"cpu": Calibration(newton_rows=10)})
    half = chosen(How(0.5, "auto", torch.float32, largest=True))
    assert [suited(half, size, CPU).solver for size in (9, 10)] == ["eigh", "newton"]
    for how in (How(0.5, "eigh", torch.float32), How(1.0, "auto", torch.float32), How(1 / 6, "auto", torch.float32)):
        assert suited(chosen(how), 100, CPU).solver == chosen(how).solver
    assert suited(chosen(How(0.5, "auto", torch.float32, outside=True)), 100, CPU).solver == "eigh"


def test_an_optimizer_uses_what_is_suited(monkeypatch):
    asked = []
    newton = solvers.SOLVERS["newton"]

    def watched(matrix, damping, how):
        asked.append(matrix.shape[-1])
        return newton.solve(matrix, damping, how)

    monkeypatch.setitem(solvers.SOLVERS, "newton", solvers.Solver(watched, newton.takes, newton.waits, newton.warm))
    calibrate({"cpu": Calibration(newton_rows=5)})
    weight = torch.nn.Parameter(torch.zeros(7, 3))
    recipe = Recipe("| ,...", Moment(composition="power-mean"), Root(0.5, Damping(0.1)))
    optimizer = CurvatureOptimizer([weight], recipe, lr=0.1)
    weight.grad = torch.randn(7, 3)
    optimizer.step()
    assert asked == [7]
    assert optimizer.health().ok


def test_a_file_of_a_user(tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"devices": {"cpu": {"newton_rows": 40, "planes_rows": None}}}))
    assert read(file)["cpu"] == replace(KINDS["cpu"], planes_rows=None, newton_rows=40)
    monkeypatch.setenv("CURVLIB_CALIBRATION", str(file))
    assert calibration.calibration(CPU).newton_rows == 40
    monkeypatch.delenv("CURVLIB_CALIBRATION")
    calibrate(file)
    assert calibration.calibration(CPU).newton_rows == 40


@pytest.mark.parametrize(
    "content", ["", "{}", '{"devices": {"cpu": {"rows": 3}}}', '{"devices": {"cpu": {"chunk": 0}}}', '{"devices": 3}']
)
def test_what_is_no_calibration_is_named(tmp_path, content):
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json is no calibration: "):
        calibrate(file)
    with pytest.raises(ValueError, match=r"no\.json is no calibration: "):
        calibrate(tmp_path / "no.json")


def test_unknown_devices_are_taken_for_accelerators():
    assert calibration.calibration(torch.device("meta")) == KINDS["cuda"]


def test_operands_take_the_step_in_as_many_calls_as_a_bucket_allows():
    def trained(most):
        calibrate({"cpu": replace(KINDS["cpu"], bucket=most)})
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64)) for _ in range(5)]
        recipe = Recipe("| ,...", Moment(beta=0.9), Root(0.25, Damping(0.1)))
        optimizer = CurvatureOptimizer(weights, recipe, lr=0.1)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        return optimizer, weights

    (one, whole), (several, cut) = trained(None), trained(24)
    assert [len(bucket.units) for bucket in one._storage.buckets] == [5]
    assert [len(bucket.units) for bucket in several._storage.buckets] == [2, 2, 1]
    for left, right in zip(whole, cut, strict=True):
        assert torch.allclose(left, right, rtol=0, atol=1e-12)  # to rounding: condition numbers of some hundreds
    saved = several.state_dict()  # which knows nothing of buckets
    one.load_state_dict(saved)
    assert one.state_dict()["state"].keys() == saved["state"].keys()
