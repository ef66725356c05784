"""SOAP, KL-Shampoo and EKFAC against their equations in plain lines, a peer, and what changes of basis must not do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import Clip, CurvatureOptimizer, Damping, Grafting, Moment, Momentum, Recipe, Root, Route, Rule, Schedule
from curvlib.blocks import EigenbasisBlock, LikelihoodBlock, RunningEigenbasisBlock
from curvlib.testing import check_block, check_recipe
from tests.optimizers.oracles import F64
from tests.optimizers.recorded import joined, layers_of, recorded
from tests.optimizers.test_tnt import batch, network, unfolded


def rotated(tensor, matrices):
    """Multiply Q_iᵀ into every axis."""
    for axis, matrix in enumerate(matrices):
        tensor = torch.tensordot(matrix, tensor, ([0], [axis])).movedim(0, axis)
    return tensor


def step_of(optimizer, model, t, observe=False):
    """A step on batch t; the gradients."""
    x, y = batch(t)
    optimizer.zero_grad()
    outputs = model(x)
    if observe:
        optimizer.observe(outputs, "categorical")
    F.cross_entropy(outputs, y).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    return gradients


def eigenvectors(factor, given):
    """The given basis, if it is one of eigenvectors."""
    inside = given.T @ factor @ given
    eps = 100 * len(factor) * torch.finfo(F64).eps
    assert (inside - inside.diagonal().diag()).norm() <= eps * factor.norm()
    assert (given.T @ given - torch.eye(len(factor), dtype=F64)).norm() <= eps
    return given


def iterated(factor, last, given):
    """The given basis, if it is the authors' orthogonal iteration from the last one, columns in descending order."""
    order = (last.T @ factor @ last).diagonal().argsort(descending=True)
    wanted, r = torch.linalg.qr(factor @ last[:, order])
    sure = (r.diagonal().abs() > 1e-6 * r.abs().max()).long().cumprod(0).bool()  # from the null space on it is rounding
    eye, eps = torch.eye(len(factor), dtype=F64), 1e8 * torch.finfo(F64).eps
    assert ((wanted.T @ given).abs() - eye)[sure][:, sure].norm() <= eps
    assert (given.T @ given - eye).norm() <= eps
    return given


class Adam:
    def __init__(self, lr, betas, eps):
        self.lr, self.betas, self.eps, self.m, self.v = lr, betas, eps, 0.0, 0.0

    def __call__(self, w, g, t, given):
        self.m = self.betas[0] * self.m + (1 - self.betas[0]) * g
        self.v = self.betas[1] * self.v + (1 - self.betas[1]) * g**2
        m, v = self.m / (1 - self.betas[0] ** (t + 1)), self.v / (1 - self.betas[1] ** (t + 1))
        return w - self.lr * m / (v.sqrt() + self.eps)


class Soap(Adam):
    """SOAP for one tensor. Given bases are taken if they are right, since a degenerate eigenspace has many."""

    def __init__(self, lr, betas, eps, period, basis="eigh"):
        super().__init__(lr, betas, eps)
        self.period, self.factors, self.q, self.basis = period, None, None, basis

    def bases(self, given, t):
        if self.basis == "qr" and t:
            return [iterated(*three) for three in zip(self.factors, self.q, given, strict=True)]
        return [eigenvectors(factor, q) for factor, q in zip(self.factors, given, strict=True)]

    def __call__(self, w, g, t, given):
        b1, b2 = self.betas
        if self.factors is None:
            self.factors = [torch.zeros(n, n, dtype=F64) for n in g.shape]
            self.q, self.v = [torch.eye(n, dtype=F64) for n in g.shape], torch.zeros_like(g)
        for axis, factor in enumerate(self.factors):
            factor.mul_(b2).add_((1 - b2) * unfolded(g, axis) @ unfolded(g, axis).T)
        if t % self.period == 0:
            new = self.bases(given, t)
            self.v = rotated(self.v, [((n.T @ old) ** 2).T for n, old in zip(new, self.q, strict=True)])
            self.q = new
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * rotated(g, self.q) ** 2
        m, v = rotated(self.m / (1 - b1 ** (t + 1)), self.q), self.v / (1 - b2 ** (t + 1))
        return w - self.lr * rotated(m / (v.sqrt() + self.eps), [q.T for q in self.q])


