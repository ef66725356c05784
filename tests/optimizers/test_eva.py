"""Eva against its equations in plain lines, and the rank-one block against its dense matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import CurvatureOptimizer, Damping, Moment, Partition, Recipe, Root, Route
from curvlib.blocks import RankOneBlock
from curvlib.testing import check_recipe
from tests.optimizers.oracles import F64
from tests.optimizers.recorded import recorded


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 9, 4), nn.Tanh(), nn.Linear(4, 3)
    ).double()


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_eva(clip, momentum):
    model, lr, damping, beta = network(), 0.1, 0.05, 0.8
    optimizer = curvlib.Eva(model, lr, damping=damping, beta=beta, momentum=momentum, kl_clip=clip)
    layers = [module for module in model if hasattr(module, "weight")]
    a, b, m = [0.0] * 3, [0.0] * 3, [0.0] * 3
    for t in range(1, 51):
        x, y = torch.randn(12, 2, 2, 2, dtype=F64), torch.randint(0, 3, (12,))
        seen = recorded(model, x, y)
        inputs, outputs = [one.inputs.mean((0, 1)) for one in seen], [one.deltas.sum((0, 1)) for one in seen]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        wanted, total = [], 0.0
        for place, layer in enumerate(layers):
            gradient = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1)
            a[place] = beta * a[place] + (1 - beta) * inputs[place]
            b[place] = beta * b[place] + (1 - beta) * outputs[place]
            m[place] = momentum * m[place] + gradient
            left, right = b[place] / (1 - beta**t), a[place] / (1 - beta**t)
            share = (left @ m[place] @ right) / (damping + left @ left * (right @ right))
            direction = (m[place] - share * torch.outer(left, right)) / damping
            total += lr**2 * (m[place] * direction).sum()
            wanted.append(direction)
        shrink = 1.0 if clip is None else min(1.0, float((clip / total) ** 0.5))
        before = [torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], 1) for layer in layers]
        optimizer.step()
        for layer, old, direction in zip(layers, before, wanted, strict=True):
            after = torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], 1)
            torch.testing.assert_close(after, old - lr * shrink * direction, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("exponent", [1.0, 0.5])
@pytest.mark.parametrize("partition", ["| o, i", "o | i", "~o | i", "| o/2, i/3", "i | o"])
def test_the_block_is_its_dense_matrix(exponent, partition):
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False).double()
    recipe = Recipe(partition, Moment("signals", average="mean"), Root(exponent, Damping(0.3)), block=RankOneBlock)
    optimizer = CurvatureOptimizer(model, [Route(recipe)], lr=1.0)
    before = model.weight.detach().clone()
    F.cross_entropy(model(torch.randn(9, 5, dtype=F64)), torch.randint(0, 4, (9,))).backward()
    gradient = model.weight.grad.flatten()
    optimizer.step()
    dense = optimizer.curvature(model)
    values, vectors = torch.linalg.eigh(dense)
    wanted = vectors @ ((values.clamp_min(0) + 0.3) ** -exponent * (vectors.T @ gradient))
    torch.testing.assert_close((before - model.weight.detach()).flatten(), wanted, rtol=1e-11, atol=1e-13)
    (held,) = optimizer.held()
    product = held.block.apply(held.state, gradient.view(1, 4, 5), held.recipe, -1.0, held.scale)
    torch.testing.assert_close(product.flatten(), dense @ gradient, rtol=1e-11, atol=1e-13)


def test_statistics_do_not_depend_on_the_reduction_or_on_micro_batches():
    x, y = torch.randn(8, 2, 2, 2, dtype=F64), torch.randint(0, 3, (8,))
    curvatures = []
    for way in ("mean", "sum", "micro"):
        model = network()
        optimizer = curvlib.Eva(model, reduction={"mean": "mean", "sum": "sum", "micro": 2.0}[way])
        size = 4 if way == "micro" else 8
        for inputs, labels in zip(x.split(size), y.split(size), strict=True):
            F.cross_entropy(model(inputs), labels, reduction="sum" if way == "sum" else "mean").backward()
        optimizer.step()
        curvatures.append(optimizer.curvature(model[3]))
    for other in curvatures[1:]:
        torch.testing.assert_close(other, curvatures[0], rtol=1e-11, atol=1e-14)


def test_state_is_vectors():
    model = nn.Linear(100, 50)
    optimizer = curvlib.Eva(model, momentum=0.0)
    F.cross_entropy(model(torch.randn(4, 100)), torch.randint(0, 50, (4,))).backward()
    optimizer.step()
    assert optimizer.memory()["statistics"] == 4 * (101 + 50)
    assert "roots" not in optimizer.memory()


def test_the_kit():
    check_recipe(curvlib.Eva, examples=3)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe("| o, i", block=RankOneBlock), "RankOneBlock needs Moment"),
        (
            Recipe("| o, i", Moment("signals"), Root(1, Damping(1e-2, split="pi")), block=RankOneBlock),
            "absolute number",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(recipe, message):
    with pytest.raises(ValueError, match=message):
        RankOneBlock(Partition("| o, i").layout({"o": 2, "i": 2}, (), (("o",), ("i",))), recipe)


def test_no_damping_is_refused():
    model = nn.Linear(3, 2)
    optimizer = curvlib.Eva(model, damping=0.0)
    F.cross_entropy(model(torch.randn(4, 3)), torch.randint(0, 2, (4,))).backward()
    with pytest.raises(ValueError, match="damping must be above 0 for RankOneBlock"):
        optimizer.step()
