"""Cases of MBF, against loops with torch's Adam and against passes of the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import curvlib
from curvlib.optimizers.mbf import PUBLISHED

from .case import Case, at_most
from .timing import Contest, Setting, Side, timed
from .workloads import (
    Shape,
    autoencoder_of,
    backward,
    displacement,
    fill,
    images,
    iterations,
    parameters,
    relative,
    steps,
    vgg16,
)

ROUNDING = 1e-3
"""Of a solve in float32 with a condition number up to some thousands."""

RELEASED: dict[str, Any] = {**PUBLISHED, "dense_start": False}
"""As published, but for the denser schedule of the first steps, which are not timed."""


def _autoencoder(setting: Setting) -> Contest:
    """Whole iterations, over one period of refreshes a repetition; both see the same gradients at the start."""
    inputs = images(setting)
    models = autoencoder_of(setting), autoencoder_of(setting)
    ours = curvlib.MBF(models[0], **RELEASED)
    theirs = torch.optim.Adam(models[1].parameters(), 1e-4, fused=True)

    def difference() -> float:
        for model in models:
            backward(model, inputs)
        return relative(*([one.grad for one in model.parameters() if one.grad is not None] for model in models))

    return Contest(
        iterations(models[0], inputs, ours, setting),
        iterations(models[1], inputs, theirs, setting),
        difference,
        0.0,
        turns=setting.size(PUBLISHED["refresh_every"], 2),
    )


def _convolutions(setting: Setting, **settings: Any) -> Contest:
    """The mean step of a period T1 10, T2 100, from two periods of statistics that hold one refresh."""
    statistics, refresh = 10, 20
    shapes = vgg16(setting)
    ours = steps(
        lambda these: curvlib.MBF(these, statistics_every=statistics, refresh_every=refresh, **settings),
        shapes,
        setting,
    )
    theirs = steps(lambda these: torch.optim.Adam(these, 1e-4, fused=True), shapes, setting)

    def period() -> float:
        taken = [ours() for _ in range(refresh)]
        return (sum(taken[:statistics]) + 9 * sum(taken[statistics:])) / (10 * statistics)

    def adam() -> float:
        return sum(theirs() for _ in range(refresh)) / refresh

    return Contest(period, adam, lambda: _first_convolutions(setting), ROUNDING, warm_up=0 if setting.quick else 1)


def _first_convolutions(setting: Setting) -> float:
    """The first step against Sherman and Morrison's formula, kernel by kernel: (λI + 0.1 ggᵀ)^-1 g."""
    shapes: list[Shape] = [(6, 5, 3, 3)]
    (moved,) = displacement(lambda these: curvlib.MBF(these, **{**RELEASED, "lr": 1.0}), shapes, setting, [0])
    (one,) = parameters(shapes, setting)
    assert one.grad is not None
    gradient = one.grad.double()
    squares = gradient.square().sum((2, 3), keepdim=True)
    return relative([moved], [-gradient / (PUBLISHED["damping"] + 0.1 * squares)])


def _window(setting: Setting) -> Contest:
    """One layer 784 -> 1000: a step with the last 32 gradients, against the layer's forward and backward."""
    inputs, outputs, batch = setting.size(784, 12), setting.size(1000, 10), setting.size(1000, 8)
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs).to(setting.device)
    optimizer = curvlib.MBF(layer, linear_blocks="output", window=32, grafting=None)
    examples = torch.rand(batch, inputs, device=setting.device)
    targets = torch.rand(batch, outputs, device=setting.device)

    def passes() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(torch.tanh(layer(examples)), targets).backward()

    def ours() -> float:
        passes()
        return timed(optimizer.step, setting.device)

    warm_up = 2 if setting.quick else 34
    return Contest(
        ours, lambda: timed(passes, setting.device), lambda: _windows(setting), ROUNDING, turns=5, warm_up=warm_up
    )


def _windows(setting: Setting) -> float:
    """Some steps with a window of that length, against stored matrices of the same average."""

    def moved(window: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(12, 10).to(setting.device)
        settings: dict[str, Any] = dict(linear_blocks="output", grafting=None, refresh_every=1)
        optimizer = curvlib.MBF(layer, lr=1.0, window=window, **settings)
        start = [one.detach().clone() for one in layer.parameters()]
        for seed in range(4):
            fill(list(layer.parameters()), seed)
            optimizer.step()
        return [one.detach() - before for one, before in zip(layer.parameters(), start, strict=True)]

    return relative(moved(32), moved(None))


def _growth(setting: Setting) -> Contest:
    """Steps with 10⁵ blocks of 9×9 against as many times those with 10²."""

    def side(outputs: int, inputs: int) -> Side:
        settings: dict[str, Any] = {**RELEASED, "refresh_every": 1, "statistics_every": 1}
        return steps(lambda these: curvlib.MBF(these, **settings), [(outputs, inputs, 3, 3)], setting)

    few, many = (10, 10), (setting.size(250, 20), setting.size(400, 20))
    factor = many[0] * many[1] / (few[0] * few[1])
    small, large = side(*few), side(*many)

    def as_many() -> float:
        return factor * sum(small() for _ in range(5)) / 5

    return Contest(large, as_many, lambda: _first_convolutions(setting), ROUNDING)


CASES = (
    Case(
        "mbf-autoencoder",
        "MBF as released, MNIST autoencoder, batch 1000, T1 2, T2 25: iteration",
        "the same loop with torch Adam(fused=True)",
        at_most(1.40),
        at_most(1.10),
        _autoencoder,
    ),
    Case(
        "mbf-convolutions",
        "MBF as released, convolutions of VGG16, T1 10, T2 100: step",
        "torch Adam(fused=True)",
        at_most(4),
        at_most(2),
        lambda setting: _convolutions(setting, **{k: RELEASED[k] for k in RELEASED if not k.endswith("_every")}),
    ),
    Case(
        "mbf-convolutions-defaults",
        "MBF with its defaults, convolutions of VGG16, T1 10, T2 100: step",
        "torch Adam(fused=True)",
        at_most(None),
        at_most(None),
        _convolutions,
    ),
    Case(
        "mbf-window",
        "MBF per neuron, window of 32 gradients, 784 -> 1000: step",
        "the layer's forward and backward, batch 1000",
        at_most(0.7),
        at_most(None),
        _window,
    ),
    Case(
        "growth-blocks",
        "MBF, 10⁵ blocks of 9×9: step with refresh",
        "10³ × the step of 10² blocks",
        at_most(1.1),
        at_most(1.1),
        _growth,
    ),
)
