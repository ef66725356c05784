"""FOOF, one-sided Shampoo and full AdaGrad against their equations in plain lines."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import curvlib
from curvlib.testing import check_recipe
from tests.optimizers.oracles import F64

STEPS = 50


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0) ** exponent) @ vectors.T


def series(shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=F64, generator=generator) for _ in range(STEPS)]


def stepped(make, shape, gradients):
    weight = nn.Parameter(torch.zeros(shape, dtype=F64))
    optimizer = make([weight])
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize(
    ("shape", "side"),
    [((3, 5), "output"), ((5, 3), "output"), ((3, 5), "input"), ((3, 5), "smaller"), ((5, 3), "smaller")],
)
@pytest.mark.parametrize("beta", [0.9, None])
def test_one_sided_shampoo(shape, side, beta):
    gradients, damping, mu = series(shape), 1e-3, 0.8
    options = dict(side=side, beta=beta, damping=damping, momentum=mu, grafting=None, refresh_every=1)
    found = stepped(lambda p: curvlib.OneSidedShampoo(p, 0.1, **options), shape, gradients)
    output = side == "output" or (side == "smaller" and shape[0] <= shape[1])
    weight, average = torch.zeros(shape, dtype=F64), torch.zeros(shape, dtype=F64)
    factor = torch.zeros(*[shape[0] if output else shape[1]] * 2, dtype=F64)
    for t, g in enumerate(gradients, 1):
        second = g @ g.T / shape[1] if output else g.T @ g / shape[0]
        factor = factor + second if beta is None else beta * factor + (1 - beta) * second
        used = factor if beta is None else factor / (1 - beta**t)
        average = mu * average + (1 - mu) * g
        m = average / (1 - mu**t)
        top = torch.linalg.eigvalsh(used)[-1]
        root = power(used + damping * top * torch.eye(len(used), dtype=F64), -0.5)
        weight -= 0.1 * (root @ m if output else m @ root)
    torch.testing.assert_close(found, weight, rtol=1e-10, atol=1e-11)


def test_the_sides_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 6, bias=False))
    routing = curvlib.OneSidedShampoo(model).routing()
    assert routing["0.weight"].startswith("~i ~k... | o")
    assert routing["2.weight"].startswith("~o | i k...")
    assert routing["0.bias"].startswith("... |")


@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_full_adagrad(shape):
    gradients = series(shape)
    found = stepped(lambda p: curvlib.FullAdagrad(p, 0.1, damping=1e-2), shape, gradients)
    numel = gradients[0].numel()
    weight, total = torch.zeros(numel, dtype=F64), torch.zeros(numel, numel, dtype=F64)
    for gradient in gradients:
        g = gradient.flatten()
        total += torch.outer(g, g)
        weight -= 0.1 * power(total + 1e-2 * torch.eye(numel, dtype=F64), -0.5) @ g
    torch.testing.assert_close(found.flatten(), weight, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_foof(momentum):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False), nn.LayerNorm(3)).double()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = curvlib.FOOF(model, 0.1, damping=0.5, beta=0.7, momentum=momentum, refresh_every=1)
    factors, buffers = [0.0, 0.0], [0.0] * 5
    for t in range(1, STEPS + 1):
        x, y = torch.randn(20, 4, dtype=F64), torch.randint(0, 3, (20,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            inputs = [torch.cat([x, torch.ones(20, 1, dtype=F64)], 1), model[:2](x)]
        grads = [parameter.grad.clone() for parameter in model.parameters()]
        buffers = [momentum * b + g for b, g in zip(buffers, grads, strict=True)]
        factors = [0.7 * f + 0.3 * a.T @ a / 20 for f, a in zip(factors, inputs, strict=True)]
        inverses = [torch.linalg.inv(f / (1 - 0.7**t) + 0.5 * torch.eye(len(f), dtype=F64)) for f in factors]
        first = torch.cat([buffers[0], buffers[1][:, None]], 1) @ inverses[0]
        steps = [first[:, :-1], first[:, -1], buffers[2] @ inverses[1], buffers[3], buffers[4]]
        weights = [w - 0.1 * s for w, s in zip(weights, steps, strict=True)]
        optimizer.step()
        for found, wanted in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-10, atol=1e-12)


def test_foof_of_a_convolution():
    """Patches and their ones, a mean over examples and positions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), nn.Flatten()).double()
    optimizer = curvlib.FOOF(model, 0.1, damping=0.5, beta=0.7, momentum=0.0, refresh_every=1)
    factor = torch.zeros(9, 9, dtype=F64)
    for t in range(1, STEPS + 1):
        x = torch.randn(6, 2, 3, 3, dtype=F64)
        optimizer.zero_grad()
        (model(x) ** 2).sum(1).mean().backward()
        patches = nn.functional.unfold(x, 2, padding=1).mT.flatten(0, 1)
        a = torch.cat([patches, torch.ones(len(patches), 1, dtype=F64)], 1)
        factor = 0.7 * factor + 0.3 * a.T @ a / len(a)
        inverse = torch.linalg.inv(factor / (1 - 0.7**t) + 0.5 * torch.eye(9, dtype=F64))
        weight, bias = model[0].weight, model[0].bias
        g = torch.cat([weight.grad.flatten(1), bias.grad[:, None]], 1)
        wanted = torch.cat([weight.detach().flatten(1), bias.detach()[:, None]], 1) - 0.1 * g @ inverse
        optimizer.step()
        found = torch.cat([weight.detach().flatten(1), bias.detach()[:, None]], 1)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [curvlib.FOOF, curvlib.OneSidedShampoo, curvlib.FullAdagrad])
def test_the_kit(make):
    check_recipe(make, examples=3)


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"side.*'left'"):
        curvlib.OneSidedShampoo([nn.Parameter(torch.zeros(2, 2))], side="left")
