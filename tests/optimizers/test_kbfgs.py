"""K-BFGS against its equations in plain lines, one layer at a time, and the second pass that it needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import Damping, Moment, Preconditioner, Recipe, Root, TapError
from curvlib.blocks import QuasiNewtonBlock
from curvlib.testing import check_recipe
from tests.optimizers.oracles import F64
from tests.optimizers.recorded import joined, layers_of, recorded
from tests.optimizers.test_tnt import batch, network


def looked_at(model, x, y):
    """For every layer: second moment of inputs, mean input, mean pre-activation, mean output gradient, gradient."""
    seen = []
    for a, h, d, gradient in recorded(model, x, y):
        flat = a.flatten(0, 1)
        seen.append((flat.T @ flat / len(flat), flat.mean(0), h.mean((0, 1)), d.sum((0, 1)), gradient))
    return seen


def bfgs(inverse, s, y):
    """The textbook's (I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ."""
    if not s @ y > 0:
        return inverse
    left = torch.eye(len(s), dtype=F64) - torch.outer(s, y) / (s @ y)
    return left @ inverse @ left.T + torch.outer(s, s) / (s @ y)


class Layer:
    """One layer's state in plain lines."""

    def __init__(self, layer, damping, beta, memory):
        rows, columns = joined(layer).shape
        self.root, self.beta, self.memory, self.conv = damping**0.5, beta, memory, isinstance(layer, nn.Conv2d)
        self.a, self.ha, self.hg = torch.zeros(columns, columns, dtype=F64), None, torch.eye(rows, dtype=F64)
        self.m = torch.zeros(rows, columns, dtype=F64)
        self.s, self.y, self.pairs, self.t = torch.zeros(rows, dtype=F64), torch.zeros(rows, dtype=F64), [], 0
        self.damped = [0, 0]

    def before(self, seen, weights, decay, mu):
        a, mean, _, _, gradient = seen
        self.t += 1
        self.a = self.beta * self.a + (1 - self.beta) * a
        lm = self.a / (1 - self.beta**self.t) + self.root * torch.eye(len(a), dtype=F64)
        self.ha = torch.linalg.inv(lm) if self.ha is None else self.ha
        self.m = mu * self.m + (1 - mu) * (gradient + decay * weights)
        direction = self.hg @ self.m @ self.ha
        s = self.ha @ mean
        self.ha = bfgs(self.ha, s, lm @ s)
        return direction

    def after(self, old, new):
        self.s = self.beta * self.s + (1 - self.beta) * (new[2] - old[2])
        self.y = self.beta * self.y + (1 - self.beta) * (new[3] - old[3])
        s, y, eps = self.s, self.y, self.root
        hy = self.hg @ y
        if s @ y < 0.2 * (y @ hy):
            theta = 0.8 * (y @ hy) / (y @ hy - s @ y)
            s = theta * s + (1 - theta) * hy
            self.damped[0] += 1
        if self.conv:
            y = y + eps * s
        elif s @ y <= eps * (s @ s):
            theta = (1 - eps) * (s @ s) / (s @ s - s @ y)
            y = theta * y + (1 - theta) * s
            self.damped[1] += 1
        if self.memory is None:
            self.hg = bfgs(self.hg, s, y)
            return
        self.pairs = [*self.pairs, (s, y)][-self.memory :]
        self.hg = torch.eye(len(s), dtype=F64)
        for pair in self.pairs:
            self.hg = bfgs(self.hg, *pair)


@pytest.mark.parametrize("memory", [None, 4, 100])
def test_kbfgs(memory):
    model, lr, damping, beta, mu, decay = network(), 0.3, 0.1, 0.5, 0.7, 1e-2
    optimizer = curvlib.KBFGS(model, lr, damping=damping, beta=beta, momentum=mu, weight_decay=decay, memory=memory)
    states = [Layer(layer, damping, beta, memory) for layer in layers_of(model)]
    for t in range(50):
        x, y = batch(t)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        seen, before = looked_at(model, x, y), [joined(layer) for layer in layers_of(model)]
        wanted = [w - lr * state.before(one, w, decay, mu) for state, one, w in zip(states, seen, before, strict=True)]
        optimizer.step(closure)
        for layer, weights in zip(layers_of(model), wanted, strict=True):
            torch.testing.assert_close(joined(layer), weights, rtol=1e-8, atol=1e-9)
        again = looked_at(model, x, y)
        for state, old, new in zip(states, seen, again, strict=True):
            state.after(old, new)
    assert sum(state.damped[0] for state in states) > 0
    assert sum(state.damped[1] for state in states) > 0


def test_curvature_is_the_inverse_of_what_is_applied():
    for memory in (None, 3):
        model = network()
        optimizer = curvlib.KBFGS(model, damping=0.1, memory=memory)
        for t in range(5):
            optimizer.step(closure_of(model, optimizer, t))
        for held in optimizer.held():
            if not isinstance(held.block, QuasiNewtonBlock):
                continue
            g = torch.randn(1, *held.block.layout.shape, dtype=F64)
            direction = held.block.apply(held.state, g, held.recipe, 1.0, held.scale)
            dense = held.block.dense(held.state, held.recipe, held.scale)[0]
            torch.testing.assert_close((dense @ direction.flatten()).view(g.shape), g, rtol=1e-7, atol=1e-9)
            back = held.block.apply(held.state, direction, held.recipe, -1.0, held.scale)
            torch.testing.assert_close(back, g, rtol=1e-7, atol=1e-9)
            with pytest.raises(ValueError, match="exponent must be 1 or -1"):
                held.block.apply(held.state, g, held.recipe, 0.5, held.scale)


