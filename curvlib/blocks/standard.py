"""The standard block: any partition, as a batch of Kronecker products of factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import moments
from ..checks import number as as_float
from ..contraction import Place, Target, add_independent, add_samples, independent_places
from ..layout import FactorShape, Layout, Region
from ..moments import Weight
from ..recipe import Recipe
from ..roots import RootJob, solve
from ..signals import Signal
from ..solvers import SILENT, How, chosen, diagonal_root
from .base import Block, Spec, State, Sums


class StandardBlock(Block):
    """Every region of a layout stores its factors and their roots: ``factor_{region}_{number}``, ``root_…``.

    Factors of size one are left out where the composition normalises them away (see :class:`~curvlib.recipe.Moment`). A
    factor that comes from one of a layer's signals is stored once for all blocks that share it.
    """

    damps: ClassVar[Literal["whole", "factors"]] = "factors"
    rowwise: ClassVar[bool] = True

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        self._initial = as_float(recipe.moment.initial)
        if recipe.moment.of == "signals":
            self._places = independent_places(layout)
        else:
            self._places = [
                [
                    Place(index, number, f"{index}_{number}", (True,) * len(region.own))
                    for number in _active(region, recipe.moment.composition)
                ]
                for index, region in enumerate(layout.regions)
            ]

    def _stored(self) -> Iterator[tuple[Region, Place]]:
        """Every stored factor with the region it is defined in."""
        for index, places in enumerate(self._places):
            for place in places:
                if place.region == index:
                    yield self.layout.regions[index], place

    def spec(self) -> dict[str, Spec]:
        """Factors ``[rows, f, f]`` (diagonal: ``[rows, f]``), their roots, and each root's residual and count."""
        specs: dict[str, Spec] = {}
        for region, place in self._stored():
            factor, rows = region.factors[place.number], place.rows(region)
            dense = not factor.diagonal
            name = place.name
            specs[f"factor_{name}"] = Spec(
                (rows, *factor.shape), fill=self._initial, identity=dense, of_input=place.source == 1, planes=dense
            )
            specs.update(self._root_spec(name, rows, factor))
            if dense:
                specs[f"residual_{name}"] = Spec((rows,), "diagnostics")
                specs[f"kept_{name}"] = Spec((rows,), "diagnostics", dtype=torch.int64)
        return specs

    def _root_spec(self, name: str, rows: int, factor: FactorShape) -> dict[str, Spec]:
        return {f"root_{name}": Spec((rows, *factor.shape), "roots", fill=1.0, identity=not factor.diagonal)}

    def update(self, state: State, operand: Tensor, keep: Weight, gain: Weight) -> None:
        """Accumulate the generated second moment of every factor."""
        blocks = self.layout.block(operand)
        for _, place in self._stored():
            factor = state[f"factor_{place.name}"].flatten(0, 1)
            moments.accumulate(factor, blocks[place.region], place.number, keep, gain)

    def collect(self, sums: Sums, signals: Sequence[Signal], recipe: Recipe) -> None:
        """Add the generated second moments of single examples' gradients, or of the signals by themselves."""
        if recipe.moment.of == "samples":
            tensors = sums.zeroed_()
            targets = [
                Target(place.region, place.number, tensors[f"factor_{place.name}"]) for _, place in self._stored()
            ]
            add_samples(targets, self.layout, signals)
            return
        reduce, fresh = recipe.moment.sharing == "reduce", sums.fresh
        for _, place in self._stored():
            if f"factor_{place.name}" in sums.tensors:
                total = sums.tensors[f"factor_{place.name}"]
                add_independent(total, place, self.layout, signals[0], reduce, fresh)
        sums.fresh = False

    def _prepared(
        self, state: State, index: int, recipe: Recipe, scale: float, exponent: float, basis: bool = False
    ) -> Iterator[tuple[Place, Tensor, Tensor | float, Tensor | float, How]]:
        """(place, factor, scale, damping, how) of a region's factors, ``[n * rows, …]``."""
        region, places = self.layout.regions[index], self._places[index]
        factors = [state[f"factor_{place.name}"].flatten(0, 1) for place in places]
        scaled = moments.scales(factors, scale, recipe.moment.composition)
        rows = [place.rows(region) for place in places]
        damped = moments.dampings(factors, scaled, recipe.damping, rows)
        power = moments.power(exponent, recipe.moment.composition, len(places))
        for place, factor, factor_scale, damping in zip(places, factors, scaled, damped, strict=True):
            yield place, factor, factor_scale, damping, _how(recipe, power, factor.dtype, basis)

    def roots(self, state: State, recipe: Recipe, scale: float) -> Iterable[RootJob]:
        """A job for every dense factor; diagonal factors are done at once."""
        for index in range(len(self.layout.regions)):
            for place, factor, factor_scale, damping, how in self._prepared(
                state, index, recipe, scale, float(recipe.root.exponent)
            ):
                if place.region != index:
                    continue
                root = state[f"root_{place.name}"].flatten(0, 1)
                if factor.ndim == 2:
                    root.copy_(diagonal(factor, factor_scale, damping, how))
                    continue
                residual, kept = (state[f"{what}_{place.name}"].flatten() for what in ("residual", "kept"))
                yield RootJob(factor, factor_scale, damping, how, root, residual, kept)

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """Mode products of the operand with the roots; exponents other than the recipe's are solved for now."""
        blocks = self.layout.block(operand)
        if exponent == recipe.root.exponent:
            directions = self._apply_stored(state, blocks, recipe)
        else:
            directions = [
                self._multiplied(index, block, self._solved(state, index, recipe, scale, exponent))
                for index, block in enumerate(blocks)
            ]
        return self.layout.unblock(directions, operand)

    def _apply_stored(self, state: State, blocks: list[Tensor], recipe: Recipe) -> list[Tensor]:
        return [
            self._multiplied(
                index, block, ((place, state[f"root_{place.name}"].flatten(0, 1)) for place in self._places[index])
            )
            for index, block in enumerate(blocks)
        ]

    def _multiplied(self, index: int, block: Tensor, matrices: Iterable[tuple[Place, Tensor]]) -> Tensor:
        region = self.layout.regions[index]
        for place, matrix in matrices:
            if all(place.carried):
                block = mode_product(block, matrix, place.number)
                continue
            apart = gathered(block, region, place)
            product = mode_product(apart.flatten(1, 2).contiguous(), matrix, place.number)
            block = scattered(product.view(apart.shape), region, place, block)
        return block

    def _solved(
        self, state: State, index: int, recipe: Recipe, scale: float, exponent: float
    ) -> Iterator[tuple[Place, Tensor]]:
        for place, factor, factor_scale, damping, how in self._prepared(state, index, recipe, scale, exponent):
            shift = damping if exponent > 0 else 0.0
            if factor.ndim == 2:
                yield place, diagonal(factor, factor_scale, shift, how)
                continue
            matrix = factor * _rows(factor_scale, factor)[:, None, None]
            yield place, matrix if how.power == -1 else solve(matrix, _rows(shift, factor), how)[0]

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """Kronecker products of the factors, put in place."""
        products = []
        for index in range(len(self.layout.regions)):
            solved = StandardBlock._solved(self, state, index, recipe, scale, -1.0)
            products.append(self._kron(state, index, {place.number: (place, matrix) for place, matrix in solved}))
        return put_in_place(self.layout, products, next(iter(state.values())))

    def _kron(self, state: State, index: int, matrices: Mapping[int, tuple[Place, Tensor]]) -> Tensor:
        """The Kronecker product of one matrix (or diagonal) for each factor, the identity where there is none.

        Returns:
            ``[n * blocks, numel of a block, ...]``.
        """
        region, some = self.layout.regions[index], next(iter(state.values()))
        n = some.shape[0]
        kron = some.new_ones(n * region.blocks, 1, 1)
        for number, factor in enumerate(region.factors):
            one = torch.eye(factor.size, dtype=some.dtype, device=some.device).expand(n * region.blocks, -1, -1)
            if number in matrices:
                place, matrix = matrices[number]
                one = spread(matrix.diag_embed() if matrix.ndim == 2 else matrix, region, place)
            kron = _batched_kron(kron, one)
        return kron


