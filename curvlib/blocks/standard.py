"""The standard block: any partition, as a batch of Kronecker products of factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .. import moments
from ..layout import Layout, Region
from ..moments import Weight
from ..recipe import Recipe
from ..recipe import number as as_float
from ..roots import SILENT, How, RootJob, diagonal_root, solve
from .base import Block, Spec, State


class StandardBlock(Block):
    """Every region of a layout stores its factors and their roots: ``factor_{region}_{number}``, ``root_…``.

    Factors of size one are left out where the composition normalises them away (see :class:`~curvlib.recipe.Moment`).
    """

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        composition = recipe.moment.composition
        self._active = [_active(region, composition) for region in layout.regions]
        self._initial = as_float(recipe.moment.initial)

    def _factors(self) -> Iterator[tuple[int, Region, int, str]]:
        """(region number, region, factor number, suffix of its state) of every stored factor."""
        for index, region in enumerate(self.layout.regions):
            for number in self._active[index]:
                yield index, region, number, f"{index}_{number}"

    def spec(self) -> dict[str, Spec]:
        """Factors ``[blocks, f, f]`` (diagonal: ``[blocks, f]``), their roots, and each root's residual and count."""
        specs: dict[str, Spec] = {}
        for _, region, number, name in self._factors():
            shape = (region.blocks, *region.factors[number].shape)
            dense = not region.factors[number].diagonal
            specs[f"factor_{name}"] = Spec(shape, fill=self._initial, identity=dense)
            specs[f"root_{name}"] = Spec(shape, "roots", fill=1.0, identity=dense)
            if dense:
                specs[f"residual_{name}"] = Spec((region.blocks,), "diagnostics")
                specs[f"kept_{name}"] = Spec((region.blocks,), "diagnostics", dtype=torch.int64)
        return specs

    def update(self, state: State, operand: Tensor, keep: Weight, gain: Weight) -> None:
        """Accumulate the generated second moment of every factor."""
        blocks = self.layout.block(operand)
        for index, _, number, name in self._factors():
            moments.accumulate(state[f"factor_{name}"].flatten(0, 1), blocks[index], number, keep, gain)

    def _prepared(
        self, state: State, index: int, recipe: Recipe, scale: float, exponent: float
    ) -> Iterator[tuple[int, Tensor, Tensor | float, Tensor | float, How]]:
        """(factor number, factor, scale, damping, how) of a region's stored factors, ``[n * blocks, …]``."""
        active = self._active[index]
        factors = [state[f"factor_{index}_{number}"].flatten(0, 1) for number in active]
        scaled = moments.scales(factors, scale, recipe.moment.composition)
        damped = moments.dampings(factors, scaled, recipe.damping, self.layout.regions[index].blocks)
        power = moments.power(exponent, recipe.moment.composition, len(active))
        for number, factor, factor_scale, damping in zip(active, factors, scaled, damped, strict=True):
            yield number, factor, factor_scale, damping, _how(recipe, power, factor.dtype)

    def roots(self, state: State, recipe: Recipe, scale: float) -> Iterable[RootJob]:
        """A job for every dense factor; diagonal factors are done at once."""
        for index in range(len(self.layout.regions)):
            prepared = self._prepared(state, index, recipe, scale, float(recipe.root.exponent))
            for number, factor, factor_scale, damping, how in prepared:
                name = f"{index}_{number}"
                root = state[f"root_{name}"].flatten(0, 1)
                if factor.ndim == 2:
                    root.copy_(_diagonal(factor, factor_scale, damping, how))
                    continue
                residual, kept = state[f"residual_{name}"].flatten(), state[f"kept_{name}"].flatten()
                yield RootJob(factor, factor_scale, damping, how, root, residual, kept)

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """Mode products of the operand with the roots; exponents other than the recipe's are solved for now."""
        blocks = self.layout.block(operand)
        stored = exponent == recipe.root.exponent
        directions = []
        for index, block in enumerate(blocks):
            roots = self._stored(state, index) if stored else self._solved(state, index, recipe, scale, exponent)
            for number, root in roots:
                block = mode_product(block, root, number)
            directions.append(block)
        return self.layout.unblock(directions, operand)

    def _stored(self, state: State, index: int) -> Iterator[tuple[int, Tensor]]:
        for number in self._active[index]:
            yield number, state[f"root_{index}_{number}"].flatten(0, 1)

    def _solved(
        self, state: State, index: int, recipe: Recipe, scale: float, exponent: float
    ) -> Iterator[tuple[int, Tensor]]:
        for number, factor, factor_scale, damping, how in self._prepared(state, index, recipe, scale, exponent):
            shift = damping if exponent > 0 else 0.0
            if factor.ndim == 2:
                yield number, _diagonal(factor, factor_scale, shift, how)
                continue
            matrix = factor * _rows(factor_scale, factor)[:, None, None]
            yield number, matrix if how.power == -1 else solve(matrix, _rows(shift, factor), how)[0]

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """Kronecker products of the factors, put in place."""
        n = next((value.shape[0] for value in state.values()), 0)
        numel = 1
        for size in self.layout.shape:
            numel *= size
        some = next(iter(state.values()), torch.empty(0))
        dense = torch.zeros(n, numel, numel, dtype=some.dtype, device=some.device)
        for index, (region, positions) in enumerate(zip(self.layout.regions, self.layout.index(), strict=True)):
            kron = torch.ones(n * region.blocks, 1, 1, dtype=some.dtype, device=some.device)
            powers = dict(self._solved(state, index, recipe, scale, -1.0))
            for number, factor in enumerate(region.factors):
                one = powers.get(number, torch.ones(n * region.blocks, 1, device=some.device, dtype=some.dtype))
                kron = _batched_kron(kron, one.diag_embed() if factor.diagonal or one.ndim == 2 else one)
            kron = kron.unflatten(0, (n, region.blocks))
            rows = positions.flatten(2).to(some.device)  # own tied (f1 f2 …)
            for tie in range(region.ties):
                dense[:, rows[:, tie, :, None], rows[:, tie, None, :]] = kron
        return dense


