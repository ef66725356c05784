"""AdaHessian, Sophia-H and step sizes of layers against dense Hessians in plain lines."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from torch.func import functional_call, hessian
from torch.nn import functional as F

import curvlib
from curvlib import Clip, CurvatureOptimizer, Moment, Recipe, Root, Route, Rule, TapError
from curvlib.layerwise import Layerwise
from curvlib.optimizers import layerwise
from curvlib.passes import rademacher
from curvlib.quadratic import Quadratic
from curvlib.testing import check_recipe
from tests.optimizers.oracles import F64
from tests.optimizers.test_tnt import batch, network


def small():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 2, 2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(2, 3)
    ).double()


def dense_hessian(model, x, y):
    """The Hessian of the mean loss over all parameters, flat in their order."""
    names, sizes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector):
        parts = vector.split([size.numel() for size in sizes])
        values = {name: part.view(size) for name, part, size in zip(names, parts, sizes, strict=True)}
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    return hessian(loss)(flat)


def signs_of(model, generator):
    return torch.cat([rademacher(p.detach(), generator).flatten() for p in model.parameters()])


def observed_step(optimizer, model, t, reduction="mean", size=10):
    x, y = batch(t)
    optimizer.zero_grad()
    for inputs, labels in zip(x.split(size), y.split(size), strict=True):
        loss = F.cross_entropy(model(inputs), labels, reduction=reduction)
        optimizer.observe(loss=loss, generator=torch.Generator().manual_seed(t))
        loss.backward(retain_graph=optimizer.needs_graph)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    return gradient


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("pooling", ["mean", "absolute", None])
@pytest.mark.parametrize(("power", "every"), [(1.0, 1), (0.5, 3)])
def test_adahessian(pooling, power, every):
    model, lr, (b1, b2), eps, decay = small(), 0.05, (0.8, 0.9), 1e-3, 0.1
    optimizer = curvlib.AdaHessian(
        model, lr, (b1, b2), eps, decay, power=power, pooling=pooling, statistics_every=every
    )
    m = v = torch.zeros_like(flat(model))
    updates = 0
    for t in range(50):
        x, y = batch(t)
        w, h = flat(model), dense_hessian(model, x, y)
        z = signs_of(model, torch.Generator().manual_seed(t))
        d = z * (h @ z)
        if pooling is not None:  # the first sixteen entries are four kernels of four
            kernels = d[:16].view(4, 4)
            kernels = kernels.abs() if pooling == "absolute" else kernels
            d = torch.cat([kernels.mean(1).repeat_interleave(4), d[16:]])
        g = observed_step(optimizer, model, t)
        m = b1 * m + (1 - b1) * g
        if t % every == 0:
            v, updates = b2 * v + (1 - b2) * d**2, updates + 1
        denominator = (v / (1 - b2**updates)) ** (power / 2) + eps
        wanted = (1 - lr * decay) * w - lr * m / (1 - b1 ** (t + 1)) / denominator
        torch.testing.assert_close(flat(model), wanted, rtol=1e-9, atol=1e-11)


def test_sophia_h():
    model, lr, (b1, b2), gamma, decay, eps, every = small(), 0.02, (0.8, 0.9), 0.5, 0.1, 1e-12, 3
    optimizer = curvlib.SophiaH(model, lr, (b1, b2), gamma, decay, statistics_every=every, eps=eps)
    m = h = torch.zeros_like(flat(model))
    clipped = 0
    for t in range(50):
        x, y = batch(t)
        w, dense = flat(model), dense_hessian(model, x, y)
        z = signs_of(model, torch.Generator().manual_seed(t))
        g = observed_step(optimizer, model, t)
        if t % every == 0:
            h = b2 * h + (1 - b2) * z * (dense @ z)
        m = b1 * m + (1 - b1) * g
        ratio = m / (gamma * h.clamp_min(0) + eps)
        clipped += (ratio.abs() > 1).sum().item()
        wanted = (1 - lr * decay) * w - lr * ratio.clamp(-1, 1)
        torch.testing.assert_close(flat(model), wanted, rtol=1e-9, atol=1e-11)
    assert 0 < clipped < 50 * len(m)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("every", [1, 4])
def test_step_sizes_of_layers(kind, every):
    model, lr, mu, damping, beta, largest = small(), 0.7, 0.8, 0.05, 0.6, 2.0
    options = {"damping": damping, "beta": beta, "largest": largest, "every": every}
    if kind == "sgd":
        optimizer = curvlib.LayerwiseSGD(model, lr, momentum=mu, **options)
    else:
        optimizer = curvlib.LayerwiseAdamW(model, lr, (mu, 0.9), 1e-3, **options)
    sizes = [p.numel() for p in model.parameters()]
    bounds = [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    m = v = torch.zeros_like(flat(model))
    kept = [torch.zeros(3, dtype=F64) for _ in sizes]
    limited = 0
    for t in range(50):
        x, y = batch(t)
        w, h = flat(model), dense_hessian(model, x, y)
        g = observed_step(optimizer, model, t)
        m = mu * m + (1 - mu) * g
        direction = m / (1 - mu ** (t + 1))
        if kind == "adamw":
            v = 0.9 * v + 0.1 * g**2
            direction = direction / ((v / (1 - 0.9 ** (t + 1))).sqrt() + 1e-3)
        wanted = w.clone()
        for layer, (first, last) in enumerate(bounds):
            d, block = direction[first:last], h[first:last, first:last]
            if t == 0 or (t + layer) % every == 0:
                new = torch.stack([g[first:last] @ d, d @ block @ d, d @ d])
                kept[layer] = beta * kept[layer] + (1 - beta) * new if t else new
            slope, bend, square = kept[layer]
            alpha = (slope.clamp_min(0) / (bend.clamp_min(0) + damping * square)).clamp_max(largest)
            limited += bool(alpha == largest)
            wanted[first:last] -= lr * alpha * d
        torch.testing.assert_close(flat(model), wanted, rtol=1e-8, atol=1e-10)
    assert 0 < limited < 50 * len(sizes)


def test_any_method_takes_step_sizes_of_layers():
    """Packed directions: Shampoo's, whose step is scaled matrix by matrix."""
    model, plain = network(), network()
    options = {"momentum": 0.0, "grafting": None, "damping": 1e-2, "vectors": "kronecker", "refresh_every": 1}
    optimizer = layerwise(curvlib.Shampoo(model, lr=1.0, **options), Layerwise(every=1, beta=0.0))
    optimizer, model = pickle.loads(pickle.dumps((optimizer, model)))
    optimizer.attach(model)
    other = curvlib.Shampoo(plain, lr=1.0, **options)
    x, y = batch(0)
    h, before = dense_hessian(model, x, y), flat(model)
    g = observed_step(optimizer, model, 0)
    observed_step(other, plain, 0)
    first = 0
    for parameter in model.parameters():
        last = first + parameter.numel()
        d = (before - flat(plain))[first:last]
        alpha = (g[first:last] @ d).clamp_min(0) / ((d @ h[first:last, first:last] @ d).clamp_min(0) + 1e-3 * d @ d)
        found = (before - flat(model))[first:last]
        torch.testing.assert_close(found, alpha.clamp_max(1.0) * d, rtol=1e-8, atol=1e-10)
        first = last