def closure_of(model, optimizer, t, spoil=0.0):
    x, y = batch(t)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        outputs = model(x + (spoil if len(calls) > 1 else 0.0))
        optimizer.observe(outputs, "categorical")
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        return loss

    return closure


def test_gradients_are_those_of_the_first_pass():
    model = network()
    optimizer = curvlib.KBFGS(model)
    x, y = batch(0)
    wanted = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    optimizer.step(closure_of(model, optimizer, 0))
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


def test_the_second_pass_happens_only_where_statistics_are_due():
    model = network()
    optimizer = curvlib.KBFGS(model, statistics_every=3)
    counts = []
    for t in range(7):
        x, y = batch(t)
        calls = []

        def closure(x=x, y=y, calls=calls):
            calls.append(1)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        counts.append(len(calls))
    assert counts == [2, 1, 1, 2, 1, 1, 2]


def test_a_second_pass_that_is_not_finite_harms_nothing():
    model, other = network(), network()
    optimizer, plain = curvlib.KBFGS(model), curvlib.KBFGS(other)
    for t in range(3):
        optimizer.step(closure_of(model, optimizer, t))
        plain.step(closure_of(other, plain, t))
    before = {name: value.clone() for name, value in optimizer.state[model[0].weight].items()}
    optimizer.step(closure_of(model, optimizer, 3, spoil=float("nan")))
    plain.step(closure_of(other, plain, 3))
    for name in ("inverse_0_0", "step_0_0", "change_0_0"):
        assert torch.equal(optimizer.state[model[0].weight][name], before[name])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)  # the step was taken before
    optimizer.step(closure_of(model, optimizer, 4))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_an_error_in_the_second_pass_leaves_gradients_and_the_next_step():
    model = network()
    optimizer = curvlib.KBFGS(model)
    optimizer.step(closure_of(model, optimizer, 0))
    first, calls = closure_of(model, optimizer, 1), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return first()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step(closure_of(model, optimizer, 2))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_sums_and_micro_batches():
    found = []
    for reduction, way, size in (("mean", "mean", 10), ("sum", "sum", 10), (2.0, "mean", 5)):
        model = network()
        optimizer = curvlib.KBFGS(model, reduction=reduction)
        for t in range(4):
            x, y = batch(t)

            def closure(x=x, y=y, way=way, size=size, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                for inputs, labels in zip(x.split(size), y.split(size), strict=True):
                    F.cross_entropy(model(inputs), labels, reduction=way).backward()

            optimizer.step(closure)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-11)


def test_grouped_convolutions_have_inverses_of_their_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Flatten()).double()
    twins = [nn.Sequential(nn.Conv2d(2, 2, 2), nn.Flatten()).double() for _ in range(2)]
    with torch.no_grad():
        for group, twin in enumerate(twins):
            twin[0].weight.copy_(model[0].weight[2 * group : 2 * group + 2])
            twin[0].bias.copy_(model[0].bias[2 * group : 2 * group + 2])
    optimizers = [curvlib.KBFGS(one) for one in (model, *twins)]
    for t in range(4):
        x = torch.randn(6, 4, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(t))
        parts = (x, x[:, :2], x[:, 2:])
        for one, optimizer, inputs in zip((model, *twins), optimizers, parts, strict=True):

            def closure(one=one, optimizer=optimizer, inputs=inputs):
                optimizer.zero_grad()
                one(inputs).sin().sum(1).mean().backward()

            optimizer.step(closure)
    for group, twin in enumerate(twins):
        rows = slice(2 * group, 2 * group + 2)
        torch.testing.assert_close(model[0].weight[rows], twin[0].weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "kind",
    [
        curvlib.KBFGS,
        lambda model: curvlib.KBFGS(model, memory=3),
        lambda model: curvlib.KBFGS(model, statistics_every=2, refresh_every=3),
    ],
)
def test_the_kit(kind):
    check_recipe(kind, examples=2)


def test_what_is_missing_or_makes_no_sense_is_said():
    model = network()
    x, y = batch(0)
    optimizer = curvlib.KBFGS(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(
        TapError, match=r"0.weight, 3.weight, 5.weight look at the same batch once more.*step\(closure\)"
    ):
        optimizer.step()
    recipe = Recipe("| o, i", Moment("signals"), Root(1, 0.1), block=QuasiNewtonBlock, join_bias=True)
    layer = nn.Linear(3, 2).double()
    pre = Preconditioner(layer, recipe)
    with pytest.raises(TapError, match="a Preconditioner does not take the step itself"):
        pre.step(lambda: layer(torch.ones(2, 3, dtype=F64)).sum().backward())
    for bad, message in (
        (Recipe("| o/2, i", Moment("signals"), Root(1, 0.1), block=QuasiNewtonBlock), "uncut"),
        (Recipe("o | i", Moment("signals"), Root(1, 0.1), block=QuasiNewtonBlock), "one factor of outputs"),
        (Recipe("| o, i", Moment(), Root(1, 0.1), block=QuasiNewtonBlock), "needs Moment"),
        (Recipe("| o, i", Moment("signals"), Root(0.5, 0.1), block=QuasiNewtonBlock), "exponent=0.5"),
        (
            Recipe("| o, i", Moment("signals"), Root(1, Damping(0.1, "trace")), block=QuasiNewtonBlock),
            "absolute damping",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            QuasiNewtonBlock(bad.cut.layout({"o": 3, "i": 3}, (), (("o",), ("i",))), bad)
