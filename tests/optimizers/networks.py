"""Networks and batches drawn by hypothesis: perceptrons, convolutions with groups and strides, norms, embeddings.

Every network seeds torch, so that what hypothesis draws is what a test does, batches and all.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import nn

from tests.optimizers.oracles import F64


def _norm(draw, width, spatial):
    kinds = ["none", "batch", "group"] if spatial else ["none", "layer", "batch"]
    kind = draw(st.sampled_from(kinds))
    if kind == "batch":
        return [(nn.BatchNorm2d if spatial else nn.BatchNorm1d)(width)]
    return {"none": [], "layer": [nn.LayerNorm(width)], "group": [nn.GroupNorm(1, width)]}[kind]


@st.composite
def perceptrons(draw):
    """(model, batches): linear layers with and without bias, sometimes a norm, sometimes an embedding at the bottom."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    modules = []
    for inputs, outputs in pairwise(widths):
        modules += [nn.Linear(inputs, outputs, bias=draw(st.booleans()) or not modules), nn.Tanh()]
    modules[1:1] = _norm(draw, widths[1], spatial=False)
    count = draw(st.integers(2, 5))
    if draw(st.integers(0, 3)) == 0:
        model = nn.Sequential(nn.Embedding(7, widths[0]), *modules).double()
        return model, lambda: torch.randint(0, 7, (count,))
    return nn.Sequential(*modules).double(), lambda: torch.randn(count, widths[0], dtype=F64)


@st.composite
def convolutional_networks(draw):
    """(model, batches): a grouped, strided convolution, a norm, maybe a transposed convolution, a readout."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    groups, inputs, middle = (draw(st.integers(1, 2)) for _ in range(3))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    first = nn.Conv2d(inputs * groups, middle * groups, kernel, stride, groups=groups, bias=draw(st.booleans()))
    modules = [first, *_norm(draw, middle * groups, spatial=True), nn.Tanh()]
    if draw(st.booleans()):
        modules += [nn.ConvTranspose2d(middle * groups, 2 * groups, 2, groups=groups), nn.Tanh()]
    count = draw(st.integers(2, 4))

    def batch():
        return torch.randn(count, inputs * groups, 5, 5, dtype=F64)

    body = nn.Sequential(*modules, nn.Flatten()).double()
    features = body(batch()).shape[1]
    return nn.Sequential(*body, nn.Linear(features, 2).double()), batch


def networks():
    """Either kind."""
    return st.one_of(perceptrons(), convolutional_networks())


def loss_of(model, batch):
    """A loss whose gradients are neither tiny nor of full rank."""
    outputs = model(batch)
    return (outputs - torch.arange(outputs[0].numel(), dtype=F64)).pow(2).sum(1).mean()
