"""NGD and MBF of single examples against their equations in plain lines."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlib import MBF, NGD
from tests.listening import F64, sample_gradients


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(count):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(9, 4, dtype=F64, generator=generator), torch.randint(0, 3, (9,), generator=generator))
        for _ in range(count)
    ]


def rows(model, x, y, labels):
    """For each layer the gradients of single examples as ``[m, outputs, inputs + 1]``, and the batch's."""
    gradients = sample_gradients(model, x, y, "categorical", labels)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    for name in ("0", "2"):
        weight, bias = gradients[f"{name}.weight"], gradients[f"{name}.bias"]
        module = model.get_submodule(name)
        mean = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
        yield module, torch.cat([weight, bias[:, :, None]], 2), mean


def move(module, direction, lr):
    with torch.no_grad():
        module.weight -= lr * direction[:, :-1]
        module.bias -= lr * direction[:, -1]


def train(model, optimizer, data):
    for x, y in data:
        optimizer.zero_grad()
        logits = model(x)
        optimizer.observe(logits, "categorical")
        F.cross_entropy(logits, y).backward()
        optimizer.step()


def same(one, two):
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("labels", ["data", "exact"])
@pytest.mark.parametrize("block_size", [None, 7])
def test_ngd_is_its_equations(labels, block_size):
    model, plain = perceptron(), perceptron()
    lr, damping, beta = 0.1, 0.05, 0.9
    averages = {}
    for step, (x, y) in enumerate(batches(4)):
        for module, each, mean in list(rows(plain, x, y, labels)):
            flat = each.flatten(1)
            average = averages.get(module, 0) * beta + (1 - beta) * flat.T @ flat / 9
            averages[module] = average
            fisher = average / (1 - beta ** (step + 1))
            if block_size is not None:
                pieces = -(-len(fisher) // block_size)
                sizes = [len(fisher) // pieces + (index < len(fisher) % pieces) for index in range(pieces)]
                fisher = fisher * torch.block_diag(*(torch.ones(size, size, dtype=F64) for size in sizes))
            damped = fisher + damping * torch.eye(len(fisher), dtype=F64)
            move(module, torch.linalg.solve(damped, mean.flatten()).view_as(mean), lr)
    optimizer = NGD(model, lr, damping=damping, beta=beta, labels=labels, block_size=block_size)
    train(model, optimizer, batches(4))
    same(model, plain)


@pytest.mark.parametrize(("blocks", "equation"), [("output", "noi,noj->oij"), ("output-averaged", "noi,noj->ij")])
def test_mbf_of_single_examples_is_its_equations(blocks, equation):
    model, plain = perceptron(), perceptron()
    lr, damping, beta = 0.05, 0.1, 0.9
    averages, momenta = {}, {}
    for x, y in batches(4):
        for module, each, mean in list(rows(plain, x, y, "data")):
            outputs = each.shape[1] if blocks == "output-averaged" else 1
            moment = torch.einsum(equation, each, each) / 9 / outputs
            averages[module] = averages.get(module, 0) * beta + (1 - beta) * moment
            momenta[module] = 0.9 * momenta.get(module, 0) + mean
            inverse = torch.linalg.inv(averages[module] + damping * torch.eye(moment.shape[-1], dtype=F64))
            pattern = "oij,oj->oi" if inverse.ndim == 3 else "ij,oj->oi"
            move(module, torch.einsum(pattern, inverse, momenta[module]), lr)
    optimizer = MBF(
        model,
        lr,
        of="samples",
        linear_blocks=blocks,
        damping=damping,
        relative_damping=False,
        grafting=None,
        heavy_ball=True,
        debias=False,
        beta=beta,
        refresh_every=1,
    )
    train(model, optimizer, batches(4))
    same(model, plain)


def test_a_copy_that_never_trains_stays():
    model = perceptron()
    twin = copy.deepcopy(model)
    train(model, NGD(model, 0.0), batches(2))
    same(model, twin)