def put_in_place(layout: Layout, blocks: Iterable[Tensor], like: Tensor) -> Tensor:
    """The matrix of whole operands, ``[n, numel, numel]``, from the matrices of their blocks, region by region.

    Args:
        layout: the partition.
        blocks: for every region ``[n * blocks, numel of a block, ...]``.
        like: any piece of state, ``[n, ...]``.
    """
    n, numel = like.shape[0], math.prod(layout.shape)
    dense = like.new_zeros(n, numel, numel)
    for region, positions, matrices in zip(layout.regions, layout.index(), blocks, strict=True):
        apart = matrices.unflatten(0, (n, region.blocks))
        rows = positions.flatten(2).to(dense.device)  # own tied (f1 f2 …)
        for tie in range(region.ties):
            dense[:, rows[:, tie, :, None], rows[:, tie, None, :]] = apart
    return dense


def _own_order(region: Region, place: Place) -> list[int]:
    """The own axes, those that index the factor first."""
    held = [dim for dim, carried in enumerate(place.carried) if carried]
    return held + [dim for dim, carried in enumerate(place.carried) if not carried]


def gathered(block: Tensor, region: Region, place: Place) -> Tensor:
    """``[n * blocks, ties, …]`` -> ``[n * rows, blocks / rows, ties, …]``: blocks that share a factor side by side."""
    sizes = [axis.size for axis in region.own]
    n = block.shape[0] // max(1, region.blocks)
    apart = block.unflatten(0, (n, *sizes))
    order = [0, *(1 + dim for dim in _own_order(region, place))]
    moved = apart.permute(*order, *range(1 + len(sizes), apart.ndim))
    return moved.reshape(n * place.rows(region), -1, *block.shape[1:])


