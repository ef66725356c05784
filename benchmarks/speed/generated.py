"""Cases of generated second moments, against code written by hand for each kind of layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from curvlib import Moment, Partition, Recipe
from curvlib.blocks import StandardBlock
from curvlib.signals import Index, Signal

from .case import Case, at_most
from .timing import Contest, Setting, timed
from .workloads import relative

KEEP, GAIN = 0.9, 0.1
ROUNDING = 1e-4
"""Of sums of some thousands of products in float32."""

Hand = Callable[[list[Tensor], Tensor, Tensor], None]
"""Writes the moments into tensors: from a gradient (given twice), or from output gradients and inputs ``[n, t, *axes]``."""


@dataclass(frozen=True)
class Kind:
    """One kind of moment of one kind of layer.

    Attributes:
        name: of the case.
        what: in words.
        of: see :class:`curvlib.Moment`.
        partition: whose factors are filled.
        sizes: of the axes, the first of which is the output's, or of an embedding, its entries.
        batch: examples and positions; none for gradients.
        hand: code written for it.
    """

    name: str
    what: str
    of: Literal["gradient", "samples", "signals"]
    partition: str
    sizes: dict[str, int]
    batch: tuple[int, int]
    hand: Hand


def _two_sides(sums: list[Tensor], g: Tensor, _: Tensor) -> None:
    sums[0][0].addmm_(g, g.mT, beta=KEEP, alpha=GAIN)
    sums[1][0].addmm_(g.mT, g, beta=KEEP, alpha=GAIN)


def _outer(sums: list[Tensor], g: Tensor, _: Tensor) -> None:
    rows = g.reshape(sums[0].shape[0], -1, 1)
    sums[0].mul_(KEEP).addcmul_(rows, rows.mT, value=GAIN)


def _averaged(sums: list[Tensor], g: Tensor, _: Tensor) -> None:
    sums[0][0].addmm_(g.mT, g, beta=KEEP, alpha=GAIN / g.shape[0])


def _modes(sums: list[Tensor], g: Tensor, _: Tensor) -> None:
    kernels = g.flatten(2)
    for mode, total in enumerate(sums):
        unfolded = kernels.movedim(mode, 0).flatten(1)
        total[0].addmm_(unfolded, unfolded.mT, beta=KEEP, alpha=GAIN)


def _factors(sums: list[Tensor], delta: Tensor, given: Tensor) -> None:
    d, a = delta.flatten(0, 1), given.flatten(0, 1).flatten(1)
    torch.mm(d.mT, d, out=sums[0][0])
    torch.mm(a.mT, a, out=sums[1][0])


def _counts(sums: list[Tensor], delta: Tensor, where: Tensor) -> None:
    d = delta.flatten(0, 1)
    sums[0][0].copy_(torch.bincount(where.flatten(), minlength=sums[0].shape[1]))
    torch.mm(d.mT, d, out=sums[1][0])


def _neurons(sums: list[Tensor], delta: Tensor, given: Tensor) -> None:
    d, a = delta[:, 0], given[:, 0]
    for first in range(0, d.shape[1], 32):
        scaled = d[:, first : first + 32].T[:, :, None] * a
        torch.bmm(scaled.mT, scaled, out=sums[0][first : first + 32])


def _mean_neuron(sums: list[Tensor], delta: Tensor, given: Tensor) -> None:
    d, a = delta[:, 0], given[:, 0]
    torch.mm((a * d.square().mean(1, keepdim=True)).mT, a, out=sums[0][0])


def _kernels(sums: list[Tensor], delta: Tensor, given: Tensor) -> None:
    n, kernel = delta.shape[0], math.prod(given.shape[3:])
    examples = torch.bmm(delta.mT, given.flatten(2)).view(n, -1, kernel).transpose(0, 1).contiguous()
    torch.bmm(examples.mT, examples, out=sums[0])


KINDS = (
    Kind("matrix", "a matrix 512², gradient, both sides", "gradient", "| o, i", dict(o=512, i=512), (0, 0), _two_sides),
    Kind("neurons", "blocks of 256 neurons, gradient", "gradient", "o | i", dict(o=256, i=512), (0, 0), _outer),
    Kind(
        "mean",
        "784 -> 1000, mean block, gradient",
        "gradient",
        "~o | i",
        dict(o=1000, i=785),
        (0, 0),
        _averaged,
    ),
    Kind(
        "kernels",
        "convolution 128 -> 128, kernels, gradient",
        "gradient",
        "o i | k...",
        dict(o=128, i=128, k1=3, k2=3),
        (0, 0),
        _outer,
    ),
    Kind(
        "modes",
        "convolution 128 -> 256, three modes, gradient",
        "gradient",
        "| o, i, k...",
        dict(o=256, i=128, k1=3, k2=3),
        (0, 0),
        _modes,
    ),
    Kind(
        "linear-factors", "784 -> 1000, KFAC, batch 1000", "signals", "| o, i", dict(o=1000, i=784), (1000, 1), _factors
    ),
    Kind(
        "convolution-factors",
        "convolution 64 -> 64 on 16², KFAC, batch 16",
        "signals",
        "| o, i k...",
        dict(o=64, i=64, k1=3, k2=3),
        (16, 256),
        _factors,
    ),
    Kind(
        "embedding-factors",
        "embedding 5,000 of 128, KFAC, 16 × 64 tokens",
        "signals",
        "| [v], d",
        dict(v=5000, d=128),
        (16, 64),
        _counts,
    ),
    Kind(
        "linear-neurons",
        "256 -> 128, examples, batch 64",
        "samples",
        "o | i",
        dict(o=128, i=256),
        (64, 1),
        _neurons,
    ),
    Kind(
        "linear-mean",
        "784 -> 1000, mean block, examples, batch 1000",
        "samples",
        "~o | i",
        dict(o=1000, i=784),
        (1000, 1),
        _mean_neuron,
    ),
    Kind(
        "convolution-kernels",
        "convolution 64 -> 64 on 8², kernels, examples, batch 16",
        "samples",
        "o i | k...",
        dict(o=64, i=64, k1=3, k2=3),
        (16, 64),
        _kernels,
    ),
)


def _build(setting: Setting, kind: Kind) -> Contest:
    """Both sides fill tensors of their own from the same operands."""
    torch.manual_seed(0)
    sizes, (n, t) = kind.sizes, kind.batch
    if setting.quick:
        sizes = {name: min(size, 6 + place) for place, (name, size) in enumerate(sizes.items())}
        n, t = min(n, 8), min(t, 5)
    recipe = Recipe(kind.partition, Moment(kind.of))
    return (
        _of_gradient(setting, kind, recipe, sizes)
        if kind.of == "gradient"
        else _heard(setting, kind, recipe, sizes, n, t)
    )


def _of_gradient(setting: Setting, kind: Kind, recipe: Recipe, sizes: dict[str, int]) -> Contest:
    block = StandardBlock(Partition(kind.partition).layout(sizes), recipe)
    gradient = torch.randn(*sizes.values(), device=setting.device)
    specs = {name: spec for name, spec in block.spec().items() if spec.role == "statistics"}
    state = {name: spec.create(1, torch.float32, setting.device) for name, spec in specs.items()}
    return _contest(
        setting,
        kind,
        [one[0] for one in state.values()],
        lambda: block.update(state, gradient[None], KEEP, GAIN),
        gradient,
        gradient,
    )


def _heard(setting: Setting, kind: Kind, recipe: Recipe, sizes: dict[str, int], n: int, t: int) -> Contest:
    embedding = "v" in sizes
    output = ("d",) if embedding else ("o",)
    given_axes = tuple(name for name in sizes if name not in output)
    layout = Partition(kind.partition).layout(sizes, (), (output, given_axes))
    block, device = StandardBlock(layout, recipe), setting.device
    delta = torch.randn(n, t, sizes[output[0]], device=device)
    if embedding:
        given = torch.randint(sizes["v"], (n, t), device=device)
        signal = Signal(delta, output, Index(given, sizes["v"]), given_axes)
    else:
        given = torch.randn(n, t, *(sizes[name] for name in given_axes), device=device)
        signal = Signal(delta, output, given, given_axes)
    sums = block.sums(torch.float32, device)

    def ours() -> None:
        sums.renew_()
        block.collect(sums, [signal], recipe)

    return _contest(setting, kind, list(sums.tensors.values()), ours, delta, given)


def _contest(
    setting: Setting, kind: Kind, held: Sequence[Tensor], ours: Callable[[], None], first: Tensor, second: Tensor
) -> Contest:
    mine = [torch.zeros(one.shape, device=setting.device) for one in held]
    theirs = partial(kind.hand, mine, first, second)

    def difference() -> float:
        ours()
        theirs()
        return relative(held, mine)

    return Contest(
        partial(timed, ours, setting.device),
        partial(timed, theirs, setting.device),
        difference,
        ROUNDING,
        turns=setting.size(10, 1),
    )


CASES = tuple(
    Case(
        f"moment-{kind.name}",
        f"generated moment: {kind.what}",
        "bmm and unfolding by hand",
        at_most(1.2),
        at_most(1.2),
        partial(_build, kind=kind),
    )
    for kind in KINDS
)
