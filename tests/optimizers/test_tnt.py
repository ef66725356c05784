"""TNT against its equations in plain lines, and what the gradient of drawn labels must do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import CurvatureOptimizer, Moment, Recipe, Root, TapError
from curvlib.testing import check_recipe
from tests.optimizers.oracles import F64


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 9, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()


def batch(t):
    generator = torch.Generator().manual_seed(t)
    return torch.randn(10, 2, 2, 2, dtype=F64, generator=generator), torch.randint(0, 3, (10,), generator=generator)


def modes(tensor):
    """A convolution's kernel axes are one."""
    return tensor.flatten(2) if tensor.ndim == 4 else tensor


def unfolded(tensor, axis):
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_tnt(labels):
    model, lr, damping, period, refresh = network(), 0.01, 0.1, 2, 4
    optimizer = curvlib.TNT(model, lr, damping=damping, labels=labels, statistics_every=period, refresh_every=refresh)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    second = [[torch.zeros(n, n, dtype=F64) for n in modes(w).shape] for w in weights]
    inverses, momentum = [None] * len(weights), [torch.zeros_like(w) for w in weights]
    for t in range(50):
        x, y = batch(t)
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.observe(outputs, "categorical", generator=torch.Generator().manual_seed(t))
        drawn = curvlib.sample_labels(outputs, "categorical", torch.Generator().manual_seed(t))
        own = torch.autograd.grad(F.cross_entropy(outputs, drawn), list(model.parameters()), retain_graph=True)
        F.cross_entropy(outputs, y).backward()
        for place, parameter in enumerate(model.parameters()):
            gradient = modes(own[place] if labels == "sampled" else parameter.grad)
            k, numel = gradient.ndim, gradient.numel()
            if t % period == 0:
                for axis, factor in enumerate(second[place]):
                    g = unfolded(gradient, axis)
                    factor.mul_(0.9).add_(0.1 * g @ g.T)
            if t % refresh == 0 or (t <= refresh and t % period == 0):
                c = (second[place][0].trace() / numel) ** (1 / k)
                inverses[place] = [
                    torch.linalg.inv(v / (c ** (k - 1) * numel / len(v)) + damping * torch.eye(len(v), dtype=F64))
                    for v in second[place]
                ]
            momentum[place] = 0.9 * momentum[place] + parameter.grad
            direction = modes(momentum[place])
            for axis, inverse in enumerate(inverses[place]):
                direction = torch.tensordot(inverse, direction, ([1], [axis])).movedim(0, axis)
            weights[place] = weights[place] - lr * direction.reshape(weights[place].shape)
        optimizer.step()
        for found, wanted in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-9, atol=1e-11)


def recipe(**options):
    return Recipe("| (...)", Moment("gradient", average="mean", labels="sampled"), Root(1, 1.0), **options)


def test_micro_batches_are_one_batch_and_the_training_gradient_is_left_alone(monkeypatch):
    monkeypatch.setattr("curvlib.labels.sample_labels", lambda logits, *_: logits + 1.0)  # all examples draw alike
    x, y = batch(0)
    model = network()
    curvatures = []
    for parts in (1, 2):
        optimizer = CurvatureOptimizer(model, recipe(), lr=0.0, reduction=float(parts))
        optimizer.zero_grad()
        seen = []
        for inputs, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            outputs = model(inputs)
            optimizer.observe(outputs, "gaussian")
            seen.append(outputs)
            F.cross_entropy(outputs, labels).backward()
        gradient = model[3].weight.grad / parts
        wanted = torch.autograd.grad(F.cross_entropy(model(x), y), model[3].weight)[0]
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-14)
        optimizer.step()
        curvatures.append(optimizer.curvature(model[3].weight))
    torch.testing.assert_close(curvatures[1], curvatures[0], rtol=1e-10, atol=1e-14)


def test_statistics_that_are_due_must_be_observed():
    model = network()
    optimizer = curvlib.TNT(model, statistics_every=2)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(TapError, match=r"statistics of drawn labels are due.*observe.*0\.weight"):
        optimizer.step()
    outputs = model(x)
    with pytest.raises(ValueError, match="labels='sampled' needs a likelihood"):
        optimizer.observe(outputs)
    optimizer.observe(outputs, "categorical")
    optimizer.step()
    optimizer.step()  # nothing is due


def test_what_was_drawn_before_zero_grad_does_not_count():
    x, y = batch(0)
    models = [network(), network()]
    for model, twice in zip(models, (False, True), strict=True):
        optimizer = curvlib.TNT(model, 0.1)
        if twice:
            outputs = model(x + 1)
            optimizer.observe(outputs, "categorical")
            optimizer.zero_grad()
        outputs = model(x)
        optimizer.observe(outputs, "categorical", generator=torch.Generator().manual_seed(3))
        F.cross_entropy(outputs, y).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(*(model.parameters() for model in models), strict=True))


def test_a_drawn_gradient_that_is_not_finite_is_reported():
    model = network()
    optimizer = curvlib.TNT(model)
    x, y = batch(0)
    outputs = model(x)
    optimizer.observe(outputs * float("nan"), "categorical")
    F.cross_entropy(outputs, y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(curvlib.NonFiniteGradient, match=r"the drawn gradient of 0\.weight"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_kit():
    check_recipe(curvlib.TNT, examples=3)


def test_other_moments_draw_nothing_of_the_gradient():
    with pytest.raises(ValueError, match="labels='exact' needs of='samples'"):
        Moment("gradient", labels="exact")
    with pytest.raises(ValueError, match="labels='sampled' needs of='samples'"):
        Moment("momentum", labels="sampled")
    with pytest.raises(ValueError, match=r"labels.*'drawn'"):
        curvlib.TNT([nn.Parameter(torch.zeros(2))], labels="drawn")
