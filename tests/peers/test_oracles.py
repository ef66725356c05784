"""Exact curvature against curvlinops 3.0.1 and nngeometry (newer than 0.4, whose float64 models fail).

What is exact needs no other library, see tests/analysis; here scales meet. curvlib's curvature is the mean over examples,
of the loss that an example has. Where another library means a multiple of that, the multiple is written here.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvlib.analysis import Operator, fisher, hessian
from curvlib.analysis.objective import double_differentiable
from tests.analysis.problems import CLASSES, F64, LOSSES, POSITIONS, N, Problem, close, problem, targets_like

RTOL = 1e-8
SINGLE = 1e-6  # nngeometry adds up diagonals of models in float64 in float32
NETWORKS = ["perceptron", "convolutional", "transformer"]
KINDS = {"exact": "GGNLinearOperator", "data": "EFLinearOperator", "hessian": "HessianLinearOperator"}

every_loss = pytest.mark.parametrize("likelihood", LOSSES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def dense_of(objective, kind):
    return hessian(objective) if kind == "hessian" else fisher(objective, kind)


def terms_of(likelihood):
    """How many terms of the loss of one example its mean reduction averages."""
    return 1 if likelihood == "categorical" else CLASSES


def mirrored(matrix):
    """The upper triangle on both sides.

    Both libraries differentiate gradients forwards, and with torch 2.13 their Hessians are not symmetric in rows of a layer
    norm's weight; the upper triangle agrees, and so did a finite difference of an entry where they do not.
    """
    return matrix.triu() + matrix.triu(1).T


# -- curvlinops -------------------------------------------------------------------------------------------------------


def multiple(kind, likelihood, reduction):
    """What curvlinops' curvature is of curvlib's.

    It does not divide by the number of examples where the loss does not; the gradients of its empirical Fisher are
    divided by the root of the number of terms that the loss is a mean of, not by their number.
    """
    if reduction == "sum":
        return N
    return terms_of(likelihood) if kind == "data" else 1


@pytest.mark.parametrize("name", NETWORKS)
@every_loss
@every_kind
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matrices_and_products_are_those_of_curvlinops(name, likelihood, kind, reduction):
    curvlinops = pytest.importorskip("curvlinops")
    some = problem(name, likelihood, reduction)
    arguments = some.model, some.loss, some.parameters, [(some.inputs, some.targets)]
    theirs = getattr(curvlinops, KINDS[kind])(*arguments, check_deterministic=False)
    times = multiple(kind, likelihood, reduction)
    with double_differentiable():
        matrix = mirrored(theirs @ torch.eye(theirs.shape[0], dtype=F64))
    close(times * dense_of(some.objective(), kind), matrix, RTOL)
    vector = torch.randn(len(matrix), dtype=F64)
    close(times * (Operator(some.objective(), kind) @ vector), matrix @ vector, RTOL)


# -- nngeometry -------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Single-headed attention from linear layers, after a norm, between an embedding and a pooled readout."""

    def __init__(self, width=4):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(5, width), nn.LayerNorm(width)
        self.queries, self.keys, self.values = (nn.Linear(width, width) for _ in range(3))
        self.readout = nn.Linear(width, CLASSES)

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        weights = (self.queries(x) @ self.keys(x).mT).softmax(-1)
        return self.readout((weights @ self.values(x)).mean(1))


def strided():
    first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(4, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES))


THEIR_NETWORKS = {
    "perceptron": lambda likelihood: problem("perceptron", likelihood),
    "strided": lambda likelihood: other(strided(), torch.randn(N, 2, 5, 6, dtype=F64), likelihood),
    "attention": lambda likelihood: other(Attention(), torch.randint(0, 5, (N, POSITIONS)), likelihood),
    "convolutional": lambda likelihood: problem("convolutional", likelihood),
    "transformer": lambda likelihood: problem("transformer", likelihood),
}
UNKNOWN = {
    "convolutional": "nngeometry counts the weights of a convolution without its groups",
    "transformer": "nngeometry does not know torch's fused attention",
}
VARIANTS = {"categorical": "classif_logits", "bernoulli": "classif_binary_logits", "gaussian": "regression"}

every_network_of_theirs = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.skip(UNKNOWN[name]) if name in UNKNOWN else ()) for name in THEIR_NETWORKS],
)


def other(model, inputs, likelihood):
    torch.manual_seed(0)
    for parameter in model.double().parameters():
        parameter.data.normal_()
    return Problem(model, LOSSES[likelihood](), inputs, targets_like(model(inputs).detach(), likelihood))


def nngeometry():
    """The library, where it is new enough."""
    library = pytest.importorskip("nngeometry")
    pytest.importorskip("nngeometry.solve", reason="this nngeometry is too old: models in float64 fail")
    return library


def of_representation(some, labels, likelihood, representation):
    """(their matrix, what it is of curvlib's): exact with unit scale; of the data by the loss of every example."""
    library = nngeometry()
    kind, examples = getattr(library.object, representation), (some.inputs.clone(), some.targets)
    if labels == "exact":
        matrix = library.FIM(some.model, examples, kind, VARIANTS[likelihood])
        return matrix, terms_of(likelihood) / (2 if likelihood == "gaussian" else 1)
    each = LOSSES[likelihood](reduction="none")

    def losses(x, y):
        return each(some.model(x), y).view(len(x), -1).mean(1, keepdim=True)

    generator = library.backend.TorchHooksJacobianBackend(model=some.model, function=losses)
    layers = library.layercollection.LayerCollection.from_model(some.model)
    return kind(layer_collection=layers, generator=generator, examples=examples), 1


@every_network_of_theirs
@every_loss
@pytest.mark.parametrize("labels", ["exact", "data"])
def test_fishers_traces_and_diagonals_are_those_of_nngeometry(name, likelihood, labels):
    nngeometry()
    some = THEIR_NETWORKS[name](likelihood)
    ours = fisher(some.objective(), labels)
    dense, times = of_representation(some, labels, likelihood, "PMatDense")
    close(times * ours, dense.to_torch(), RTOL)
    close(times * ours.trace(), dense.trace(), RTOL)
    close(times * ours.diagonal(), dense.get_diag(), RTOL)
    diagonal, _ = of_representation(some, labels, likelihood, "PMatDiag")
    close(times * ours.diagonal(), diagonal.get_diag(), SINGLE)
    close(times * ours.trace(), diagonal.trace(), SINGLE)


@every_network_of_theirs
@every_loss
def test_hessians_are_those_of_nngeometry(name, likelihood):
    library = nngeometry()
    some = THEIR_NETWORKS[name](likelihood)
    theirs = library.Hessian(some.model, (some.inputs, some.targets), library.object.PMatDense, function=some.loss)
    close(hessian(some.objective()), mirrored(theirs.to_torch()), RTOL)
