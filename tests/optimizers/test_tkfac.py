"""TKFAC against its equations in plain lines, and the trace that it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib.analysis import Objective, fisher
from curvlib.testing import check_recipe
from tests.optimizers.oracles import F64


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.LayerNorm(3)).double()


def batch(t):
    generator = torch.Generator().manual_seed(t)
    return torch.randn(12, 4, dtype=F64, generator=generator), torch.randint(0, 3, (12,), generator=generator)


def signals(model, x, y):
    """Inputs with a one appended, and gradients of each example's own loss at the outputs, of both linear layers."""
    one = torch.ones(len(x), 1, dtype=F64)
    first = model[0](x)
    hidden = torch.tanh(first)
    second = model[2](hidden)
    deltas = torch.autograd.grad(F.cross_entropy(model[3](second), y, reduction="sum"), [first, second])
    return [torch.cat([x, one], 1), torch.cat([hidden.detach(), one], 1)], deltas


def test_tkfac():
    model, lr, damping, beta, mu = network(), 0.05, 0.02, 0.8, 0.7
    optimizer = curvlib.TKFAC(model, lr, damping=damping, beta=beta, momentum=mu, refresh_every=1)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    phi, psi, moved = [0.0, 0.0], [0.0, 0.0], [0.0] * 6
    for t in range(1, 51):
        x, y = batch(t)
        inputs, deltas = signals(model, x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        directions = [None, None, None, None, *(p.grad.clone() for p in model[3].parameters())]
        for place, layer in enumerate((model[0], model[2])):
            a, d = inputs[place], deltas[place]
            phi[place] = beta * phi[place] + (1 - beta) * (d.square().sum(1)[:, None] * a).T @ a / len(x)
            psi[place] = beta * psi[place] + (1 - beta) * (a.square().sum(1)[:, None] * d).T @ d / len(x)
            left, right = psi[place] / (1 - beta**t), phi[place] / (1 - beta**t)
            tau = left.trace()
            torch.testing.assert_close(tau, right.trace(), rtol=1e-12, atol=0)
            gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            solved = [
                torch.linalg.inv(f / tau**0.5 + damping**0.5 * torch.eye(len(f), dtype=F64)) for f in (left, right)
            ]
            direction = solved[0] @ gradient @ solved[1]
            directions[2 * place], directions[2 * place + 1] = direction[:, :-1], direction[:, -1]
        moved = [mu * m + d for m, d in zip(moved, directions, strict=True)]
        weights = [w - lr * m for w, m in zip(weights, moved, strict=True)]
        optimizer.step()
        for found, wanted in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("labels", ["data", "exact"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_trace_is_that_of_the_fisher(labels, shared):
    torch.manual_seed(0)
    head = [nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)]
    model = nn.Sequential(*head) if shared else nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    model.double()
    x, y = torch.randn(15, 8, dtype=F64), torch.randint(0, 3, (15,))
    optimizer = curvlib.TKFAC(model, labels=labels)
    objective = Objective(model, F.cross_entropy, x, y)
    layers = [(module, fisher(objective, labels, module)) for module in model if hasattr(module, "weight")]
    outputs = model(x)
    optimizer.observe(outputs, "categorical")
    F.cross_entropy(outputs, y).backward()
    optimizer.step()
    for module, exact in layers:
        torch.testing.assert_close(optimizer.curvature(module).trace(), exact.trace(), rtol=1e-11, atol=0)


def test_the_kit():
    check_recipe(curvlib.TKFAC, examples=3)
