"""What is optimized: shapes of known networks, their gradients, and loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..problems import autoencoder
from .timing import Setting, Side, timed

Shape = tuple[int, ...]
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def gpt(setting: Setting) -> list[Shape]:
    """The matrices of two layers of a GPT of width 384: attention in and out, perceptron up and down."""
    d = setting.size(384, 24)
    return [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * 2


def vgg16(setting: Setting) -> list[Shape]:
    """The convolutions of VGG16, 14.7 M weights."""
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    if setting.quick:
        widths = [3, 4, 8]
    return [(outputs, inputs, 3, 3) for inputs, outputs in pairwise(widths)]


def resnet50(setting: Setting) -> nn.Module:
    """The layers of ResNet-50, 25.6 M parameters, for their parameters: they are not connected."""
    layers: list[nn.Module] = []

    def convolution(inputs: int, outputs: int, kernel: int) -> None:
        layers.extend([nn.Conv2d(inputs, outputs, kernel, bias=False), nn.BatchNorm2d(outputs)])

    stages = [(3, 64), (4, 128), (6, 256), (3, 512)]
    if setting.quick:
        stages = [(1, 4), (1, 8)]
    inputs = stages[0][1]
    convolution(3, inputs, 7)
    for repeats, width in stages:
        for number in range(repeats):
            if number == 0:
                convolution(inputs, 4 * width, 1)
            convolution(inputs, width, 1)
            convolution(width, width, 3)
            convolution(width, 4 * width, 1)
            inputs = 4 * width
    layers.append(nn.Linear(inputs, setting.size(1000, 10)))
    return nn.ModuleList(layers).to(setting.device)


def parameters(shapes: Sequence[Shape], setting: Setting) -> list[nn.Parameter]:
    """Small random parameters of some shapes, with random gradients; the same at every call."""
    generator = torch.Generator(setting.device).manual_seed(0)
    made = [
        nn.Parameter(0.02 * torch.randn(shape, device=setting.device, generator=generator), requires_grad=True)
        for shape in shapes
    ]
    fill(made, 0)
    return made


def fill(these: Sequence[Tensor], seed: int) -> None:
    """Give parameters the random gradients of a seed."""
    if not these:
        return
    generator = torch.Generator(these[0].device).manual_seed(seed)
    for one in these:
        one.grad = torch.empty_like(one).normal_(generator=generator)


def steps(build: Build, shapes: Sequence[Shape], setting: Setting) -> Side:
    """Steps of an optimizer, each on other gradients, which are drawn before it is timed."""
    mine = parameters(shapes, setting)
    optimizer = build(mine)
    generator = torch.Generator(setting.device).manual_seed(1)
    gradients = [torch.empty_like(one) for one in mine]

    def step() -> float:
        for one, gradient in zip(mine, gradients, strict=True):
            one.grad = gradient.normal_(generator=generator)  # some optimizers take it away
        return timed(optimizer.step, setting.device)

    return step


def displacement(
    build: Build, shapes: Sequence[Shape], setting: Setting, seeds: Sequence[int], skip: int = 0
) -> list[Tensor]:
    """How far steps on the gradients of some seeds move the parameters, in double precision; the first ``skip`` aside."""
    mine = parameters(shapes, setting)
    optimizer = build(mine)
    start: list[Tensor] = []
    for number, seed in enumerate(seeds):
        if number == skip:
            start = [one.detach().double() for one in mine]
        fill(mine, seed)
        optimizer.step()
    return [one.detach().double() - before for one, before in zip(mine, start, strict=True)]


def relative(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative difference of corresponding tensors, in the Frobenius norm; NaN where one is."""
    pairs = [(one.double(), other.double()) for one, other in zip(ours, theirs, strict=True)]
    return float(torch.stack([(one - other).norm() / other.norm() for one, other in pairs]).max())


def autoencoder_of(setting: Setting) -> nn.Sequential:
    """The MNIST autoencoder of the MBF, TNT and K-BFGS papers, the same at every call."""
    torch.manual_seed(0)
    widths = (12, 16, 4, 16, 12) if setting.quick else (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    return autoencoder(*widths).to(setting.device)


def images(setting: Setting) -> Tensor:
    """A batch of random inputs between 0 and 1 for the autoencoder: 1,000 of 784 pixels."""
    torch.manual_seed(1)
    return torch.rand(setting.size(1000, 8), setting.size(784, 12), device=setting.device)


def backward(model: nn.Module, inputs: Tensor, factor: float = 1.0) -> None:
    """Forward and backward of the reconstruction loss."""
    outputs = model(inputs)
    loss = F.binary_cross_entropy_with_logits(outputs, inputs, reduction="sum") / len(inputs)
    (factor * loss).backward()


class Steps(Protocol):
    """What a loop calls."""

    def zero_grad(self) -> None:
        """Drop the gradients."""

    def step(self) -> Any:
        """Take a step."""


def iterations(model: nn.Module, inputs: Tensor, optimizer: Steps | None, setting: Setting) -> Side:
    """Whole training iterations; without an optimizer forward and backward only."""

    def iteration() -> None:
        model.zero_grad() if optimizer is None else optimizer.zero_grad()
        backward(model, inputs)
        if optimizer is not None:
            optimizer.step()

    return lambda: timed(iteration, setting.device)
