"""Directions for another optimizer are those that our own would step along."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlib import (
    Clip,
    CurvatureOptimizer,
    Damping,
    Moment,
    Momentum,
    Preconditioner,
    Recipe,
    Root,
    Route,
    Rule,
    Schedule,
)
from tests.listening import F64

KFAC = Recipe(
    "| o, i k...",
    Moment("signals", debias=True),
    Root(1, Damping(0.1, split="pi")),
    Rule(Momentum(0.9), clip=Clip("kl", 1e-3)),
    Schedule(2, 3),
    join_bias=True,
)
KERNELS = Recipe("o i | k...", Moment("samples"), Root(1, 0.1), axes=None)
SHAMPOO = Recipe("| ,...", Moment(composition="power-mean"), Root(0.5, 0.1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()


@pytest.mark.parametrize("table", [[Route(KFAC)], [Route(KERNELS, kind="conv"), Route(KFAC)], [Route(SHAMPOO)]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sgd_on_its_directions_is_the_optimizer(table, reduction):
    model = network()
    twin = copy.deepcopy(model)
    lr = 0.05
    whole = CurvatureOptimizer(model, table, lr=lr, reduction=reduction)
    half = Preconditioner(twin, table, lr=lr, reduction=reduction)
    whole.batch_size = half.batch_size = 6
    sgd = torch.optim.SGD(twin.parameters(), lr)
    for _ in range(5):
        x, y = torch.randn(6, 2, 4, 4, dtype=F64), torch.randint(0, 3, (6,))
        for one, steps in ((model, [whole]), (twin, [half, sgd])):
            one.zero_grad()
            F.cross_entropy(one(x), y, reduction=reduction).backward()
            for each in steps:
                each.step()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_it_moves_nothing_and_is_saved_like_an_optimizer():
    model = network()
    before = [parameter.clone() for parameter in model.parameters()]
    first = Preconditioner(model, KFAC)
    batches = [torch.randn(6, 2, 4, 4, dtype=F64) for _ in range(4)]

    def gradients(preconditioner, x):
        model.zero_grad()
        model(x).square().sum(1).mean().backward()
        preconditioner.step()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for x in batches[:3]:
        gradients(first, x)
    saved = copy.deepcopy(first.state_dict())
    expected = gradients(first, batches[3])
    first.detach()
    second = Preconditioner(model, KFAC)
    second.load_state_dict(saved)
    for one, two in zip(expected, gradients(second, batches[3]), strict=True):
        assert torch.equal(one, two)
    for one, two in zip(before, model.parameters(), strict=True):
        assert torch.equal(one, two)