class KL(Soap):
    """KL-Shampoo for one tensor, whitened by dense inverses."""

    def __init__(self, lr, betas, damping, period, basis="eigh"):
        super().__init__(lr, betas, damping, period, basis)
        self.white = None

    def __call__(self, w, g, t, given):
        b1, b2 = self.betas
        if self.factors is None:
            self.factors = [torch.zeros(n, n, dtype=F64) for n in g.shape]
            self.q = [torch.eye(n, dtype=F64) for n in g.shape]
            self.white = [q * g.square().mean() ** (-0.5 / g.ndim) for q in self.q]
        for axis, factor in enumerate(self.factors):
            others = [torch.eye(len(m), dtype=F64) if a == axis else m for a, m in enumerate(self.white)]
            white = unfolded(rotated(g, others), axis)
            factor.mul_(b2).add_((1 - b2) * white @ white.T / (g.numel() / len(factor)))
        self.m = b1 * self.m + (1 - b1) * g
        if t % self.period == 0:
            self.q = self.bases(given, t)
        for axis, factor in enumerate(self.factors):
            scaled = factor / (1 - b2 ** (t + 1))
            q = self.q[axis]
            values = (q.T @ scaled @ q).diagonal() + self.eps * scaled.trace() / len(scaled)
            self.white[axis] = q @ (values**-0.5).diag() @ q.T
        return w - self.lr * rotated(self.m / (1 - b1 ** (t + 1)), self.white)


@pytest.mark.parametrize("period", [1, 7])
@pytest.mark.parametrize(("kind", "basis"), [("soap", "eigh"), ("soap", "qr"), ("kl", "eigh")])
def test_against_plain_lines(kind, basis, period):
    model, lr, betas, eps = network(), 0.01, (0.9, 0.8), 1e-4
    options = {"eps": eps, "refresh_every": period, "weight_decay": 0.0, "basis": basis}
    if kind == "soap":
        optimizer = curvlib.SOAP(model, lr, betas, **options)
    else:
        optimizer = curvlib.KLShampoo(model, lr, betas, damping=0.1, **options)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    oracles = []
    for weight in weights:
        if weight.ndim < 2:
            oracles.append(Adam(lr, betas, eps))
        else:
            oracles.append(Soap(lr, betas, eps, period, basis) if kind == "soap" else KL(lr, betas, 0.1, period))
    for t in range(50):
        gradients = step_of(optimizer, model, t)
        bases = [
            [optimizer.state[p][f"basis_0_{axis}"][0].clone() for axis in range(p.ndim)] if p.ndim > 1 else None
            for p in model.parameters()
        ]
        weights = [one(w, g, t, q) for one, w, g, q in zip(oracles, weights, gradients, bases, strict=True)]
        for found, wanted in zip(model.parameters(), weights, strict=True):
            # 1 / (eps or damping) is the condition number of the roots
            torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e4 * 50 * torch.finfo(F64).eps)


