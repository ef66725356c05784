"""Small networks with losses, and their curvature in plain loops: one backward pass for every example and output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.functional import hessian as hessian_of
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvlib.analysis import Objective

F64, N, CLASSES, POSITIONS = torch.float64, 5, 3, 4
LOSSES = {
    "categorical": nn.CrossEntropyLoss,
    "bernoulli": nn.BCEWithLogitsLoss,
    "gaussian": nn.MSELoss,
}
NETWORKS = ["perceptron", "convolutional", "transformer", "tied"]


@dataclass
class Problem:
    model: nn.Module
    loss: object
    inputs: torch.Tensor
    targets: torch.Tensor

    def objective(self, **options):
        return Objective(self.model, self.loss, self.inputs, self.targets, **options)

    @property
    def parameters(self):
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def examples(self):
        """(outputs of a batch of one, target of a batch of one)."""
        for x, y in zip(self.inputs, self.targets, strict=True):
            yield self.model(x[None]), y[None]


class Transformer(nn.Module):
    """An embedding, an encoder layer, the mean over positions, a readout."""

    def __init__(self, width=4):
        super().__init__()
        self.embedding = nn.Embedding(5, width)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 3, dropout=0.0, activation="gelu", batch_first=True)
        self.readout = nn.Linear(width, CLASSES)

    def forward(self, tokens):
        return self.readout(self.encoder(self.embedding(tokens)).mean(1))


class Tied(nn.Module):
    """An embedding that is also the readout."""

    def __init__(self, width=4):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, width)
        self.readout = nn.Linear(width, CLASSES)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens):
        return self.readout(self.embedding(tokens).mean(1).tanh())


def targets_like(outputs, likelihood):
    if likelihood == "categorical":
        return torch.randint(0, outputs.shape[-1], outputs.shape[:-1])
    return torch.rand_like(outputs).round() if likelihood == "bernoulli" else torch.randn_like(outputs)


def network(name):
    """(model, inputs)."""
    if name == "perceptron":
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), torch.randn(N, 5, dtype=F64)
    if name == "positions":
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, CLASSES)), torch.randn(N, POSITIONS, 3, dtype=F64)
    if name == "convolutional":
        first = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        model = nn.Sequential(first, nn.Tanh(), nn.Conv2d(4, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES))
        return model, torch.randn(N, 2, 5, 6, dtype=F64)
    kind, size = {"transformer": (Transformer, 5), "tied": (Tied, CLASSES)}[name]
    return kind(), torch.randint(0, size, (N, POSITIONS))


def problem(name="perceptron", likelihood="categorical", reduction="mean", loss=None):
    torch.manual_seed(0)
    model, inputs = network(name)
    model = model.double().eval()
    with torch.no_grad():
        targets = targets_like(model(inputs), likelihood)
    return Problem(model, LOSSES[likelihood](reduction=reduction) if loss is None else loss, inputs, targets)


# -- plain loops ------------------------------------------------------------------------------------------------------


def rows(values, parameters, **options):
    """The gradient of every entry, ``[entries, D]``, one backward pass each."""
    each = [
        torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True, **options)
        for value in values.flatten()
    ]
    return torch.stack([torch.cat([gradient.flatten() for gradient in gradients]) for gradients in each])


def plain_fisher(some, labels, parameters=None):
    """1/N Σ g gᵀ, or 1/N Σ Jᵀ H J with H the Hessian of the loss itself with respect to the outputs."""
    parameters, total = some.parameters if parameters is None else parameters, 0.0
    for outputs, target in some.examples():
        if labels == "data":
            (gradient,) = rows(some.loss(outputs, target), parameters)
            total = total + gradient.outer(gradient)
        else:
            jacobian, point = rows(outputs, parameters), outputs.detach().flatten()
            middle = hessian_of(lambda z, to=target, like=outputs: some.loss(z.view_as(like), to).sum(), point)
            total = total + jacobian.T @ middle @ jacobian
    return total / len(some.inputs)


def plain_hessian(some, parameters=None):
    parameters = some.parameters if parameters is None else parameters
    with sdpa_kernel(SDPBackend.MATH):
        value = sum(some.loss(outputs, target).sum() for outputs, target in some.examples()) / len(some.inputs)
        (gradient,) = rows(value, parameters, create_graph=True)
        return rows(gradient, parameters)


def close(one, two, rtol=1e-10):
    """To rounding, relative to the largest entry."""
    torch.testing.assert_close(one.detach(), two.detach(), rtol=rtol, atol=rtol * float(two.detach().abs().max()))


def cross_entropy_of_positions(reduction):
    """A loss with classes last, at every position of a sequence."""

    def loss(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)

    return loss
