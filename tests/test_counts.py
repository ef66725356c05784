"""What makes speed, counted instead of timed: operators, waits for the device, and memory of steady steps."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import curvlib
from benchmarks.speed.limits import Allocations
from curvlib import rules
from curvlib.optimizers.mbf import PUBLISHED

FEW, MANY = 3, 30
METHODS = {
    "SGD": curvlib.SGD,
    "Adam": curvlib.Adam,
    "AdamW": curvlib.AdamW,
    "MBF": curvlib.MBF,
    "MBF published": lambda params: curvlib.MBF(params, **{**PUBLISHED, "dense_start": False}),
    "Shampoo": curvlib.Shampoo,
    "Shampoo, roots at every step": lambda params: curvlib.Shampoo(params, refresh_every=1),
    "SOAP": curvlib.SOAP,
    "KL-Shampoo": curvlib.KLShampoo,
}
VIEWS = {"detach", "view", "select", "unbind", "split", "expand", "permute", "transpose", "slice", "unsqueeze", "alias"}
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique"}

every_method = pytest.mark.parametrize("method", METHODS)


class Operators(TorchDispatchMode):
    """Counts operators by name while it is entered."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def of(self, names):
        return {name: count for name, count in self.counts.items() if name in names}


def steady(build, layers, steps=3):
    """An optimizer of equal matrices, after its first steps; its parameters."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(6, 6)) for _ in range(layers)]
    optimizer = build(parameters)
    for _ in range(steps):
        step(optimizer, parameters)
    return optimizer, parameters


def step(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def counted(build, layers, on_nonfinite):
    """The operators of one steady step."""
    optimizer, parameters = steady(build, layers)
    optimizer.on_nonfinite = on_nonfinite
    step(optimizer, parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    with Operators() as operators:
        optimizer.step()
    return operators


@every_method
def test_arithmetic_of_a_step_is_of_as_many_operators_however_many_equal_matrices_there_are(method):
    def arithmetic(layers):
        counts = counted(METHODS[method], layers, "raise").counts
        # Norms of gradients are cast one by one.
        return {name: count for name, count in counts.items() if name not in {*VIEWS, "_to_copy"}}

    few = arithmetic(FEW)
    assert arithmetic(MANY) == few
    assert sum(few.values()) < 150


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"Shampoo, roots at every step"}))
def test_a_plain_step_never_waits_for_the_device(method, monkeypatch):
    # As on an accelerator: on a CPU a report of bad gradients, a look at the gate and quick norms each read a number.
    monkeypatch.setattr(rules, "_quick_norms", lambda rows: None)
    monkeypatch.setattr(curvlib.optimizer, "_known", lambda gate: False)
    assert counted(METHODS[method], FEW, "mask").of(WAITS) == {}


@every_method
def test_a_steady_step_leaves_no_more_memory_than_it_found(method):
    optimizer, parameters = steady(METHODS[method], FEW, 1)
    with Allocations() as tracker:
        seen = []
        for _ in range(2 * 12):  # periods of refreshes are ten steps
            step(optimizer, parameters)
            seen.append(tracker.live)
    assert max(seen[12:]) <= max(seen[:12])


def test_memory_does_not_grow_where_layers_are_heard():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = curvlib.KFAC(model, refresh_every=3)
    with Allocations() as tracker:
        seen = []
        for _ in range(24):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
            seen.append(tracker.live)
    assert max(seen[12:]) <= max(seen[:12])


def test_growth_would_be_seen():
    kept = []
    with Allocations() as tracker:
        seen = []
        for _ in range(4):
            kept.append(torch.ones(10) + 1)
            seen.append(tracker.live)
    assert seen == [40, 80, 120, 160]