def test_soap_beside_a_peer():
    peer = pytest.importorskip("pytorch_optimizer").SOAP
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 5, bias=False).double(), nn.Linear(6, 5, bias=False).double()
    betas, options = (0.9, 0.95), {"eps": 1e-12, "weight_decay": 0.0}
    optimizer = curvlib.SOAP(ours, 0.01, betas, refresh_every=10**6, **options)
    other = peer(theirs.parameters(), 0.01, betas, precondition_frequency=10**6, **options)
    for t in range(50):
        gradient = torch.randn(5, 6, dtype=F64, generator=torch.Generator().manual_seed(t))
        ours.weight.grad, theirs.weight.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
        if t == 0:  # the peer skips its first step, and takes its statistics after it
            mine, state = optimizer.state[ours.weight], other.state[theirs.weight]
            state["Q"] = [mine[f"basis_0_{axis}"][0].clone() for axis in range(2)]
            # the peer's momentum and second moment start at its second step; so do ours, from here
            mine["momentum"].zero_()
            mine["second_0"].zero_()
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
            other.param_groups[0]["step"] = 2  # it counts the step that it skips
            with torch.no_grad():
                theirs.weight.copy_(ours.weight)
        else:
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scaling", ["samples", "gradient"])
def test_ekfac(scaling):
    model, lr, damping, beta, period = network(), 0.05, 0.05, 0.8, 3
    optimizer = curvlib.EKFAC(
        model, lr, damping=damping, beta=beta, momentum=0.9, kl_clip=None, scaling=scaling, refresh_every=period
    )
    layers = layers_of(model)
    states = [None] * len(layers)
    for t in range(50):
        x, y = batch(t)
        seen = recorded(model, x, y)
        before = [joined(layer) for layer in layers]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for place, (layer, (a, _, d, g)) in enumerate(zip(layers, seen, strict=True)):
            d = d * len(x)  # of single examples' own losses
            n, rows, columns = len(x), a.shape[-1], d.shape[-1]
            if states[place] is None:
                zero = [torch.zeros(size, size, dtype=F64) for size in (columns, rows)]
                eye = [torch.eye(size, dtype=F64) for size in (columns, rows)]
                states[place] = [*zero, *eye, torch.zeros(columns, rows, dtype=F64), torch.zeros_like(g)]
            b, aa, u, v, s, m = states[place]
            each = torch.einsum("nto,nti->noi", d, a)  # single examples' gradients
            if scaling == "samples":
                s = beta * s + (1 - beta) * ((u.T @ each @ v) ** 2).mean(0)
            b = beta * b + (1 - beta) * torch.einsum("nto,ntp->op", d, d) / n
            aa = beta * aa + (1 - beta) * torch.einsum("nti,ntj->ij", a, a) / (n * a.shape[1])
            if t % period == 0 or t <= period:
                held = optimizer.state[layer.weight]
                new_u, new_v = (eigenvectors(f, held[f"basis_0_{i}"][0].clone()) for i, f in enumerate((b, aa)))
                s = (new_u.T @ u) ** 2 @ s @ ((new_v.T @ v) ** 2).T
                u, v = new_u, new_v
            if scaling == "gradient":
                s = beta * s + (1 - beta) * (u.T @ g @ v) ** 2
            m = 0.9 * m + g
            states[place] = [b, aa, u, v, s, m]
            direction = u @ ((u.T @ m @ v) / (s / (1 - beta ** (t + 1)) + damping)) @ v.T
            torch.testing.assert_close(joined(layer), before[place] - lr * direction, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("partition", ["| o, i", "| o/3, i/2", "~o | i", "o | i", "| [o], i"])
def test_squares_of_examples_in_any_partition(partition):
    """One step: what is collected in identity bases and carried over is the rotated diagonal of the mean over examples."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False).double()
    of = "signals" if partition.startswith("| o") else "samples"
    recipe = Recipe(partition, Moment(of, average="mean"), Root(1, Damping(0.3)), block=EigenbasisBlock)
    optimizer = CurvatureOptimizer(model, recipe, lr=0.0)
    x, y = torch.randn(9, 5, dtype=F64), torch.randint(0, 4, (9,))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    (held,) = optimizer.held()
    each = torch.stack(
        [
            torch.autograd.grad(F.cross_entropy(model(a[None]), b[None]), model.weight)[0]
            for a, b in zip(x, y, strict=True)
        ]
    )
    trace = held.dense().trace() / (4 if partition.startswith("~o") else 1)
    wanted = each.square().sum((1, 2)).mean() / (4 if partition.startswith("~o") else 1)
    torch.testing.assert_close(trace, wanted, rtol=1e-12, atol=0)
    # From the second step on the bases stand: every further average is of the true rotated squares.
    blocks = held.block.layout.block(each)
    for index, region in enumerate(held.block.layout.regions):
        bases = {place.number: (place, basis) for place, basis in held.block._bases(held.state, index)}
        vectors = held.block._kron(held.state, index, bases)  # blocks f f
        given = blocks[index].unflatten(0, (9, region.blocks)).flatten(3)  # n own tied f
        squares = torch.einsum("bfg,nbtf->nbtg", vectors, given).square().mean((0, 2))
        first = 3 * held.state[f"second_{index}"][0].flatten(1) - 2 * squares  # what the first step left
        assert (first > -1e-12).all()
        torch.testing.assert_close(first.sum(), squares.sum(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("solver", ["qr", "eigh"])
@pytest.mark.parametrize("schedule", [Schedule(refresh=2), Schedule(refresh=3, stagger=True), Schedule(2, 4)])
@pytest.mark.parametrize("partition", ["| o, i", "| o/3, i/2", "~o | i", "o | i", "| [o], i", "~o/2 | i", "| (o i)"])
def test_momentum_inside_is_momentum_before(partition, schedule, solver):
    """Float64, to rounding times the digits that flat spectra lose in a turn; one weight has no gradient at times."""
    rules = [Rule(Momentum(0.9, "ema", debias=True, nesterov=True, inside=inside)) for inside in (False, True)]

    def train(rule):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(6, 4, dtype=F64)) for _ in range(3)]
        root = Root(0.5, Damping(1e-2), solver, tolerance=1.0)
        recipe = Recipe(
            partition, Moment(beta=0.9, debias=True), root, rule, schedule, axes="o i", block=EigenbasisBlock
        )
        optimizer = CurvatureOptimizer(weights, recipe, lr=0.1)
        for t in range(9):
            for number, weight in enumerate(weights):
                weight.grad = torch.randn(6, 4, dtype=F64)
                if number == 2 and t % 3 == 1:
                    weight.grad = None
            optimizer.step()
        return torch.stack([weight.detach() for weight in weights])

    torch.testing.assert_close(train(rules[1]), train(rules[0]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("solver", ["qr", "eigh"])
def test_momentum_inside_is_of_the_data_where_moments_are_of_drawn_labels(solver):
    """Steps from the same weights, whose gradients are the same to the last bit: bases of null spaces are anything."""

    def steps(inside):
        model = network()
        rule, root = Rule(Momentum(0.9, "ema", debias=True, inside=inside)), Root(0.5, 1e-2, solver, tolerance=1.0)
        moment = Moment(beta=0.9, debias=True, labels="sampled")
        recipe = Recipe("| o, i", moment, root, rule, Schedule(2, 4), block=EigenbasisBlock)
        plain = Recipe("... |", Moment(beta=0.9), Root(1, 1.0))
        optimizer = CurvatureOptimizer(model, [Route(recipe, kind="linear", role="weight"), Route(plain)], lr=0.1)
        start, taken = copy.deepcopy(model.state_dict()), []
        for t in range(9):
            x, y = batch(t)
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.observe(outputs, "categorical")
            F.cross_entropy(outputs, y).backward()
            optimizer.step()
            taken.append(torch.cat([one.detach().flatten() for one in model.parameters()]))
            model.load_state_dict(start)
        return torch.stack(taken)

    torch.testing.assert_close(steps(True), steps(False), rtol=1e-10, atol=1e-10)


def test_momentum_inside_is_refused_where_it_means_nothing():
    inside = Momentum(0.9, "ema", inside=True)
    with pytest.raises(ValueError, match="needs a block that turns, such as EigenbasisBlock; got the standard block"):
        Recipe("| o, i", rule=Rule(inside))
    with pytest.raises(ValueError, match="goes without grafting, clip; set inside=False"):
        Recipe("| o, i", rule=Rule(inside, Grafting(), clip=Clip("norm", 1.0)), block=EigenbasisBlock)
    with pytest.raises(ValueError, match="set after=False"):
        Momentum(inside=True, after=True)


def test_signs_and_order_of_a_basis_change_nothing():
    model = network()
    optimizer = curvlib.SOAP(model, 0.01, refresh_every=1000)
    for t in range(3):
        step_of(optimizer, model, t)
    moved = curvlib.SOAP(model, 0.01, refresh_every=1000)
    moved.load_state_dict(optimizer.state_dict())
    for parameter in model.parameters():
        record = moved.state[parameter]
        for axis in range(parameter.ndim if parameter.ndim > 1 else 0):
            order = torch.randperm(parameter.shape[axis])
            signs = torch.randint(0, 2, (parameter.shape[axis],)) * 2.0 - 1
            record[f"basis_0_{axis}"].copy_(record[f"basis_0_{axis}"][..., order] * signs)
            record["second_0"].copy_(record["second_0"].index_select(1 + axis, order))
            turned = signs.view(-1, *[1] * (parameter.ndim - 1 - axis))
            record["momentum"].copy_(record["momentum"].index_select(axis, order) * turned)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step_of(optimizer, model, 3)
    wanted = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    step_of(moved, model, 3)
    for parameter, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-11, atol=1e-13)


def _dense():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def _convolutional():
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("kind", "network", "options"),
    [
        (curvlib.SOAP, _dense, {"basis": "qr"}),
        (curvlib.SOAP, _dense, {"basis": "eigh"}),
        (curvlib.SOAP, _convolutional, {"basis": "qr"}),
        (curvlib.KLShampoo, _dense, {"basis": "qr"}),
        (curvlib.EKFAC, _dense, {"damping": 1e-2}),
        (curvlib.EKFAC, _convolutional, {"damping": 1e-1, "scaling": "gradient"}),
    ],
)
def test_stable_with_a_refresh_every_step_for_3000_steps(kind, network, options):
    """Where eigenvalues are sorted anew without their second moment, this diverges within a few tens of steps."""
    torch.manual_seed(0)
    model = network()
    x = torch.randn(64, 4)
    y = torch.sin(x @ torch.randn(4, 3))
    optimizer = kind(model, 3e-3, refresh_every=1, **options)
    losses = []
    for t in range(3000):
        chosen = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    # never much worse than at the start, and in the end far better, as far as the network can be
    assert max(losses) < 3 * max(losses[:10])
    assert sum(losses[-100:]) < (0.3 if network is _dense else 0.8) * sum(losses[:10]) * 10


def test_qr_follows_eigh():
    """Orthogonal iteration from step to step ends in the same curvature, and where it would not, eigh takes over."""
    found = {}
    for basis in ("qr", "eigh"):
        torch.manual_seed(0)
        model = nn.Linear(6, 5, bias=False).double()
        recipe = Recipe("| o, i", Moment(average="mean"), Root(0.5, 1e-3, basis), block=EigenbasisBlock)
        optimizer = CurvatureOptimizer(model, recipe, lr=0.0)
        scale = torch.logspace(0, 2, 5, dtype=F64)[:, None]
        for t in range(200):
            model.weight.grad = scale * torch.randn(5, 6, dtype=F64, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        factor = optimizer.state[model.weight]["factor_0_0"][0]
        q = optimizer.state[model.weight]["basis_0_0"][0]
        inside = q.T @ factor @ q
        found[basis] = (inside - inside.diagonal().diag()).norm() / factor.norm()
        assert optimizer.health().kept == {} or not any(optimizer.health().kept.values())
    assert found["eigh"] < 1e-12
    assert found["qr"] < 0.1  # the tolerance of a root, beyond which eigh is asked


@pytest.mark.parametrize("period", [1, 10])
def test_a_refresh_by_qr_is_never_worse_than_none(period):
    """What is left off the diagonal falls at a refresh, in float32 and with the first bases those of few gradients."""

    def left(q, factor):
        inside = (q.T @ factor @ q).double()
        return float((inside - inside.diagonal().diag()).norm() / factor.norm())

    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10))
        optimizer, weight = curvlib.SOAP(model, 3e-3, refresh_every=period), model[0].weight
        teacher, scale = torch.randn(32, 10), torch.logspace(0, -1.5, 32)
        for t in range(31):
            x = torch.randn(64, 32, generator=torch.Generator().manual_seed(100 * seed + t)) * scale
            old = [optimizer.state[weight][f"basis_0_{a}"][0].clone() for a in (0, 1)] if t else None
            optimizer.zero_grad()
            F.cross_entropy(model(x), (x @ teacher).argmax(1)).backward()
            optimizer.step()
            if old is not None and t % period == 0:
                state = optimizer.state[weight]
                for axis in (0, 1):
                    factor, new = state[f"factor_0_{axis}"][0], state[f"basis_0_{axis}"][0]
                    assert left(new, factor) <= 1.02 * left(old[axis], factor)


@pytest.mark.parametrize("kind", [curvlib.SOAP, curvlib.KLShampoo])
@pytest.mark.parametrize("period", [1, 10])
def test_a_network_whose_head_starts_at_zero_is_trained(kind, period):
    """The first gradients of all other layers are zero; the first that are not set the scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    nn.init.zeros_(model[2].weight)
    optimizer = kind(model, 1e-2, refresh_every=period)
    teacher = torch.randn(6, 3)
    for t in range(60):
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(t))
        before = model[0].weight.detach().clone()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), (x @ teacher).argmax(1))
        loss.backward()
        optimizer.step()
        moved = (model[0].weight.detach() - before).square().mean().sqrt()
        assert moved <= 3e-2, f"step {t} is {moved / 1e-2:.0f} times lr"
    assert loss < 0.8


