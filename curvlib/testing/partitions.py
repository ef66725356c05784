"""What every partition does, as properties of drawn axis sizes; curvature by definition, in plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..layout import Layout
from ..partition import Partition
from ..recipe import Damping
from .properties import Broken, Property, equal
from .trials import Trial


def _covers(trial: Trial) -> None:
    index = trial.layout.index()
    places = torch.cat([one.flatten() for one in index]) if index else torch.empty(0, dtype=torch.int64)
    if sorted(places.tolist()) != list(range(trial.numel)):
        raise Broken(f"{len(places)} places hold {len(set(places.tolist()))} of {trial.numel} entries")


def _returns(trial: Trial) -> None:
    operand = trial.gradient()
    again = trial.layout.unblock(trial.layout.block(operand), operand)
    equal(again, operand, 0.0, "unblock(block(x))")


def _reads(trial: Trial) -> None:
    partition = trial.recipe.cut
    if Partition(str(partition)) != partition:
        raise Broken(f"{str(partition)!r}, read again, is {str(Partition(str(partition)))!r}")


def factors_of(layout: Layout, gradients: Sequence[tuple[float, Tensor]]) -> list[list[list[Tensor]]]:
    """The factors of one operand by definition: region -> own block -> factor, ``[f, f]`` each.

    Args:
        layout: of the operand.
        gradients: (weight, ``[*shape]``); second moments add up with these weights.
    """
    regions = []
    for region, index in zip(layout.regions, layout.index(), strict=True):
        blocks = []
        for own in range(region.blocks):
            factors = []
            for number, shape in enumerate(region.factors):
                total = torch.zeros(shape.size, shape.size, dtype=torch.float64)
                for weight, gradient in gradients:
                    for tie in range(region.ties):
                        piece = gradient.double().flatten()[index[own, tie]]
                        unfolded = piece.movedim(number, 0).reshape(shape.size, -1)
                        total += weight * unfolded @ unfolded.T / region.ties
                factors.append(total.diag().diag() if shape.diagonal else total)
            blocks.append(factors)
        regions.append(blocks)
    return regions


def active(factors: Sequence[Tensor], composition: str) -> list[int]:
    """The factors that count: those of size one are normalised away, unless all are, or factors are independent."""
    if composition == "independent":
        return list(range(len(factors)))
    return [number for number, factor in enumerate(factors) if len(factor) > 1] or list(range(len(factors)))[:1]


def composed(factors: Sequence[Tensor], composition: str) -> list[Tensor]:
    """Factors whose Kronecker product is the curvature of a block; those that don't count are one."""
    large = active(factors, composition)
    one, k = torch.ones(1, 1, dtype=torch.float64), len(large)
    if composition == "independent" or not large:
        return list(factors)
    if composition == "power-mean":
        return [_power(factor, 1 / k) if number in large else one for number, factor in enumerate(factors)]
    trace = float(factors[large[0]].trace())
    # Every factor gets the same mean eigenvalue, so that their product is ⊗F / tr^(k-1).
    mean = (trace / math.prod(len(factors[number]) for number in large)) ** (1 / k)
    return [
        factor * (mean * len(factor) / trace if trace > 0 else 1.0) if number in large else one
        for number, factor in enumerate(factors)
    ]


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    powers = torch.where(values > 0, values.clamp_min(0) ** exponent, 0.0) if exponent > 0 else values**exponent
    return (vectors * powers) @ vectors.T


def assembled(layout: Layout, regions: Sequence[Sequence[Sequence[Tensor]]]) -> Tensor:
    """The dense matrix of blocks given by their factors."""
    numel = math.prod(layout.shape)
    dense = torch.zeros(numel, numel, dtype=torch.float64)
    for region, index, blocks in zip(layout.regions, layout.index(), regions, strict=True):
        for own, factors in enumerate(blocks):
            product = torch.ones(1, 1, dtype=torch.float64)
            for factor in factors:
                product = torch.kron(product, factor)
            for tie in range(region.ties):
                rows = index[own, tie].flatten()
                dense[rows[:, None], rows[None, :]] = product
    return dense


def _defined(trial: Trial) -> None:
    gradients = [trial.gradient(0), trial.gradient(1)]
    for composition in ("independent", "trace", "power-mean"):
        moment = replace(trial.recipe.moment, composition=composition)
        dense = trial.held(gradients, replace(trial.recipe, moment=moment)).dense()
        wanted = []
        for row in range(trial.n):
            factors = factors_of(trial.layout, [(0.5, one[row]) for one in gradients])
            blocks = [[composed(block, composition) for block in region] for region in factors]
            wanted.append(assembled(trial.layout, blocks))
        # A root of a matrix that is nearly singular keeps half of the digits of its smallest eigenvalues.
        slack = trial.tolerance(dense, -1.0) if composition != "power-mean" else 1e-6
        equal(dense, torch.stack(wanted), slack, f"the curvature, {composition},")


def _solved(trial: Trial) -> None:
    gradients, vector = [trial.gradient(0), trial.gradient(1)], trial.gradient(2)
    recipe = replace(trial.recipe, root=replace(trial.recipe.root, damping=Damping(trial.damping)))
    found = trial.held(gradients, recipe).apply(vector)
    composition = trial.recipe.moment.composition
    for row in range(trial.n):
        roots: list[list[list[Tensor]]] = []
        kappa = 1.0
        for region in factors_of(trial.layout, [(0.5, one[row]) for one in gradients]):
            roots.append([])
            for block in region:
                large, factors = active(block, composition), composed(block, composition)
                norms = [float(torch.linalg.matrix_norm(factors[number], 2)) for number in large]
                kappa = max(kappa, math.prod(1 + norm / trial.damping for norm in norms))
                solved = [_damped(factor, trial.damping, trial.exponent) for factor in factors]
                roots[-1].append([one if n in large else torch.ones(1, 1).double() for n, one in enumerate(solved)])
        wanted = (assembled(trial.layout, roots) @ vector[row].flatten()).view(1, *trial.shape)
        slack = 32 * max(1, trial.numel) * (1 + trial.exponent) * kappa * torch.finfo(trial.dtype).eps
        if slack < 0.1:
            equal(found[row : row + 1], wanted, slack, "apply against the product of (F + λI)^-p over factors")


def _damped(factor: Tensor, damping: float, exponent: float) -> Tensor:
    return _power(factor + damping * torch.eye(len(factor), dtype=torch.float64), -exponent)


FACTORS: Sequence[Property[Trial]] = (
    Property(
        "damped factors",
        "apply() multiplies every mode by its factor's (F + λI)^-p",
        "swapped factors: modes multiplied with each other's; a root applied to the wrong block, or a forgotten damping",
        _solved,
    ),
)
"""Of structures whose factors are damped one by one."""

PROPERTIES: Sequence[Property[Trial]] = (
    Property("text", "a partition read from its own text is the same", "a term that str() leaves out", _reads),
    Property("cover", "every entry lies in exactly one block", "a cut that loses a remainder", _covers),
    Property("return", "unblock() undoes block(), to the last bit", "axes put back in another order", _returns),
    Property(
        "definition",
        "the curvature is, block by block, what the text says: second moments, other axes summed, ties averaged",
        "factors swapped, a wrong scale, or ties averaged twice",
        _defined,
    ),
    *FACTORS,
)
