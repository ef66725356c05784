"""Moments: the generated statistic of a factor, and how factors compose to the curvature of a block.

Give every axis of a block a letter and every axis of factor F a primed twin; the second moment of F from a gradient is
``G, G' -> own, F, F'``. Other factors' axes are summed, tied axes averaged. As both operands are the same gradient, the
contraction is X Xᵀ with X = [own, F, everything summed], accumulated straight into the stored factor.

One scale, everywhere: G is the gradient of the mean over examples of per-example losses.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence

import opt_einsum
import torch
from torch import Tensor

from . import planes
from .checks import number as as_float
from .grams import add_grams
from .layout import Region
from .precision import flush_subnormals_
from .recipe import Damping

Weight = float | Tensor

_CACHED = 1 << 18  # entries


def equation(region: Region, number: int) -> str:
    """The contraction of factor ``number`` in a region, over ``[own, tied, factor...]``: the definition of the moment.

    The result is divided by the number of ties.
    """
    own, tied, *factors = list(string.ascii_lowercase[: 2 + len(region.factors)])
    mine = factors[number]
    twin = mine if region.factors[number].diagonal else mine.upper()
    gradient = "".join([own, tied, *factors])
    again = gradient.replace(mine, twin)
    return f"{gradient},{again}->{own}{mine}{'' if twin == mine else twin}"


def second_moment(block: Tensor, region: Region, number: int) -> Tensor:
    """The second moment of one factor by its definition.

    Args:
        block: ``[B, ties, *factor sizes]``.
        region: the region.
        number: which factor.

    Returns:
        ``[B, f, f]``, or ``[B, f]`` for a diagonal factor.
    """
    moment: Tensor = opt_einsum.contract(equation(region, number), block, block)
    return moment / region.ties


def accumulate(factor: Tensor, block: Tensor, number: int, keep: Weight, gain: Weight) -> None:
    """F <- keep F + gain S, with S the second moment of factor ``number``, in place.

    Args:
        factor: ``[B, f, f]``, or ``[B, f]`` for a diagonal factor.
        block: ``[B, ties, *factor sizes]``.
        number: which factor.
        keep: weight of the old value; a tensor stays on its device.
        gain: weight of the new one.
    """
    ties = block.shape[1]
    x = block.movedim(2 + number, 1).flatten(2)  # own f (tied others)
    if factor.ndim == 3 and x.shape[-1] == 1 and planes.laid(factor):
        planes.accumulate(factor, x[..., 0], keep, gain)
        return
    if factor.ndim == 3 and x.shape[-1] == 1:
        for one, part in _runs(factor, x):
            flush_subnormals_(one.mul_(keep).addcmul_(part * gain, part.mT, value=1 / ties))
        return
    if isinstance(keep, Tensor) or isinstance(gain, Tensor):
        factor.mul_(keep)
        weighted = x * gain
        if factor.ndim == 2:
            factor.add_((x * weighted).sum(-1), alpha=1 / ties)
        else:
            factor.baddbmm_(weighted, x.mT, alpha=1 / ties)
    else:
        add_grams(factor, x.mT, gain / ties, keep)
    flush_subnormals_(factor)


def _runs(factor: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Matrices and their vectors, on a CPU as many at a time as stay in its cache between one operation and the next."""
    if factor.device.type != "cpu" or factor.numel() <= _CACHED:
        yield factor, x
        return
    each = max(1, _CACHED // factor[0].numel())
    yield from zip(factor.split(each), x.split(each), strict=True)


def trace(factor: Tensor) -> Tensor:
    """The trace of every factor, ``[B]``."""
    return factor.sum(-1) if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1).sum(-1)


def scales(factors: Sequence[Tensor], scale: float, composition: str) -> list[Tensor | float]:
    """What each stored factor is multiplied by, so that the curvature of a block is the product of (powers of) factors.

    Args:
        factors: the stored factors of a region.
        scale: of the average, see :meth:`Moment.scale`.
        composition: see :class:`~curvlib.recipe.Moment`.

    Returns:
        A number, or ``[B]``, for each factor. For ``"trace"``, with c = (tr / Π f_j)^(1/k), factor i is divided by
        c^(k-1) Π_{j≠i} f_j: all factors get the mean eigenvalue c (Ren & Goldfarb 2021, TNT), and their product is
        ⊗F / tr^(k-1).
    """
    k = len(factors)
    if composition != "trace" or k == 1:
        return [scale] * k
    sizes = [factor.shape[-1] for factor in factors]
    entries = 1
    for size in sizes:
        entries *= size
    total = trace(factors[0]) * scale
    common = (total / entries) ** ((k - 1) / k)
    common = torch.where(common > 0, common, 1.0)
    return [scale / (common * (entries // size)) for size in sizes]


def power(exponent: float, composition: str, k: int) -> float:
    """The power of one of k factors in curvature^(-exponent)."""
    return exponent / k if composition == "power-mean" else exponent


def dampings(
    factors: Sequence[Tensor], scale: Sequence[Tensor | float], damping: Damping, rows: Sequence[int]
) -> list[Tensor | float]:
    """λ of every factor, a number or ``[B]``; relative to the largest eigenvalue it is still the multiple.

    Args:
        factors: the stored factors of a region.
        scale: what they are multiplied by first.
        damping: the rule.
        rows: for each factor how many consecutive ones belong to one parameter. Where these numbers differ, factors
            stand in several blocks each, and their mean eigenvalues are compared as means over the parameter.
    """
    value, k = as_float(damping.value), len(factors)
    if damping.relative_to in ("trace", "layer"):
        floor = as_float(damping.floor)
        layer = damping.relative_to == "layer"
        means = [
            _group_mean(mean, size if layer else 1) for mean, size in zip(_means(factors, scale), rows, strict=True)
        ]
        return [(value * mean).clamp_min(floor) for mean in means]
    if damping.split == "sqrt":
        return [value ** (1 / k)] * k
    if damping.split in ("pi", "trace"):
        means = [mean.clamp_min(torch.finfo(mean.dtype).tiny) for mean in _means(factors, scale)]
        if damping.split == "trace":
            means = [mean * factor.shape[-1] for mean, factor in zip(means, factors, strict=True)]
        if len(set(rows)) > 1:
            means = [mean.unflatten(0, (-1, size)).mean(1) for mean, size in zip(means, rows, strict=True)]
        geometric = torch.stack([mean.log() for mean in means]).mean(0).exp()
        shares = [value ** (1 / k) * mean / geometric for mean in means]
        if len(set(rows)) > 1:
            return [share.repeat_interleave(size) for share, size in zip(shares, rows, strict=True)]
        return list(shares)
    return [value] * k


def _group_mean(mean: Tensor, size: int) -> Tensor:
    return mean if size <= 1 else mean.unflatten(0, (-1, size)).mean(1).repeat_interleave(size)


def _means(factors: Sequence[Tensor], scale: Sequence[Tensor | float]) -> list[Tensor]:
    """The mean eigenvalue of every scaled factor, ``[B]``."""
    pairs = zip(factors, scale, strict=True)
    return [trace(factor) / factor.shape[-1] * factor_scale for factor, factor_scale in pairs]
