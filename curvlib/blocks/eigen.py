"""The eigen block: any partition, its blocks damped as a whole in the eigenbases of their factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..checks import number
from ..layout import FactorShape, Layout
from ..moments import power
from ..recipe import Damping, Recipe
from ..roots import Moved, RootJob, solve
from ..solvers import SILENT, diagonal_root
from .base import Spec, State
from .standard import Place, StandardBlock, spread


class EigenBlock(StandardBlock):
    """Factors as in the standard block, F_i = Q_i Λ_i Q_iᵀ, but the damping is added to their product.

    In formulas::

        (⊗ F_i + λI)^-p = (⊗ Q_i) (⊗ Λ_i + λ)^-p (⊗ Q_i)ᵀ

    instead of being shared out among the factors. For one factor both are the same. The state holds ``basis_…`` with
    eigenvectors as columns and ``values_…`` instead of roots; a relative damping is relative to the mean or the largest
    eigenvalue of the product, as of the last refresh.
    """

    damps: ClassVar[Literal["whole", "factors"]] = "whole"
    reads_values: ClassVar[bool] = True
    """Whether eigenvalues are used, so that they must be as good as the vectors."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        if recipe.damping.split is not None:
            raise ValueError(f"EigenBlock damps the product of factors; set split=None, got {recipe.damping.split!r}")

    def _root_spec(self, name: str, rows: int, factor: FactorShape) -> dict[str, Spec]:
        values = {f"values_{name}": Spec((rows, factor.size), "roots", fill=1.0)}
        if factor.diagonal:
            return values
        return {f"basis_{name}": Spec((rows, factor.size, factor.size), "roots", fill=1.0, identity=True), **values}

    def roots(self, state: State, recipe: Recipe, scale: float) -> Iterable[RootJob]:
        """A job for the basis of every dense factor."""
        for index in range(len(self.layout.regions)):
            for place, factor, factor_scale, _, how in self._prepared(state, index, recipe, scale, 1.0, basis=True):
                if place.region != index:
                    continue
                values = state[f"values_{place.name}"].flatten(0, 1)
                if factor.ndim == 2:
                    values.copy_(factor * _column(factor_scale))
                    continue
                basis = state[f"basis_{place.name}"].flatten(0, 1)
                residual, kept = (state[f"{what}_{place.name}"].flatten() for what in ("residual", "kept"))
                moved = self._moved(state, place)
                how = replace(how, estimates=not self.reads_values)
                yield RootJob(factor, factor_scale, 0.0, how, basis, residual, kept, values, moved)

    def _moved(self, state: State, place: Place) -> Moved | None:
        """What is to be told when the basis of a factor changes; by default nothing lives in it."""
        return None

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """Rotate into the eigenbases, divide, rotate back; another exponent than the recipe's is solved for now."""
        if exponent < 0:
            return super().apply(state, operand, recipe, exponent, scale)
        directions = []
        for index, block in enumerate(self.layout.block(operand)):
            eigen = {
                place.number: (place, *self._eigen(state, index, place, recipe, scale, exponent))
                for place in self._places[index]
            }
            bases = [(place, basis) for place, basis, _ in eigen.values() if basis is not None]
            product = self._product(
                index, {number: (place, value) for number, (place, _, value) in eigen.items()}, recipe
            )
            power = damped_power(product, recipe.damping, exponent, self.layout.regions[index].blocks)
            directions.append(self._in_bases(index, block, bases, power))
        return self.layout.unblock(directions, operand)

    def _in_bases(self, index: int, block: Tensor, bases: Sequence[tuple[Place, Tensor]], entries: Tensor) -> Tensor:
        """Rotate, multiply by ``[n * blocks, *factor sizes]``, rotate back."""
        rotated = self._multiplied(index, block, ((place, basis.mT) for place, basis in bases))
        return self._multiplied(index, rotated * entries[:, None], bases)

    def _bases(self, state: State, index: int) -> list[tuple[Place, Tensor]]:
        """The stored eigenvectors ``[n * rows, f, f]`` of a region's dense factors."""
        return [
            (place, state[f"basis_{place.name}"].flatten(0, 1))
            for place in self._places[index]
            if f"basis_{place.name}" in state
        ]

    def _eigen(
        self, state: State, index: int, place: Place, recipe: Recipe, scale: float, exponent: float
    ) -> tuple[Tensor | None, Tensor]:
        """Eigenvectors (none of a diagonal) and eigenvalues of one factor, ``[n * rows, f]``."""
        if exponent == recipe.root.exponent:
            basis = state.get(f"basis_{place.name}")
            return None if basis is None else basis.flatten(0, 1), state[f"values_{place.name}"].flatten(0, 1)
        for other, factor, factor_scale, _, how in self._prepared(state, index, recipe, scale, 1.0, basis=True):
            if other is place:
                if factor.ndim == 2:
                    return None, factor * _column(factor_scale)
                matrix = factor * (factor_scale[:, None, None] if isinstance(factor_scale, Tensor) else factor_scale)
                solved, _ = solve(matrix, matrix.new_zeros(matrix.shape[0]), how)
                return solved[:, :-1], solved[:, -1]
        raise AssertionError(place)

    def _product(self, index: int, values: Mapping[int, tuple[Place, Tensor]], recipe: Recipe) -> Tensor:
        """The eigenvalues of the product, ⊗ Λ_i: ``[n * blocks, *factor sizes]``."""
        region = self.layout.regions[index]
        share = power(1.0, recipe.moment.composition, len(values))
        product: Tensor | None = None
        for number_, _ in enumerate(region.factors):
            if number_ not in values:  # a factor of size one that the composition normalises away
                product = None if product is None else product[..., None]
                continue
            one = spread(values[number_][1], region, values[number_][0]) ** share
            product = (
                one if product is None else product[..., None] * one.view(-1, *[1] * (product.ndim - 1), one.shape[-1])
            )
        assert product is not None
        missing = len(region.factors) + 1 - product.ndim
        return product.view(product.shape[0], *[1] * missing, *product.shape[1:])


def damped_power(values: Tensor, rule: Damping, exponent: float, blocks: int) -> Tensor:
    """(values + λ)^-p, or (values^p + ε)^-1: entry by entry, with λ for every block.

    Args:
        values: ``[n * blocks, ...]``.
        rule: the damping; relative to the mean or the largest of a block's values, or to the mean over a parameter's.
        exponent: p; below zero there is no damping.
        blocks: how many belong to one parameter.
    """
    flat = values.flatten(1)
    damping: Tensor = flat.new_full((flat.shape[0],), number(rule.value))
    if rule.relative_to is not None:
        measure = flat.amax(1) if rule.relative_to == "largest" else flat.mean(1)
        if rule.relative_to == "layer":
            measure = measure.unflatten(0, (-1, blocks)).mean(1).repeat_interleave(blocks)
        damping = (damping * measure).clamp_min(number(rule.floor))
    damping = damping.view(-1, *[1] * (values.ndim - 1)) * float(exponent > 0)
    divided = diagonal_root(values, damping, exponent, rule.outside and exponent > 0)
    if rule.relative_to is not None and exponent > 0:
        divided = torch.where(damping > SILENT, divided, 1.0)
    return divided


def _column(scale: Tensor | float) -> Tensor | float:
    return scale[:, None] if isinstance(scale, Tensor) else scale
