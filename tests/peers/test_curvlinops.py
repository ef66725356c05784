"""Kronecker factors and exact blocks against curvlinops' operators, as dense matrices.

curvlinops counts every entry of a mean squared error as a term of the loss of its own; its empirical factors are then C
times those of the loss that is differentiated. The type-2 ones are not.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvlib import CurvatureOptimizer
from tests.listening import F64, recipe_of

curvlinops = pytest.importorskip("curvlinops")

KRONECKER = "| o, i k..."
N, CLASSES = 6, 3


def perceptron():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), torch.randn(N, 5, dtype=F64)


def convolutional():
    layers = [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    ]
    return nn.Sequential(*layers), torch.randn(N, 2, 5, 5, dtype=F64)


def strided():
    layers = [
        nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding="valid"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    ]
    return nn.Sequential(*layers), torch.randn(N, 4, 8, 8, dtype=F64)


NETWORKS = pytest.mark.parametrize("build", [perceptron, convolutional, strided])
LOSSES = pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss()], ids=["cross-entropy", "mse"])


def problem(build, loss):
    torch.manual_seed(0)
    model, x = build()
    model = model.double()
    y = torch.randint(0, CLASSES, (N,)) if isinstance(loss, nn.CrossEntropyLoss) else torch.randn(N, CLASSES, dtype=F64)
    return model, x, y


def ours(model, recipe, loss, x, y):
    """One step of length zero; a mean squared error is 2/C of half a squared error."""
    optimizer = CurvatureOptimizer(model, recipe, lr=0.0)
    outputs = model(x)
    if isinstance(loss, nn.CrossEntropyLoss):
        optimizer.observe(outputs, "categorical")
    else:
        optimizer.observe(outputs, "gaussian", scale=2 / CLASSES)
    loss(outputs, y).backward()
    optimizer.step()
    return optimizer


def dense(operator, model):
    size = sum(parameter.numel() for parameter in model.parameters())
    return operator @ torch.eye(size, dtype=F64)


def blocks(model, matrix):
    """(layer, its diagonal block: weight, then bias)."""
    first = 0
    for module in model:
        size = sum(parameter.numel() for parameter in module.parameters())
        if size:
            yield module, matrix[first : first + size, first : first + size]
            first += size


def compare(optimizer, model, matrix):
    for module, block in blocks(model, matrix):
        size = float(block.abs().max())
        torch.testing.assert_close(optimizer.curvature(module), block, rtol=1e-10, atol=1e-12 * size)


@NETWORKS
@LOSSES
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("labels", ["data", "exact"])
def test_kfac_is_the_same(build, loss, sharing, labels):
    model, x, y = problem(build, loss)
    fisher = curvlinops.FisherType.EMPIRICAL if labels == "data" else curvlinops.FisherType.TYPE2
    kind = curvlinops.KFACType.EXPAND if sharing == "expand" else curvlinops.KFACType.REDUCE
    operator = curvlinops.KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type=fisher,
        kfac_approx=kind,
        separate_weight_and_bias=False,
    )
    matrix = dense(operator, model)
    if labels == "data" and isinstance(loss, nn.MSELoss):
        matrix = matrix / CLASSES
    recipe = recipe_of(KRONECKER, "signals", labels=labels, sharing=sharing, join_bias=True)
    compare(ours(model, recipe, loss, x, y), model, matrix)


@NETWORKS
@LOSSES
@pytest.mark.parametrize("labels", ["data", "exact"])
def test_exact_blocks_are_the_same(build, loss, labels):
    model, x, y = problem(build, loss)
    kind = curvlinops.EFLinearOperator if labels == "data" else curvlinops.GGNLinearOperator
    matrix = dense(kind(model, loss, list(model.parameters()), [(x, y)]), model)
    if labels == "data" and isinstance(loss, nn.MSELoss):
        matrix = matrix / CLASSES
    compare(ours(model, recipe_of("| ...", labels=labels, join_bias=True), loss, x, y), model, matrix)
