"""SINGD and PSGD-Kron against their equations in plain lines, and what their tracked roots tend to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import CurvatureOptimizer, Damping, Moment, Recipe, Root, Tracking
from curvlib.blocks import InverseFreeBlock, WhiteningBlock
from curvlib.testing import check_recipe
from tests.optimizers.oracles import F64, symmetric_power
from tests.optimizers.recorded import joined, layers_of, recorded
from tests.optimizers.test_tnt import batch, network, unfolded


def factors_of(model, x, y):
    """(U, G, gradient) of every layer: mean second moments of inputs, and of single examples' output gradients."""
    factors = []
    for a, _, d, gradient in recorded(model, x, y):
        flat, own = a.flatten(0, 1), d.flatten(0, 1) * len(x)  # of single examples' own losses
        factors.append((flat.T @ flat / len(flat), own.T @ own / len(x), gradient))
    return factors


def project(structure, matrix, size):
    if structure == "diagonal":
        return matrix.diagonal().diag()
    if structure == "triangular":
        return matrix.tril() + matrix.tril(-1)
    if structure == "blocks":
        count = math.ceil(len(matrix) / size)
        small, longer = divmod(len(matrix), count)
        return torch.block_diag(*torch.zeros(0), *[b for b in _cut(matrix, count, small, longer)])
    return matrix


def _cut(matrix, count, small, longer):
    start = 0
    for number in range(count):
        stop = start + small + (number < longer)
        yield matrix[start:stop, start:stop]
        start = stop


