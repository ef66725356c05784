"""KFAC against its equations in plain lines, against dense solves, and against the theorems about it."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import KFAC, Damping, Moment, Recipe, Root, Rule, TapError
from curvlib.blocks import EigenBlock
from tests.listening import F64, listen, recipe_of, sample_gradients, targets_of

KRONECKER = "| o, i k..."


def perceptron(*widths, act=nn.Tanh, seed=0):
    torch.manual_seed(seed)
    layers = []
    for one, two in pairwise(widths):
        layers += [nn.Linear(one, two), act()]
    return nn.Sequential(*layers[:-1]).double()


def blocks(model, gradients, n):
    """The exact curvature of every layer, its bias after its weight."""
    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            prefix = f"{name}." if name else ""
            rows = [gradients[f"{prefix}{role}"].flatten(1) for role, _ in module.named_parameters(recurse=False)]
            flat = torch.cat(rows, 1)
            yield module, flat.T @ flat / n


def held(model, recipe, x, likelihood="gaussian", loss=None, scale=1.0):
    optimizer = curvlib.CurvatureOptimizer(model, recipe, lr=0.0)
    outputs = model(x)
    optimizer.observe(outputs, likelihood, scale=scale)
    (outputs.sum() if loss is None else loss(outputs)).backward()
    optimizer.step()
    return optimizer


# -- theorems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["data", "exact"])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_of_one_example_it_is_the_exact_block(labels, likelihood):
    model = perceptron(4, 5, 3)
    x = torch.randn(1, 4, dtype=F64)
    y = targets_of(model(x), likelihood)
    gradients = sample_gradients(model, x, y, likelihood, labels)
    recipe = recipe_of(KRONECKER, "signals", labels=labels, join_bias=True)
    optimizer = listen(model, recipe, x, y, likelihood)
    for module, exact in blocks(model, gradients, 1):
        torch.testing.assert_close(optimizer.curvature(module), exact, rtol=1e-12, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 6), st.integers(0, 100))
def test_of_deep_linear_networks_with_squared_error_it_is_the_exact_block(widths, n, seed):
    model = perceptron(*widths, act=nn.Identity, seed=seed)
    x = torch.randn(n, widths[0], dtype=F64)
    gradients = sample_gradients(model, x, model(x).detach(), "gaussian", "exact")
    optimizer = held(model, recipe_of(KRONECKER, "signals", labels="exact", join_bias=True), x)
    for module, exact in blocks(model, gradients, n):
        size = float(exact.abs().max())
        torch.testing.assert_close(optimizer.curvature(module), exact, rtol=1e-12, atol=1e-12 * size)


class Sequence(nn.Module):
    """A deep linear network on sequences, with outputs at every position or of their mean."""

    def __init__(self, pooled):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.pooled = nn.Linear(3, 4), nn.Linear(4, 2), pooled
        self.double()

    def forward(self, x):
        y = self.second(self.first(x))
        return y.mean(1) if self.pooled else y


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_expand_is_exact_for_losses_of_positions_and_reduce_for_pooled_ones(pooled, sharing):
    model = Sequence(pooled)
    x = torch.randn(5, 4, 3, dtype=F64)
    flat = nn.Sequential(model, nn.Flatten())
    gradients = sample_gradients(flat, x, flat(x).detach(), "gaussian", "exact")
    gradients = {name.removeprefix("0."): value for name, value in gradients.items()}
    recipe = recipe_of(KRONECKER, "signals", labels="exact", sharing=sharing, join_bias=True)
    optimizer = held(model, recipe, x)
    for module, exact in blocks(model, gradients, 5):
        error = float((optimizer.curvature(module) - exact).norm() / exact.norm())
        assert error < 1e-12 if pooled == (sharing == "reduce") else error > 0.1


def test_reduce_is_exact_for_a_linear_convolution_with_pooling():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x = torch.randn(4, 2, 5, 5, dtype=F64)
    gradients = sample_gradients(model, x, model(x).detach(), "gaussian", "exact")
    optimizer = held(model, recipe_of(KRONECKER, "signals", labels="exact", sharing="reduce", join_bias=True), x)
    for module, exact in blocks(model, gradients, 4):
        torch.testing.assert_close(optimizer.curvature(module), exact, rtol=1e-12, atol=1e-13)


def test_drawn_labels_tend_to_exact_ones_like_one_over_the_root_of_their_number():
    model = perceptron(3, 4, 3)
    x = torch.randn(5, 3, dtype=F64)
    exact = held(model, recipe_of("| ...", labels="exact", join_bias=True), x, "categorical")
    errors = []
    for count in (100, 6400):
        optimizer = curvlib.CurvatureOptimizer(model, recipe_of("| ...", labels="sampled", join_bias=True), lr=0.0)
        many = x.repeat(count, 1)
        outputs = model(many)
        optimizer.observe(outputs, "categorical", generator=torch.Generator().manual_seed(0))
        outputs.sum().backward()
        optimizer.step()
        wanted = exact.curvature(model[0])
        errors.append(float((optimizer.curvature(model[0]) - wanted).norm() / wanted.norm()))
    assert errors[0] < 0.5
    assert 0.2 < errors[0] / errors[1] / math.sqrt(64) < 5


@pytest.mark.parametrize("labels", ["data", "exact"])
def test_the_undamped_step_does_not_depend_on_an_affine_change_of_inputs(labels):
    torch.manual_seed(0)
    x, y = torch.randn(40, 3, dtype=F64), torch.randint(0, 3, (40,))
    mix, shift = torch.randn(3, 3, dtype=F64), torch.randn(3, dtype=F64)
    plain = perceptron(3, 4, 3)
    changed = copy.deepcopy(plain)
    with torch.no_grad():  # the same function of z = x mix + shift
        changed[0].weight.copy_(plain[0].weight @ torch.linalg.inv(mix).T)
        changed[0].bias.copy_(plain[0].bias - changed[0].weight @ shift)
    outputs = []
    for model, inputs in ((plain, x), (changed, x @ mix + shift)):
        recipe = recipe_of(KRONECKER, "signals", labels=labels, join_bias=True)
        recipe = Recipe(KRONECKER, recipe.moment, Root(1, Damping(1e-300)), join_bias=True)
        optimizer = curvlib.CurvatureOptimizer([{"params": model[0].parameters()}], recipe, lr=1e-2, model=model)
        logits = model(inputs)
        optimizer.observe(logits, "categorical")
        F.cross_entropy(logits, y).backward()
        optimizer.step()
        outputs.append(model(inputs))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-8, atol=1e-9)
    assert (outputs[0] - logits.detach()).abs().max() > 1e-4


# -- the step ---------------------------------------------------------------------------------------------------------


def plain_kfac(model, batches, split, lr=0.1, damping=0.01, beta=0.95, mu=0.9, every=1, clip=1e-2):
    """The equations of the class docstring for a perceptron, one layer after another."""
    layers = [module for module in model if isinstance(module, nn.Linear)]
    state = [{} for _ in layers]
    for step, (x, y) in enumerate(batches):
        inputs, outputs, value = [], [], x
        for module in model:
            if isinstance(module, nn.Linear):
                inputs.append(torch.cat([value, value.new_ones(len(value), 1)], 1).detach())
            value = module(value)
            if isinstance(module, nn.Linear):
                value.retain_grad()
                outputs.append(value)
        model.zero_grad()
        F.cross_entropy(value, y).backward()
        moves = []
        for module, a, out, held_ in zip(layers, inputs, outputs, state, strict=True):
            delta, n = out.grad * len(x), len(x)
            for name, new in (("A", a.T @ a / n), ("B", delta.T @ delta / n)):
                held_[name] = beta * held_.get(name, 0) + (1 - beta) * new
            gradient = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
            held_["M"] = mu * held_.get("M", 0) + gradient
            if step % every == 0:
                big_a, big_b = (held_[name] / (1 - beta ** (step + 1)) for name in "AB")
                pi = ((big_a.trace() / len(big_a)) / (big_b.trace() / len(big_b))).sqrt() if split == "pi" else 1.0
                share = damping if split is None else damping**0.5
                held_["roots"] = (
                    torch.linalg.inv(big_b + share / pi * torch.eye(len(big_b), dtype=F64)),
                    torch.linalg.inv(big_a + share * pi * torch.eye(len(big_a), dtype=F64)),
                )
            moves.append((module, held_["M"], held_["roots"][0] @ held_["M"] @ held_["roots"][1]))
        size = sum(float((d * m).sum()) for _, m, d in moves) * lr**2
        shrink = 1.0 if clip is None or size <= 0 else min(1.0, math.sqrt(clip / size))
        with torch.no_grad():
            for module, _, direction in moves:
                module.weight -= lr * shrink * direction[:, :-1]
                module.bias -= lr * shrink * direction[:, -1]


def batches(count, width=4, classes=3, n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, width, dtype=F64, generator=generator), torch.randint(0, classes, (n,), generator=generator))
        for _ in range(count)
    ]


def train(model, optimizer, data, labels="data"):
    for x, y in data:
        optimizer.zero_grad()
        logits = model(x)
        if labels != "data":
            optimizer.observe(logits, "categorical")
        F.cross_entropy(logits, y).backward()
        optimizer.step()


def same(one, two, rtol=1e-9):
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("split", ["pi", "sqrt", None])
@pytest.mark.parametrize(("clip", "every"), [(1e-2, 1), (None, 3)])
def test_every_step_is_the_equations(split, clip, every):
    model = perceptron(4, 5, 3)
    twin = copy.deepcopy(model)
    lr = 0.01
    plain_kfac(twin, batches(6), split, lr=lr, clip=clip, every=every)
    optimizer = KFAC(model, lr, damping=0.01, split=split, kl_clip=clip, refresh_every=every, dense_start=False)
    train(model, optimizer, batches(6))
    same(model, twin)


@pytest.mark.parametrize("partition", ["| o, i", "| o/2, i/3", "o | i", "| [o], i", "| ..."])
def test_the_eigen_form_is_the_dense_solve(partition):
    model = perceptron(4, 5)
    of = "samples" if partition in ("o | i", "| ...") else "signals"
    recipe = Recipe(partition, Moment(of, average="mean"), Root(1, 0.05), Rule(), join_bias=True, block=EigenBlock)
    optimizer = curvlib.Preconditioner(model, recipe)
    x, y = batches(1, classes=5, n=20)[0]
    F.cross_entropy(model(x), y).backward()
    gradient = torch.cat([model[0].weight.grad.flatten(), model[0].bias.grad])
    optimizer.step()
    direction = torch.cat([model[0].weight.grad.flatten(), model[0].bias.grad])
    dense = optimizer.curvature(model[0])
    expected = torch.linalg.solve(dense + 0.05 * torch.eye(len(dense), dtype=F64), gradient)
    torch.testing.assert_close(direction, expected, rtol=1e-9, atol=1e-11)
    assert optimizer.health().ok


def test_inverse_and_eigen_form_agree_where_there_is_one_factor():
    models = [perceptron(4, 5, 3) for _ in range(2)]
    for model, block in zip(models, (None, EigenBlock), strict=True):
        recipe = Recipe("o | i", Moment("samples"), Root(1, Damping(0.1, "layer")), Rule(), join_bias=True, block=block)
        train(model, curvlib.CurvatureOptimizer(model, recipe, 0.1), batches(4))
    same(*models)


def test_cut_factors_are_stored_once_for_all_blocks_that_share_them():
    model = nn.Linear(7, 5).double()
    recipe = recipe_of("| o/2, i/3", "signals", join_bias=True)
    x = torch.randn(9, 7, dtype=F64)
    optimizer = held(model, recipe, x, loss=lambda z: z.square().sum(1).mean())
    record = optimizer.state[model.weight]
    count = sum(record[name].shape[0] for name in record if name.startswith("factor"))
    assert count == 3 + 3  # P + Q, not P·Q
    big_a = torch.cat([x, torch.ones(9, 1, dtype=F64)], 1)
    big_a, delta = big_a.T @ big_a / 9, 2 * model(x).detach()
    big_b = delta.T @ delta / 9
    for matrix, pieces in ((big_a, (3, 3, 2)), (big_b, (2, 2, 1))):
        matrix *= torch.block_diag(*(torch.ones(size, size, dtype=F64) for size in pieces))
    dense = optimizer.curvature(model)
    order = torch.cat([torch.arange(40).view(5, 8)[:, :7].flatten(), torch.arange(40).view(5, 8)[:, 7]])
    torch.testing.assert_close(dense, torch.kron(big_b, big_a)[order][:, order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_the_scale_of_factors_does_not_depend_on_how_often_examples_are_repeated(sharing):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(27, 3)).double()
    x, y = torch.randn(5, 2, 4, 4, dtype=F64), torch.randint(0, 3, (5,))
    recipe = recipe_of(KRONECKER, "signals", sharing=sharing, join_bias=True)
    held_ = []
    for times in (1, 3):
        optimizer = listen(
            model, recipe, x.repeat(times, 1, 1, 1), y.repeat(times), reduction="sum" if times > 1 else "mean"
        )
        held_.append([optimizer.curvature(model[0]), optimizer.curvature(model[2])])
        optimizer.detach()
    for one, two in zip(*held_, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("labels", ["data", "sampled", "exact"])
@pytest.mark.parametrize(("every", "subsample", "stop"), [(1, 1, 4), (2, 3, 3), (3, 2, 2)])
def test_resumed_is_uninterrupted(labels, every, subsample, stop):
    data = batches(7)
    settings_ = dict(labels=labels, refresh_every=2, statistics_every=every, subsample=subsample)
    whole = perceptron(4, 5, 3)
    train(whole, KFAC(whole, **settings_), data, labels)
    model = perceptron(4, 5, 3)
    optimizer = KFAC(model, **settings_)
    train(model, optimizer, data[:stop], labels)
    again = perceptron(4, 5, 3)
    again.load_state_dict(model.state_dict())
    resumed = KFAC(again, **settings_)
    resumed.load_state_dict(optimizer.state_dict())
    train(again, resumed, data[stop:], labels)
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_other_layers_have_their_diagonal_or_follow_their_momentum():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(6, 4), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 5), nn.BatchNorm1d(5)
    ).double()
    with pytest.warns(curvlib.TapWarning, match="mixes examples"):
        optimizer = KFAC(model, 0.05, refresh_every=1)
    routes = optimizer.routing()
    assert routes["0.weight"].startswith("| [v], d")
    assert routes["3.bias"] == "joined to 3.weight"
    losses = []
    x, y = torch.randint(0, 6, (64, 3)), torch.randint(0, 5, (64,))
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert optimizer.health().ok


# -- the quadratic model ----------------------------------------------------------------------------------------------


def exact_matrix(model, x):
    """(exact Fisher of the batch over all parameters, names in order)."""
    logits = model(x)
    gradients = sample_gradients(model, x, None, "categorical", "exact") if logits is not None else {}
    flat = torch.cat([gradients[name].flatten(1) for name, _ in model.named_parameters()], 1)
    return flat.T @ flat / len(x)


def vector(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_step_and_momentum_minimise_the_exact_quadratic_model():
    model = perceptron(4, 5, 3)
    damping = 0.1
    optimizer = KFAC(model, 1.0, damping=damping, labels="exact", quadratic=True, refresh_every=1)
    last = None
    for x, y in batches(4):
        before = vector(model.parameters()).clone()
        fisher = exact_matrix(model, x) + damping * torch.eye(len(before), dtype=F64)
        optimizer.zero_grad()
        logits = model(x)
        optimizer.observe(logits, "categorical")
        F.cross_entropy(logits, y).backward()
        slope = vector(parameter.grad for parameter in model.parameters())
        optimizer.step()
        update = vector(model.parameters()) - before
        # At the minimum over a plane the model's slope is orthogonal to every vector of it.
        tangent = slope + fisher @ update
        assert abs(float(tangent @ update)) < 1e-9 * float(slope.norm() * update.norm())
        if last is not None:
            assert abs(float(tangent @ last)) < 1e-9 * float(slope.norm() * last.norm())
            assert float(last.norm()) > 0
        assert float(slope @ update + update @ fisher @ update / 2) < 0
        last = update


def step_twice(optimizer, closure):
    for _ in range(2):
        closure()
        optimizer.step()


def test_the_damping_follows_the_loss():
    model = perceptron(4, 5, 3)
    optimizer = KFAC(model, 1.0, damping=10.0, labels="exact", quadratic=True, adapt_every=2, refresh_every=1)
    x, y = batches(1, n=32)[0]

    def closure():
        optimizer.zero_grad()
        logits = model(x)
        optimizer.observe(logits, "categorical")
        loss = F.cross_entropy(logits, y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure)) for _ in range(8)]
    assert losses == sorted(losses, reverse=True)
    # A damping that is far too strong makes the model right, ρ near 1: four times λ <- λ (19/20)²
    assert optimizer.param_groups[0]["damping"] == pytest.approx(10.0 * (19 / 20) ** 8)
    with pytest.raises(TapError, match=r"step\(closure\)"):
        step_twice(optimizer, closure)


def test_bad_settings_are_named():
    model = perceptron(3, 2)
    with pytest.raises(ValueError, match="form must be one of 'inverse', 'eigen', got 'cholesky'"):
        KFAC(model, form="cholesky")
    with pytest.raises(ValueError, match=r"adapt_every=5 .*quadratic=True"):
        KFAC(model, adapt_every=5)
    with pytest.raises(ValueError, match="labels must be one of 'data', 'sampled', 'exact', got 'true'"):
        KFAC(model, labels="true")
    with pytest.raises(ValueError, match=r"0\.weight: of='signals' fills every factor from one signal.*got partition"):
        curvlib.CurvatureOptimizer(model, Recipe("| (o i)", Moment("signals"), join_bias=False))
    optimizer = KFAC(model, quadratic=True)
    model(torch.randn(2, 3, dtype=F64)).sum().backward()
    with pytest.raises(TapError, match="observe"):
        optimizer.step()
    with pytest.raises(ValueError, match="a quadratic model needs a likelihood"):
        optimizer.observe(model(torch.randn(2, 3, dtype=F64)))


def test_without_a_model_it_warns_once_and_uses_gradients():
    model = perceptron(3, 4, 2)
    with pytest.warns(curvlib.TapWarning, match=r"its layer is unknown.*attach") as caught:
        optimizer = KFAC(model.parameters())
    assert len(caught) == 1
    train(model, optimizer, batches(3, width=3, classes=2))
    weights, vectors = [list(optimizer.routing().values())[place::2] for place in (0, 1)]
    assert all("on the batch gradient" in why for why in weights)
    assert all("not preconditioned" in why for why in vectors)  # their gradients are followed as they are


def test_a_copied_optimizer_hears_nothing_until_it_is_attached():
    model = perceptron(3, 4, 2)
    optimizer = KFAC(model)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    data = batches(3, width=3, classes=2)
    with pytest.raises(TapError, match=r"call attach\(model\)"):
        train(twin, twin_optimizer, data)
    twin_optimizer.attach(twin)
    train(twin, twin_optimizer, data)
    train(model, optimizer, data)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)