def test_what_can_not_take_them_is_refused():
    model = network()
    optimizer = curvlib.KFAC(model)
    with pytest.raises(ValueError, match="set clip=None"):
        layerwise(optimizer)
    observed_step(optimizer, model, 0)  # nothing was changed
    with pytest.raises(RuntimeError, match="before the first step"):
        layerwise(optimizer)


@pytest.mark.parametrize("kind", [curvlib.AdaHessian, curvlib.SophiaH, curvlib.LayerwiseSGD])
def test_sums_and_micro_batches(kind):
    """The Hessian of a sum, and that of halves with the same signs, are told apart by the reduction."""
    found = []
    for reduction, way, size in (("mean", "mean", 10), ("sum", "sum", 10), (2.0, "mean", 5)):
        model = small()
        optimizer = kind(model, reduction=reduction)
        optimizer.batch_size = 10
        for t in range(3):
            observed_step(optimizer, model, t, way, size)
        found.append(flat(model))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [curvlib.AdaHessian, curvlib.SophiaH, curvlib.LayerwiseSGD, curvlib.LayerwiseAdamW])
def test_the_kit(kind):
    check_recipe(kind, examples=2)


def test_what_is_missing_is_said():
    model = network()
    x, y = batch(0)
    for kind, message in (
        (curvlib.AdaHessian, r"statistics of the Hessian's diagonal are due: call optimizer.observe\(loss=loss\)"),
        (curvlib.LayerwiseSGD, r"step sizes of layers need optimizer.observe\(loss=loss\)"),
    ):
        optimizer = kind(model)
        F.cross_entropy(model(x), y).backward()
        with pytest.raises(TapError, match=message):
            optimizer.step()
    optimizer = curvlib.LayerwiseSGD(model)
    loss = F.cross_entropy(model(x), y)
    optimizer.observe(loss=loss)
    loss.backward()
    with pytest.raises(TapError, match=r"retain_graph=optimizer.needs_graph"):
        optimizer.step()
    with pytest.raises(ValueError, match="loss must be a number with its graph"):
        optimizer.observe(loss=model(x))
    with pytest.raises(ValueError, match="observe takes outputs=, loss=, or both"):
        optimizer.observe()