def _active(region: Region, composition: str) -> list[int]:
    numbers = list(range(len(region.factors)))
    if composition == "independent":
        return numbers
    return [number for number in numbers if region.factors[number].size > 1] or numbers[:1]


def _how(recipe: Recipe, power: float, dtype: torch.dtype) -> How:
    root, damping = recipe.root, recipe.damping
    largest = damping.relative_to == "largest"
    possible = power == 1 and not damping.outside and not largest
    if root.solver == "cholesky" and not possible and power >= 0:
        raise ValueError(
            f"solver='cholesky' inverts, with a damping inside the root; here each factor has the power {power:g}, "
            f"outside={damping.outside}, relative_to={damping.relative_to!r}: use solver='auto' or 'eigh'"
        )
    return How(
        power=power,
        solver="cholesky" if possible and root.solver != "eigh" else "eigh",
        dtype=torch.float64 if root.dtype == "float64" else dtype,
        outside=damping.outside and power > 0,
        largest=largest and power > 0,
        floor=as_float(damping.floor) if damping.relative_to is not None and power > 0 else None,
        tolerance=root.tolerance,
    )


def _rows(value: Tensor | float, factor: Tensor) -> Tensor:
    """A number for every factor, ``[B]``."""
    return torch.as_tensor(value, dtype=factor.dtype, device=factor.device).expand(factor.shape[0])


def _diagonal(factor: Tensor, scale: Tensor | float, damping: Tensor | float, how: How) -> Tensor:
    value = factor * (scale[:, None] if isinstance(scale, Tensor) else scale)
    if how.largest:
        damping = (damping * value.amax(-1)).clamp_min(how.floor or 0.0)
    if not isinstance(damping, Tensor):
        return diagonal_root(value, damping, how.power, how.outside)
    root = diagonal_root(value, damping[:, None], how.power, how.outside)
    return root if how.floor is None else torch.where(damping[:, None] > SILENT, root, 1.0)


def mode_product(block: Tensor, root: Tensor, number: int) -> Tensor:
    """Multiply a symmetric matrix into one mode of a tensor, batched.

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
        return torch.bmm(block.flatten(1, -2), root).view(block.shape)
    moved = block.movedim(mode, 1)  # B f ties others
    return torch.bmm(root, moved.flatten(2)).view(moved.shape).movedim(1, mode)


def _batched_kron(left: Tensor, right: Tensor) -> Tensor:
    product = torch.einsum("bij,bkl->bikjl", left, right)
    return product.reshape(left.shape[0], left.shape[1] * right.shape[1], left.shape[2] * right.shape[2])
