"""Networks that are listened to, and what should be heard of them, by brute force."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import curvlib
from curvlib import CurvatureOptimizer, Moment, Recipe, Root, Rule

F64 = torch.float64


class Readout(nn.Module):
    """One layer, and a fixed random map of everything that it puts out to a few outputs."""

    def __init__(self, layer, example, outputs=3, positions=()):
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            width = layer(example[:1]).numel()
        self.register_buffer("map", torch.randn(width, outputs, dtype=F64) / width**0.5)

    def forward(self, inputs):
        return torch.tanh(self.layer(inputs)).flatten(1) @ self.map


def floats(*shape):
    return torch.randn(*shape, dtype=F64)


@st.composite
def linear_layers(draw):
    layer = nn.Linear(draw(st.integers(1, 4)), draw(st.integers(1, 4)), bias=draw(st.booleans()))
    positions = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    return layer, lambda n: floats(n, *positions, layer.in_features)


@st.composite
def convolutions(draw):
    spatial = draw(st.integers(1, 3))
    groups, stride, dilation = (draw(st.integers(1, 2)) for _ in range(3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(spatial))
    padding = draw(st.integers(0, 1))
    inputs, outputs = (groups * draw(st.integers(1, 2)) for _ in range(2))
    bias = draw(st.booleans())
    if draw(st.booleans()):
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
        extra = draw(st.integers(0, max(stride, dilation) - 1))
        layer = kind(inputs, outputs, kernel, stride, padding, extra, groups, bias, dilation)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
        mode = draw(st.sampled_from(["zeros", "circular", "replicate", "reflect"]))
        if draw(st.integers(0, 4)) == 0:
            padding, stride = "same", 1
        layer = kind(inputs, outputs, kernel, stride, padding, dilation, groups, bias, mode)
    size = (5,) * spatial if spatial < 3 else (5, 5, 5)
    return layer, lambda n: floats(n, inputs, *size)


@st.composite
def embeddings(draw):
    rows = draw(st.integers(2, 5))
    layer = nn.Embedding(rows, draw(st.integers(1, 3)), padding_idx=draw(st.sampled_from([None, 0])))
    positions = draw(st.sampled_from([(), (3,), (2, 2)]))
    return layer, lambda n: torch.randint(0, rows, (n, *positions))


@st.composite
def norms(draw):
    width = draw(st.integers(2, 4))
    kind = draw(st.sampled_from(["layer", "layer2", "rms", "group", "instance", "batch"]))
    positions = draw(st.sampled_from([(), (3,)]))
    if kind == "layer":
        return nn.LayerNorm(width, bias=draw(st.booleans())), lambda n: floats(n, *positions, width)
    if kind == "layer2":
        return nn.LayerNorm((2, width)), lambda n: floats(n, *positions, 2, width)
    if kind == "rms":
        return nn.RMSNorm(width, eps=1e-5), lambda n: floats(n, *positions, width)
    if kind == "group":
        return nn.GroupNorm(2, 2 * width), lambda n: floats(n, 2 * width, 3)
    if kind == "instance":
        return nn.InstanceNorm2d(width, affine=True), lambda n: floats(n, width, 3, 2)
    layer = nn.BatchNorm1d(width).eval()
    layer.running_mean.normal_()
    return layer, lambda n: floats(n, width, *positions)


@st.composite
def layers(draw):
    """(model with one layer, inputs of n examples)."""
    torch.manual_seed(draw(st.integers(0, 10000)))
    layer, inputs = draw(st.one_of(linear_layers(), convolutions(), embeddings(), norms()))
    layer = layer.double()
    for parameter in layer.parameters():
        parameter.data.normal_()
    training = layer.training
    model = Readout(layer, inputs(1))
    layer.train(training)
    return model, inputs


def negative_log_likelihood(outputs, targets, likelihood):
    """Of every example, ``[n]``."""
    if likelihood == "categorical":
        return F.cross_entropy(outputs, targets, reduction="none")
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").flatten(1).sum(1)
    return (outputs - targets).square().flatten(1).sum(1) / 2


def targets_of(outputs, likelihood):
    if likelihood == "categorical":
        return torch.randint(0, outputs.shape[-1], (outputs.shape[0],))
    if likelihood == "bernoulli":
        return torch.randint(0, 2, outputs.shape).to(F64)
    return floats(*outputs.shape)


def output_hessian(outputs, likelihood):
    """``[n, C, C]``."""
    if likelihood == "categorical":
        p = outputs.softmax(-1)
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if likelihood == "bernoulli":
        p = outputs.sigmoid()
        return torch.diag_embed(p * (1 - p))
    return torch.eye(outputs.shape[-1], dtype=F64).expand(outputs.shape[0], -1, -1)


def jacobians(model, inputs):
    """name -> ``[n, C, *shape]``."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def one(values, example):
        return functional_call(model, values, (example[None],))[0]

    try:
        return vmap(jacrev(one), (None, 0))(parameters, inputs)
    except RuntimeError:  # what vmap does not know
        each = [jacrev(one)(parameters, example) for example in inputs]
        return {name: torch.stack([each_one[name] for each_one in each]) for name in parameters}