def test_factors_of_kl_shampoo_are_the_maximum_likelihood_ones():
    """Gradients A Z Bᵀ with white Z have the covariance AAᵀ ⊗ BBᵀ, up to the scale that the factors share."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 4, dtype=F64), torch.randn(3, 3, dtype=F64)
    model = nn.Linear(3, 4, bias=False).double()
    recipe = Recipe("| o, i", Moment(beta=0.998, debias=True), Root(0.5, Damping(1e-6, "trace")), block=LikelihoodBlock)
    optimizer = CurvatureOptimizer(model, recipe, lr=0.0)
    for t in range(1500):
        z = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(t))
        model.weight.grad = a @ z @ b.T
        optimizer.step()
    found = optimizer.curvature(model)
    wanted = torch.kron(a @ a.T, b @ b.T)
    # about 500 gradients of 12 entries count: errors of their covariance are of the order of sqrt(12 / 500)
    assert (found - wanted).norm() / wanted.norm() < 3 * math.sqrt(12 / 500)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("block", [EigenbasisBlock, RunningEigenbasisBlock])
def test_the_block(block, exponent):
    recipe = Recipe("| o, i", Moment(composition="trace"), Root(exponent, Damping(1.0)))
    check_block(block, recipe=recipe, partitions=["| o, i", "~o | i", "| o/2, i/3", "| [o], i"], examples=12)


def test_the_likelihood_block_with_one_factor_is_the_standard_block():
    check_block(LikelihoodBlock, partitions=["| ...", "o | i", "~o | i"], examples=12)


@pytest.mark.parametrize(
    "kind",
    [
        curvlib.SOAP,
        curvlib.KLShampoo,
        curvlib.EKFAC,
        lambda model: curvlib.EKFAC(model, scaling="gradient"),
        lambda model: curvlib.SOAP(model, refresh_every=3, block_size=2, kernels="merged"),
        lambda model: curvlib.KLShampoo(model, refresh_every=3, block_size=2, kernels="inputs"),
    ],
)
def test_the_kit(kind):
    check_recipe(kind, examples=2)


def test_staggered_bases_carry_their_moments():
    """A period that is spread over its steps moves some rows at a time; the sum of second moments stays."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(5, 5, bias=False) for _ in range(4)]).double()
    recipe = Recipe(
        "| o/2, i/2",
        Moment(average="sum"),
        Root(0.5, 1e-3),
        schedule=Schedule(refresh=4, stagger=True),
        block=EigenbasisBlock,
    )
    optimizer = CurvatureOptimizer(model, [Route(recipe)], lr=0.0)
    total = 0.0
    for t in range(12):
        generator = torch.Generator().manual_seed(t)
        for layer in model:
            layer.weight.grad = torch.randn(5, 5, dtype=F64, generator=generator)
            total += layer.weight.grad.square().sum()
        optimizer.step()
        found = sum(held.dense().trace() for held in optimizer.held())
        torch.testing.assert_close(found, total, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("| o, i", Moment("signals"), block=LikelihoodBlock), "LikelihoodBlock fills independent factors"),
        (Recipe("| o, i", root=Root(1, Damping(1e-3, outside=True)), block=LikelihoodBlock), "outside=False"),
        (Recipe("| o, i", root=Root(1, Damping(1e-3, split="pi")), block=EigenbasisBlock), "split=None"),
        (Recipe("| o, i", root=Root(0.5, solver="qr")), "solver='qr' does not compute the power -0.5"),
    ],
)
def test_what_makes_no_sense_is_refused(recipe, message):
    model = nn.Linear(3, 2, bias=False)

    def train():
        optimizer = CurvatureOptimizer(model, recipe)
        F.cross_entropy(model(torch.randn(4, 3)), torch.randint(0, 2, (4,))).backward()
        optimizer.step()

    with pytest.raises(ValueError, match=message):
        train()