@pytest.mark.parametrize("structure", ["dense", "triangular", "diagonal", "blocks"])
@pytest.mark.parametrize(("coupled", "normalize"), [(True, False), (False, True)])
def test_singd(structure, coupled, normalize):
    model, lr, mu, damping, rate, alpha, period = network(), 0.02, 0.8, 0.1, 0.05, 0.5, 2
    optimizer = curvlib.SINGD(
        model,
        lr,
        momentum=mu,
        damping=damping,
        rate=rate,
        factor_momentum=alpha,
        structure=structure,
        block_size=3,
        coupled=coupled,
        normalize=normalize,
        statistics_every=period,
    )
    state = []
    for layer in layers_of(model):
        rows, columns = joined(layer).shape
        eye, zero = (lambda n: torch.eye(n, dtype=F64)), (lambda n: torch.zeros(n, n, dtype=F64))
        state.append([eye(columns), eye(rows), zero(columns), zero(rows), 0.0])
    for t in range(50):
        x, y = batch(t)
        seen, before = factors_of(model, x, y), [joined(layer) for layer in layers_of(model)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for place, (u, g, gradient) in enumerate(seen):
            k, c, mk, mc, m = state[place]
            if t % period == 0:
                hk, hc, kk, cc = k.T @ u @ k, c.T @ g @ c, k.T @ k, c.T @ c
                new = []
                for mine, other, square, across, old in ((hk, hc, kk, cc, mk), (hc, hk, cc, kk, mc)):
                    th, ts = (other.trace() / len(other), across.trace() / len(other)) if coupled else (1.0, 1.0)
                    step = project(structure, th * mine + damping * ts * square - torch.eye(len(mine), dtype=F64), 3)
                    new.append(alpha * old + 0.5 * (1 - alpha if normalize else 1.0) * step)
                mk, mc = new
                rates = [rate / max(1.0, float(one.abs().max())) if normalize else rate for one in new]
                if normalize and structure == "blocks":  # every block has a bound of its own
                    k, c = (_blockwise(x, one, rate) for x, one in ((k, mk), (c, mc)))
                else:
                    k, c = k - rates[0] * k @ mk, c - rates[1] * c @ mc
            m = mu * m + c @ c.T @ gradient @ k @ k.T
            state[place] = [k, c, mk, mc, m]
            torch.testing.assert_close(joined(layers_of(model)[place]), before[place] - lr * m, rtol=1e-9, atol=1e-11)


def _blockwise(x, turn, rate):
    count = math.ceil(len(x) / 3)
    small, longer = divmod(len(x), count)
    pairs = zip(_cut(x, count, small, longer), _cut(turn, count, small, longer), strict=True)
    return torch.block_diag(*[a - rate / max(1.0, float(b.abs().max())) * a @ b for a, b in pairs])


def test_ikfac_tends_to_the_damped_inverse():
    """With one batch again and again, K Kᵀ is KFAC's (U + λI)^-1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    optimizer = curvlib.SINGD(model, 0.0, damping=0.1, rate=0.1, factor_momentum=0.0, coupled=False, statistics_every=1)
    x, y = torch.randn(30, 5, dtype=F64), torch.randint(0, 4, (30,))
    for _ in range(2000):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    ((u, g, gradient),) = factors_of(model, x, y)
    record = optimizer.state[model[0].weight]
    for factor, name in ((u, "tracked_0_1"), (g, "tracked_0_0")):
        k = record[name][0]
        wanted = torch.linalg.inv(factor + 0.1 * torch.eye(len(factor), dtype=F64))
        torch.testing.assert_close(k @ k.T, wanted, rtol=1e-8, atol=1e-8)
    (held, *_) = optimizer.held()
    inverse = torch.kron(
        torch.linalg.inv(g + 0.1 * torch.eye(4, dtype=F64)), torch.linalg.inv(u + 0.1 * torch.eye(6, dtype=F64))
    )
    direction = held.block.apply(held.state, gradient[None], held.recipe, 1.0, held.scale)
    torch.testing.assert_close(direction.flatten(), inverse @ gradient.flatten(), rtol=1e-7, atol=1e-8)
    product = held.block.apply(held.state, direction, held.recipe, -1.0, held.scale)
    torch.testing.assert_close(product[0], gradient, rtol=1e-9, atol=1e-11)
    dense = held.block.dense(held.state, held.recipe, held.scale)[0]
    torch.testing.assert_close(dense @ direction.flatten(), gradient.flatten(), rtol=1e-9, atol=1e-11)


def largest(gram):
    row = gram[gram.square().sum(1).argmax()]
    for _ in range(2):
        row = row / row.norm() @ gram
    return row.norm()


def whiten(q, g):
    for axis, one in enumerate(q):
        g = torch.tensordot(one @ one, g, ([1], [axis])).movedim(0, axis)
    return g


@pytest.mark.parametrize("period", [1, 3])
def test_psgd(period):
    model, lr, rate, beta, mu, delta = network(), 0.01, 0.1, 0.9, 0.8, 1e-3
    options = {"rate": rate, "damping": delta, "bound_beta": beta, "momentum": mu}
    optimizer = curvlib.PSGDKron(model, lr, statistics_every=period, **options)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    qs, bounds, ms = [None] * len(weights), [None] * len(weights), [torch.zeros_like(w) for w in weights]
    for t in range(50):
        x, y = batch(t)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
        for place, g in enumerate(gradients):
            k = g.ndim
            if qs[place] is None:
                scale = g.pow(4).mean() ** (-1 / (8 * k))
                qs[place], bounds[place] = [scale * torch.eye(n, dtype=F64) for n in g.shape], [0.0] * k
            if t % period == 0:
                white = whiten(qs[place], g)
                fourth = [q @ q @ q @ q for q in qs[place]]
                for axis, q in enumerate(qs[place]):
                    gram, rest = unfolded(white, axis) @ unfolded(white, axis).T, g.numel() / g.shape[axis]
                    others = [one.trace() for other, one in enumerate(fourth) if other != axis]
                    gram = gram + delta**2 * math.prod(others) * fourth[axis]
                    if g.ndim == 1:  # a vector's factor is a diagonal, whose norm is known
                        gram = gram.diagonal().diag()
                    size = largest(gram) + rest
                    bounds[place][axis] = max(beta * bounds[place][axis] + (1 - beta) * size, size)
                    half = rate / 2 / bounds[place][axis]
                    p = q - half * (gram @ q - rest * q)
                    p = p - half * (p @ gram - p * rest)
                    qs[place][axis] = (p + p.T) / 2
                top = [q.abs().max() for q in qs[place]]
                common = math.prod(top) ** (1 / k)
                qs[place] = [q * common / one for q, one in zip(qs[place], top, strict=True)]
            ms[place] = mu * ms[place] + (1 - mu) * g
            direction = whiten(qs[place], ms[place] / (1 - mu ** (t + 1)))
            direction = direction / (direction.square().mean().sqrt() / 2).clamp_min(1.0)
            weights[place] = weights[place] - lr * direction.clamp(-10, 10)
        for found, wanted in zip(model.parameters(), weights, strict=True):
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-9, atol=1e-11)


def test_psgd_whitens():
    """Gradients A Z Bᵀ with white Z: P tends to the inverse root of AAᵀ ⊗ BBᵀ."""
    torch.manual_seed(0)
    a, b = (torch.randn(n, n, dtype=F64) + 2 * torch.eye(n, dtype=F64) for n in (4, 3))
    model = nn.Linear(3, 4, bias=False).double()
    recipe = Recipe(
        "| o, i",
        Moment(),
        Root(0.5, Damping(0.0), tracking=Tracking(lambda t: 0.1 / (1 + t / 100), 0.9)),
        block=WhiteningBlock,
    )
    optimizer = CurvatureOptimizer(model, recipe, lr=0.0)
    for t in range(3000):
        z = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(t))
        model.weight.grad = a @ z @ b.T
        optimizer.step()
    (held,) = optimizer.held()
    units = torch.eye(12, dtype=F64).view(12, 1, 4, 3)
    p = torch.stack([held.block.apply(held.state, one, held.recipe, 0.5, 1.0).flatten() for one in units])
    covariance = torch.kron(a @ a.T, b @ b.T)
    white = p @ covariance @ p.T
    assert (white - torch.eye(12, dtype=F64)).norm() / math.sqrt(12) < 0.15
    dense = held.block.dense(held.state, held.recipe, 1.0)[0]
    torch.testing.assert_close(symmetric_power(dense, -0.5), p, rtol=1e-8, atol=1e-10)
    g = torch.randn(1, 4, 3, dtype=F64)
    for exponent in (-1.0, 1.0, 0.25):
        found = held.block.apply(held.state, g, held.recipe, exponent, 1.0).flatten()
        torch.testing.assert_close(found, symmetric_power(dense, -exponent) @ g.flatten(), rtol=1e-8, atol=1e-9)


def test_psgd_does_not_see_the_scale_of_the_loss():
    found = []
    for scale in (1.0, 1e-6, 1e4):
        model = network()
        optimizer = curvlib.PSGDKron(model, 0.01, damping=0.0)
        for t in range(10):
            x, y = batch(t)
            optimizer.zero_grad()
            (scale * F.cross_entropy(model(x), y)).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-10)


def test_long_axes_have_diagonal_factors():
    model = nn.ModuleDict(
        {
            "e": nn.Embedding(20, 3),
            "wide": nn.Linear(30, 4, bias=False),
            "tall": nn.Linear(4, 30),
            "both": nn.Linear(20, 20),
        }
    )
    wanted = {
        "e.weight": "[v]",
        "wide.weight": "[i]",
        "tall.weight": "[o]",
        "tall.bias": "[...]",
        "both.weight": "[...]",
    }
    routes = curvlib.PSGDKron(model, max_size=10).routing()
    for name, text in wanted.items():
        assert text in routes[name].split(" (route")[0], routes[name]
    routes = curvlib.PSGDKron(model, max_skew=1.0).routing()
    for name, text in {**wanted, "both.weight": "| ,..."}.items():  # a square has no longer axis
        assert text in routes[name].split(" (route")[0], routes[name]


@pytest.mark.parametrize(("dead", "max_size"), [("all", 8192), ("rows", 8192), ("rows", 4)])
def test_psgd_of_what_gets_no_gradient_for_long_wakes_up(dead, max_size):
    """An unused expert, or dead units: P stays bounded, and the gradients that come at last move it by lr."""
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = curvlib.PSGDKron(model, 1e-3, max_size=max_size)
    moved = []
    for t in range(900):
        for parameter in model.parameters():
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(t))
            if t < 700:
                parameter.grad[: 3 if dead == "rows" else None] = 0
        before = model.weight.detach().clone()
        optimizer.step()
        moved.append(float((model.weight.detach() - before).square().mean().sqrt()))
        if t == 699:
            tracked = [v for name, v in optimizer.state[model.weight].items() if name.startswith("tracked_")]
            largest = math.prod(float(q.abs().max()) ** 2 for q in tracked)
            assert largest < 2 if dead == "all" else 1e7 < largest < 1e10  # about 1/δ
    assert max(moved) <= 2.1e-3  # the cut, twice lr
    assert moved[-1] > 1e-4
    assert optimizer.health().ok


def test_updates_that_were_not_taken_are_counted():
    model = nn.Linear(3, 2, bias=False)
    optimizer = curvlib.PSGDKron(model)
    for size in (1e-10, 1e18, 1e18, 1e-10):  # the whitened square of these is beyond float32
        model.weight.grad = size * torch.ones(2, 3)
        optimizer.step()
    assert optimizer.health().kept == {"weight": 4}  # two factors, twice
    assert not optimizer.health().ok


@pytest.mark.parametrize("kind", [curvlib.SINGD, curvlib.PSGDKron])
def test_stable_for_2000_steps(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(64, 4)
    y = torch.sin(x @ torch.randn(4, 3))
    optimizer = kind(model, 3e-3, statistics_every=1)
    losses = []
    for t in range(2000):
        chosen = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    assert sum(losses[-100:]) < 0.3 * sum(losses[:10]) * 10


def test_a_gradient_that_overflows_leaves_the_last_good_factor():
    model = nn.Linear(3, 2, bias=False)
    optimizer = curvlib.PSGDKron(model)
    for size in (1e-10, 1e18, 1e-10):  # the whitened square of the second is beyond float32
        model.weight.grad = size * torch.ones(2, 3)
        optimizer.step()
        assert all(torch.isfinite(value).all() for value in optimizer.state[model.weight].values())
    assert torch.isfinite(model.weight).all()


@pytest.mark.parametrize(
    "kind",
    [
        curvlib.SINGD,
        lambda model: curvlib.SINGD(model, structure="triangular", normalize=True),
        lambda model: curvlib.SINGD(model, structure="blocks", block_size=2, statistics_every=1),
        lambda model: curvlib.SINGD(model, structure="diagonal", coupled=False),
        curvlib.PSGDKron,
        lambda model: curvlib.PSGDKron(model, max_size=4),
    ],
)
def test_the_kit(kind):
    check_recipe(kind, examples=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InverseFreeBlock(*_case("| o, i", Moment())), "needs Moment"),
        (lambda: InverseFreeBlock(*_case("| o, i", Moment("signals"), tracked=False)), "needs Root"),
        (lambda: InverseFreeBlock(*_case("| o, i", Moment("signals"), exponent=0.5)), "power -1"),
        (lambda: InverseFreeBlock(*_case("o | i", Moment("signals"))), "one factor of outputs and one of inputs"),
        (lambda: WhiteningBlock(*_case("| o, i", Moment("signals"), exponent=0.5)), "batch gradients"),
        (lambda: WhiteningBlock(*_case("| o, i", Moment())), "power -0.5"),
        (lambda: curvlib.SINGD(nn.Linear(3, 2), structure="toeplitz"), "structure"),
        (lambda: curvlib.SINGD(nn.Linear(3, 2), block_size=0), "block_size"),
        (lambda: curvlib.PSGDKron(nn.Linear(3, 2), max_size=0), "max_size"),
        (lambda: Tracking(rate=0.0), "tracking rate"),
        (lambda: Tracking(momentum=1.0), "tracking momentum"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _case(partition, moment, exponent=1.0, tracked=True):
    tracking = Tracking() if tracked else None
    block = InverseFreeBlock if tracked else None
    recipe = Recipe(partition, moment, Root(exponent, Damping(0.1), tracking=tracking), block=block)
    return recipe.cut.layout({"o": 3, "i": 3}, (), (("o",), ("i",))), recipe