def sample_gradients(model, inputs, targets, likelihood, labels):
    """name -> rows whose second moments, summed and divided by n, are the curvature: ``[m, *shape]``."""
    jacobian = jacobians(model, inputs)
    outputs = model(inputs).detach().requires_grad_()
    if labels == "data":
        (seed,) = torch.autograd.grad(negative_log_likelihood(outputs, targets, likelihood).sum(), outputs)
        seed = seed[:, :, None]
    else:
        values, vectors = torch.linalg.eigh(output_hessian(outputs.detach(), likelihood))
        seed = vectors * values.clamp_min(0).sqrt()[:, None, :]
    return {name: torch.einsum("nc...,ncs->ns...", value, seed).flatten(0, 1) for name, value in jacobian.items()}


def recipe_of(partition, of="samples", **options):
    moment = {name: options.pop(name) for name in list(options) if name in Moment.__dataclass_fields__}
    moment.setdefault("average", "mean")
    return Recipe(partition, Moment(of=of, **moment), Root(1, 1.0), Rule(), **options)


def listen(model, recipe, inputs, targets, likelihood="categorical", reduction="mean", parts=1, **options):
    """An optimizer that took one step of length zero on a batch, in equal parts."""
    optimizer = curvlib.CurvatureOptimizer(model, recipe, lr=0.0, reduction=reduction, **options)
    optimizer.zero_grad()
    for some, wanted in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
        outputs = model(some)
        losses = negative_log_likelihood(outputs, wanted, likelihood)
        optimizer.observe(outputs, likelihood)
        (losses.sum() if reduction == "sum" else losses.mean() / parts).backward()
    optimizer.step()
    return optimizer


def kronecker(of="signals", **options):
    return recipe_of("| o, i", of, join_bias=True, **options)


class Net(nn.Module):
    """Three layers in two stages, the first with an activation in place."""

    def __init__(self, mode="eager", inplace=False):
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 6), nn.Tanh()),
                nn.Sequential(nn.Linear(6, 3)),
            ]
        )
        self.mode = mode
        self.double()

    def forward(self, x):
        for stage in self.stages:
            x = stage(x) if self.mode == "eager" else checkpoint(stage, x, use_reentrant=self.mode == "reentrant")
        return x


def batch(n=8, seed=1, width=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, dtype=F64, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def statistics(optimizer):
    return {
        (index, name): value.clone()
        for index, record in enumerate(optimizer.state.values())
        for name, value in record.items()
        if name.startswith(("factor", "moment"))
    }


def run(model, of="signals", x=None, call=None, steps=1, observe=False, before=None, **options):
    """Statistics after some steps of length zero."""
    optimizer = CurvatureOptimizer(model, kronecker(of, **options), lr=0.0)
    data, targets = batch() if x is None else x
    for _ in range(steps):
        optimizer.zero_grad()
        logits = (model if call is None else call)(data)
        if observe:
            optimizer.observe(logits, "categorical")
        if before:
            before(optimizer, model)
        F.cross_entropy(logits, targets).backward()
        optimizer.step()
    return optimizer


def assert_same(one, two, rtol=1e-10):
    one, two = (statistics(each) if isinstance(each, CurvatureOptimizer) else each for each in (one, two))
    assert one
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name].to(value.dtype), rtol=rtol, atol=rtol * float(value.abs().max()))
