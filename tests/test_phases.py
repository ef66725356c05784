"""Phases: a step tells what it is busy with, to nobody where nobody listens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvlib
from curvlib import phases


def steps(optimizer_class, count=2, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = optimizer_class(model, **settings)
    inputs, labels = torch.randn(8, 4), torch.randint(0, 3, (8,))

    def closure():
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs, labels)
        optimizer.observe(outputs, "categorical", loss=loss)
        loss.backward(retain_graph=optimizer.needs_graph)
        return loss

    for _ in range(count):
        optimizer.step(closure)
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", ["KFAC", "MBF", "Shampoo", "SOAP", "KBFGS", "AdaHessian", "Adam", "SGD"])
def test_every_phase_that_begins_ends_and_nothing_else_changes(name):
    told, stack = [], []

    def listen(phase):
        told.append(phase)
        stack.append(phase) if phase else stack.pop()

    with phases.heard(listen):
        measured = steps(getattr(curvlib, name))
    assert not stack
    assert {"statistics", "refresh", "precondition and apply"} == set(told) - {None}
    for one, other in zip(measured, steps(getattr(curvlib, name)), strict=True):
        assert torch.equal(one, other)


def test_what_layers_say_in_backward_is_told_while_it_is_heard():
    told = []
    model = nn.Linear(4, 3)
    optimizer = curvlib.MBF(model, of="samples")
    loss = nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,)))
    with phases.heard(told.append):
        loss.backward()
    assert told == ["statistics", None]
    optimizer.step()


def test_nobody_listens_after_an_error():
    told = []
    with pytest.raises(RuntimeError, match="stop"), phases.heard(told.append), phases.phase("statistics"):
        raise RuntimeError("stop")
    assert told == ["statistics", None]
    assert phases.phase("refresh") is phases.phase("statistics")