def test_nothing_is_evaluated_where_nothing_is_due():
    model = small()
    optimizer = curvlib.SophiaH(model, statistics_every=4)
    for t in range(6):
        x, y = batch(t)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        calls = []
        loss.register_hook(lambda g, calls=calls: calls.append(1))
        optimizer.observe(loss=loss)
        assert bool(calls) == (t % 4 == 0)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("o | i", Moment("hessian")), "of='hessian' needs a diagonal partition"),
        (lambda: Moment(order=1), "order=1 and pooling need of='hessian'"),
        (lambda: Moment("hessian", pooling="max"), "pooling"),
        (lambda: Moment("hessian", centered=True), "centered=True"),
        (lambda: Rule(model=Layerwise(), clip=Clip("norm", 1.0)), "set clip=None"),
        (lambda: Rule(curvlib.Momentum(), model=Quadratic()), "set momentum=None"),
        (lambda: Layerwise(largest=0.0), "largest"),
        (lambda: Layerwise(every=0), "every"),
        (lambda: curvlib.AdaHessian(small(), power=0.0), "power"),
        (lambda: curvlib.SophiaH(small(), gamma=0.0), "gamma"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_that_is_linear_has_no_curvature():
    model = torch.nn.Linear(3, 1).double()
    optimizer = CurvatureOptimizer(model, [Route(Recipe("... |", Moment("hessian"), Root(1, 0.5)))], lr=1.0)
    before = flat(model)
    loss = model(torch.ones(2, 3, dtype=F64)).sum()
    optimizer.observe(loss=loss)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(flat(model), before - 2 / 0.5)


@pytest.mark.parametrize(
    "kind",
    [curvlib.AdaHessian, curvlib.SophiaH, curvlib.LayerwiseSGD, curvlib.LayerwiseAdamW],
    ids=lambda k: k.__name__,
)
def test_gradients_with_a_graph_will_do_as_well(kind):
    """The authors' own loop, loss.backward(create_graph=True), is what observing the loss is."""
    found = []
    for observed in (True, False):
        model = small()
        optimizer = kind(model)
        for t in range(4):
            x, y = batch(t)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if observed:
                optimizer.observe(loss=loss)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
                loss.backward(retain_graph=optimizer.needs_graph) if observed else loss.backward(create_graph=True)
            optimizer.step()
        found.append(flat(model))
        optimizer.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(TapError, match=r"backward\(create_graph=True\)"):
        [optimizer.step() for _ in range(10)]
