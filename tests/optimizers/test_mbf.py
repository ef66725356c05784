"""MBF against plain lines: groupings, kernels, the diagonal rule, schedules, the warm start."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib.optimizers.mbf import LINEAR_BLOCKS, PUBLISHED
from tests.optimizers.oracles import F64, MBF, AuthorsDiagonal, linear_blocks

# Inverses of F + λI carry c·κ·u, κ at most λmax(F)/λ; gradients here are below 10 and λ is 1e-2.
TOLERANCE = 1e2 * 1e4 * torch.finfo(F64).eps


def flat(module, attribute="data"):
    """[W, b] of a linear layer, row-major."""
    weight, bias = getattr(module.weight, attribute), getattr(module.bias, attribute)
    return torch.cat([weight, bias[:, None]], 1).flatten().clone()


def drawn_network(data):
    widths = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
    modules = [module for layer in layers for module in (layer, nn.Tanh())]
    if data.draw(st.booleans()):
        modules.insert(1, nn.LayerNorm(widths[1]))
    return nn.Sequential(*modules).double(), widths


SETTINGS = dict(relative_damping=False, grafting=None, heavy_ball=True, debias=False)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_linear_layers_follow_plain_lines(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    model, widths = drawn_network(data)
    grouping = data.draw(st.sampled_from(sorted(LINEAR_BLOCKS)))
    shared = dict(lr=1e-3, damping=1e-2, beta=data.draw(st.sampled_from([0.0, 0.9])), momentum=0.9)
    decay = data.draw(st.sampled_from([0.0, 0.5]))
    every, period = data.draw(st.sampled_from([(1, 1), (2, 5), (3, 3), (1, 4)]))
    dense = data.draw(st.booleans())
    optimizer = curvlib.MBF(
        model,
        **shared,
        **SETTINGS,
        linear_blocks=grouping,
        weight_decay=decay,
        statistics_every=every,
        refresh_every=period,
        dense_start=dense,
    )
    schedule = dict(statistics=every, refresh=period, dense_start=dense, decay=decay)
    oracles, weights = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            blocks, tied = linear_blocks(grouping, module.out_features, module.in_features + 1)
            oracles[name], weights[name] = MBF(blocks, tied, **shared, **schedule), flat(module)
        elif isinstance(module, nn.LayerNorm):
            for role in ("weight", "bias"):
                oracles[name, role] = AuthorsDiagonal(lr=1e-3, momentum=0.9, decay=decay)
                weights[name, role] = getattr(module, role).detach().clone()
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(6, widths[0], dtype=F64)).pow(2).sum().backward()
        for key, oracle in oracles.items():
            if isinstance(key, tuple):
                gradient = getattr(model.get_submodule(key[0]), key[1]).grad
            else:
                gradient = flat(model.get_submodule(key), "grad")
            weights[key] = oracle.update(weights[key], gradient)
        optimizer.step()
    for key, weight in weights.items():
        held = (
            getattr(model.get_submodule(key[0]), key[1]).data
            if isinstance(key, tuple)
            else flat(model.get_submodule(key))
        )
        torch.testing.assert_close(held, weight, rtol=TOLERANCE, atol=TOLERANCE)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_convolutions_have_a_block_for_every_kernel(data):
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    groups = data.draw(st.sampled_from([1, 2]))
    kind = data.draw(st.sampled_from([nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d]))
    layer = kind(
        2 * groups, 3 * groups, data.draw(st.integers(1, 3)), stride=data.draw(st.integers(1, 2)), groups=groups
    )
    layer = layer.double()
    dimensions = 1 if kind is nn.Conv1d else 2
    shared = dict(lr=1e-3, damping=1e-2, beta=0.9, momentum=0.9)
    optimizer = curvlib.MBF(layer, **shared, **SETTINGS, statistics_every=2, refresh_every=3, dense_start=True)
    size = layer.weight[0, 0].numel()
    blocks = list(torch.arange(layer.weight.numel()).view(-1, size))
    oracle = MBF(blocks, False, **shared, decay=0.0, statistics=2, refresh=3, dense_start=True)
    diagonal = AuthorsDiagonal(lr=1e-3, momentum=0.9, decay=0.0)
    weight, bias = layer.weight.detach().flatten().clone(), layer.bias.detach().clone()
    for _ in range(8):
        optimizer.zero_grad()
        layer(torch.randn(4, 2 * groups, *[7] * dimensions, dtype=F64)).tanh().mean().backward()
        weight, bias = oracle.update(weight, layer.weight.grad.flatten()), diagonal.update(bias, layer.bias.grad)
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach().flatten(), weight, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(layer.bias.detach(), bias, rtol=TOLERANCE, atol=TOLERANCE)


def test_the_published_schedule_refreshes_densely_at_first(monkeypatch):
    """T1 = 2, T2 = 25: inverses at 0, 2, …, 24, then 25, 50, 75."""
    from curvlib import roots

    counted, real = [], roots.refresh
    monkeypatch.setattr(roots, "refresh", lambda jobs: counted.append(len(list(jobs))) or real(jobs))
    layer = nn.Linear(3, 2)
    optimizer = curvlib.MBF(layer, **PUBLISHED)
    for _ in range(80):
        layer.weight.grad, layer.bias.grad = torch.randn(2, 3), torch.randn(2)
        optimizer.step()
    assert [step for step, jobs in enumerate(counted) if jobs] == [*range(0, 25, 2), 25, 50, 75]


def test_the_warm_start_is_the_running_mean_and_touches_nothing_else():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = curvlib.MBF(model, **PUBLISHED)
    inputs = torch.randn(5, 8, 4, dtype=F64)
    draws = torch.Generator().manual_seed(3)
    gradients = []

    def loss(batch):
        logits = model(batch)
        labels = curvlib.sample_labels(logits, "categorical", draws)
        result = F.cross_entropy(logits, labels)
        gradients.append(torch.autograd.grad(result, [model[0].weight, model[0].bias], retain_graph=True))
        return result

    assert optimizer.warm_start(inputs, loss) == 5
    chunks = [torch.cat([weight, bias[:, None]], 1).flatten().view(5, 3) for weight, bias in gradients]
    expected = sum(one.T @ one / 5 for one in chunks) / 5
    torch.testing.assert_close(optimizer.state[model[0].weight]["factor_0_0"][0], expected, rtol=1e-12, atol=1e-15)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert optimizer.state[model[0].weight]["step"] == 0
    assert not optimizer.state[model[0].weight]["momentum"].any()


def test_blocks_of_one_entry_are_the_momentum_over_the_damped_square():
    weight = nn.Parameter(torch.zeros(3, 4, 1, 1, dtype=F64))
    optimizer = curvlib.MBF([weight], lr=1.0, damping=0.1, **SETTINGS, refresh_every=1)
    second, momentum, expected = 0.0, 0.0, torch.zeros_like(weight)
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        second, momentum = 0.9 * second + 0.1 * weight.grad**2, 0.9 * momentum + weight.grad
        expected = expected - momentum / (second + 0.1)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("grouping", sorted(LINEAR_BLOCKS))
def test_a_large_damping_is_heavy_ball_sgd_scaled_by_its_inverse(grouping):
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    damping = 1e9
    ours = curvlib.MBF(layers[0], lr=0.1 * damping, damping=damping, **SETTINGS, linear_blocks=grouping)
    theirs = torch.optim.SGD(layers[1].parameters(), lr=0.1, momentum=0.9)
    for _ in range(10):
        batch = torch.randn(5, 3, dtype=F64)
        for layer, optimizer in zip(layers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            layer(batch).pow(2).sum().backward()
            optimizer.step()
    # the relative difference is λmax(F)/λ
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=1e-5, atol=1e-6)


def test_without_a_model_biases_have_the_diagonal_rule():
    layer = nn.Linear(3, 2)
    assert curvlib.MBF(layer).routing()["bias"] == "joined to weight"
    bare = curvlib.MBF(layer.parameters())
    assert list(bare.routing().values())[1].startswith("... |")
    bare.attach(layer)
    assert bare.routing()["bias"] == "joined to weight"


@pytest.mark.parametrize("grouping", [*sorted(LINEAR_BLOCKS), "| o, i", "| o/2 i/2", "... |"])
def test_defaults_train_with_every_grouping(grouping):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs, targets = torch.randn(128, 8), torch.randint(0, 4, (128,))
    optimizer = curvlib.MBF(model, lr=1e-2, linear_blocks=grouping)
    first = F.cross_entropy(model(inputs), targets).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * first
    assert optimizer.health().ok
