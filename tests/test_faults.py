"""Faults: a seeded campaign over all methods, and the cases that it rests on, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvlib
from curvlib import NonFiniteGradient
from tests import campaign

CASES, CHUNK = 1000, 50


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_campaign(first):
    wrong = [
        f"seed {seed}: {case}: {what}"
        for seed in range(first, first + CHUNK)
        for case, what in [campaign.run(seed)]
        if what
    ]
    assert not wrong, "\n".join(wrong)


def test_every_method_and_every_poison_is_among_the_cases():
    cases = [campaign.Case(seed) for seed in range(CASES)]
    assert {case.method for case in cases} == set(campaign.METHODS)
    assert {case.poison for case in cases} == set(campaign.POISONS)
    assert len(campaign.METHODS) >= 30


@pytest.mark.parametrize("mode", ["raise", "mask"])
def test_a_gradient_whose_square_overflows_is_named(mode):
    model = nn.Linear(3, 2, bias=False)
    optimizer = curvlib.Adam(model)
    optimizer.on_nonfinite = mode
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((2, 3), 1e25)
    if mode == "raise":
        with pytest.raises(NonFiniteGradient, match=r"weight \(its square overflows\)"):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.health().masked == {"weight": 1}
    assert torch.equal(model.weight, before)


def test_nothing_is_looked_at_where_it_is_switched_off():
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = curvlib.Adam([weight])
    optimizer.on_nonfinite = "off"
    weight.grad = torch.full((2, 3), torch.nan)
    optimizer.step()
    assert weight.isnan().all()


def test_what_is_never_squared_may_be_large():
    model = nn.Linear(3, 2, bias=False)
    optimizer = curvlib.SGD(model, lr=1e-30)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full((2, 3), 1e25)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 1e-5)


def test_a_refresh_without_memory_keeps_the_roots(monkeypatch):
    model = nn.Linear(3, 2)
    optimizer = curvlib.MBF(model, refresh_every=1)
    for _ in range(2):
        model.weight.grad, model.bias.grad = torch.randn(2, 3), torch.randn(2)
        optimizer.step()
    before = optimizer.state[model.weight]["root_0_0"].clone()

    def fails(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    optimizer.step()
    assert torch.equal(optimizer.state[model.weight]["root_0_0"], before)
    assert optimizer.health().kept["weight"] > 0
    monkeypatch.undo()
    optimizer.step()
    assert not torch.equal(optimizer.state[model.weight]["root_0_0"], before)


def test_another_error_of_a_solver_is_not_hidden(monkeypatch):
    model = nn.Linear(3, 2, bias=False)
    optimizer = curvlib.MBF(model)

    def fails(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    model.weight.grad = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="something else"):
        optimizer.step()


@pytest.mark.parametrize("method", ["KFAC", "KBFGS", "AdaHessian", "LayerwiseSGD"])
def test_an_interrupt_that_kept_a_pause_from_ending_is_over_at_the_next_step(method):
    case = campaign.Case(0)
    case.optimizer = getattr(curvlib, method)(case.model)
    case.step()
    case.optimizer.paused().__enter__()
    case.optimizer._taps.again().__enter__()
    assert not case.goes_on()