def scattered(value: Tensor, region: Region, place: Place, like: Tensor) -> Tensor:
    """The inverse of :func:`gathered`."""
    order = _own_order(region, place)
    n = like.shape[0] // max(1, region.blocks)
    apart = value.reshape(n, *(region.own[dim].size for dim in order), *like.shape[1:])
    back = [0, *(1 + order.index(dim) for dim in range(len(order)))]
    return apart.permute(*back, *range(1 + len(order), apart.ndim)).reshape(like.shape)


def spread(matrix: Tensor, region: Region, place: Place) -> Tensor:
    """A factor for every block: ``[n * rows, …]`` -> ``[n * blocks, …]``."""
    if all(place.carried):
        return matrix
    n = matrix.shape[0] // place.rows(region)
    held = [axis.size if carried else 1 for axis, carried in zip(region.own, place.carried, strict=True)]
    full = matrix.reshape(n, *held, *matrix.shape[1:])
    return full.expand(n, *(axis.size for axis in region.own), *matrix.shape[1:]).reshape(-1, *matrix.shape[1:])


def _active(region: Region, composition: str) -> list[int]:
    numbers = list(range(len(region.factors)))
    if composition == "independent":
        return numbers
    return [number for number in numbers if region.factors[number].size > 1] or numbers[:1]


def _how(recipe: Recipe, power: float, dtype: torch.dtype, basis: bool) -> How:
    root, damping = recipe.root, recipe.damping
    dtype = torch.float64 if root.dtype == "float64" else dtype
    if basis:  # its damping comes later
        return chosen(How(1.0, root.solver, dtype, tolerance=root.tolerance, basis=True))
    how = How(
        power=power,
        solver=root.solver,
        dtype=dtype,
        outside=damping.outside and power > 0,
        largest=damping.relative_to == "largest" and power > 0,
        floor=as_float(damping.floor) if damping.relative_to is not None and power > 0 else None,
        tolerance=root.tolerance,
    )
    return chosen(how)


def _rows(value: Tensor | float, factor: Tensor) -> Tensor:
    """A number for every factor, ``[B]``."""
    return torch.as_tensor(value, dtype=factor.dtype, device=factor.device).expand(factor.shape[0])


def diagonal(factor: Tensor, scale: Tensor | float, damping: Tensor | float, how: How) -> Tensor:
    """The root of diagonal factors ``[B, f]``; the identity where a relative damping says that there is no signal yet."""
    value = factor * (scale[:, None] if isinstance(scale, Tensor) else scale)
    if how.largest:
        damping = (damping * value.amax(-1)).clamp_min(how.floor or 0.0)
    if not isinstance(damping, Tensor):
        return diagonal_root(value, damping, how.power, how.outside)
    root = diagonal_root(value, damping[:, None], how.power, how.outside)
    return root if how.floor is None else torch.where(damping[:, None] > SILENT, root, 1.0)


def mode_product(block: Tensor, root: Tensor, number: int) -> Tensor:
    """Multiply a matrix into one mode of a tensor, batched: Σ_g root[f, g] block[… g …].

    Args:
        block: ``[B, ties, *factor sizes]``.
        root: ``[B, f, f]``, or ``[B, f]`` for a diagonal.
        number: which factor's mode.
    """
    mode = 2 + number
    if root.ndim == 2:
        shape = [1] * block.ndim
        shape[0], shape[mode] = root.shape
        return block * root.view(shape)
    if mode == block.ndim - 1:  # B (ties others) f
        return torch.bmm(block.flatten(1, -2), root.mT).view(block.shape)
    moved = block.movedim(mode, 1)  # B f ties others
    return torch.bmm(root, moved.flatten(2)).view(moved.shape).movedim(1, mode)


def _batched_kron(left: Tensor, right: Tensor) -> Tensor:
    product = torch.einsum("bij,bkl->bikjl", left, right)
    return product.reshape(left.shape[0], left.shape[1] * right.shape[1], left.shape[2] * right.shape[2])
