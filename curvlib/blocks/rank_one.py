"""The rank-one block: Kronecker products of means instead of second moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import number
from ..contraction import add_first, independent_places
from ..layout import Layout
from ..moments import Weight
from ..recipe import Recipe
from ..signals import Signal
from .base import Block, Spec, State, Sums
from .standard import put_in_place, spread


class RankOneBlock(Block):
    """Every block is w wᵀ with w = ⊗ v_i, and v_i the mean of the signal that carries factor i (Zhang et al. 2023, Eva).

    In formulas, by Sherman and Morrison::

        (w wᵀ + λI)^-p g = λ^-p g + ((wᵀw + λ)^-p - λ^-p) (wᵀg / wᵀw) w

    State: ``mean_{region}_{number}``, vectors only; there are no roots to solve. It needs ``of="signals"`` and an absolute
    damping above zero.
    """

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        if recipe.moment.of != "signals":
            raise ValueError(f"RankOneBlock needs Moment(of='signals'), got of={recipe.moment.of!r}")
        if recipe.moment.labels == "exact":
            raise ValueError(
                "RankOneBlock averages signals themselves, which exact labels have many of; got labels='exact'"
            )
        if recipe.damping.relative_to or recipe.damping.split or recipe.damping.outside:
            raise ValueError(f"RankOneBlock damps by an absolute number, got {recipe.damping}")
        self._places = independent_places(layout)

    def spec(self) -> dict[str, Spec]:
        """The mean of every factor's signal, ``[rows, f]``, stored once for all blocks that share it."""
        return {
            f"mean_{place.name}": Spec(
                (place.rows(region), region.factors[place.number].size), of_input=place.source == 1, order=1
            )
            for index, (region, places) in enumerate(zip(self.layout.regions, self._places, strict=True))
            for place in places
            if place.region == index
        }

    def collect(self, sums: Sums, signals: Sequence[Signal], recipe: Recipe) -> None:
        """Add the signals themselves."""
        tensors = sums.zeroed_()
        for index, places in enumerate(self._places):
            for place in places:
                if place.region == index:
                    add_first(tensors[f"mean_{place.name}"], place, self.layout, signals[0])

    def update(self, state: State, operand: Tensor, keep: Weight, gain: Weight) -> None:
        """Refused: a gradient has no signals.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "RankOneBlock averages the signals of layers; give the recipe a fallback for what can't be heard"
        )

    def _vectors(self, state: State, scale: float) -> list[Tensor]:
        """W of every block, region by region: ``[n * blocks, 1, *factor sizes]``."""
        vectors = []
        for region, places in zip(self.layout.regions, self._places, strict=True):
            product: Tensor | None = None
            for place in places:
                one = spread(state[f"mean_{place.name}"].flatten(0, 1) * scale, region, place)
                product = (
                    one
                    if product is None
                    else product[..., None] * one.view(one.shape[0], *[1] * (product.ndim - 1), one.shape[-1])
                )
            assert product is not None
            vectors.append(product[:, None])
        return vectors

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """One inner product a block.

        Raises:
            ValueError: without damping, since w wᵀ is singular.
        """
        damping = number(recipe.damping.value) if exponent > 0 else 0.0
        if exponent > 0 and damping == 0:
            raise ValueError("damping must be above 0 for RankOneBlock, whose blocks are singular, got 0")
        directions = []
        for block, w in zip(self.layout.block(operand), self._vectors(state, scale), strict=True):
            dims = tuple(range(2, block.ndim))
            size = w.square().sum(dims, keepdim=True)
            along = (block * w).sum(dims, keepdim=True) * w
            if exponent < 0:
                directions.append(along * size ** (-exponent - 1))
                continue
            plain = damping**-exponent
            share = ((size + damping) ** -exponent - plain) / size.clamp_min(torch.finfo(size.dtype).tiny)
            directions.append(plain * block + share * along)
        return self.layout.unblock(directions, operand)

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """W wᵀ, put in place."""
        flat = (vectors.flatten(1) for vectors in self._vectors(state, scale))
        return put_in_place(self.layout, (w[:, :, None] * w[:, None, :] for w in flat), next(iter(state.values())))
