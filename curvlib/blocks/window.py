"""The window block: curvature as the last gradients themselves, solved by Woodbury's identity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import roots
from ..checks import number
from ..layout import Layout
from ..moments import Weight
from ..precision import flush_subnormals_
from ..recipe import Recipe
from ..roots import RootJob, solve
from ..solvers import SILENT, How, chosen
from .base import Block, Spec, State
from .standard import put_in_place

_ENDLESS = 1e15
"""The square of it is in the range of float32, and beyond all curvature."""


class WindowBlock(Block):
    """Every mini-block is F = Σ_k w_k g_k g_kᵀ over the last W gradients g_k, which are kept instead of F.

    With A the rows √w_k g_k, and M = A Aᵀ of size W from a Gram matrix that gets one new row a step (Woodbury)::

        (F + λI)^-1 v = (v - Aᵀ (M + λI)^-1 A v) / λ

    and for any power p, with M = V Λ Vᵀ::

        (F + λI)^-p v = λ^-p v + Aᵀ V diag(((Λ + λ)^-p - λ^-p) / Λ) Vᵀ A v

    This is the average of :class:`StandardBlock` but for what left the window: a share of β^W of an EMA. A block of f entries
    takes W (f + 2W) numbers instead of 2 f². Digits are lost where λ is far below the curvature's size times the precision.

    State of a region: ``window_…``, ``gram_…``, ``lower_…`` (Cholesky's factor of M + λI; with another solver ``core_…``, its
    inverse, or M's eigenvectors), ``damping_…``; and of all: ``weight``, and ``place``, where the next gradient goes.
    M is solved with every statistic, whatever the schedule of refreshes.
    """

    rowwise: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"window"})

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        moment, damping = recipe.moment, recipe.damping
        assert moment.window is not None
        self._length, self._inverse = moment.window, recipe.root.exponent == 1
        self._triangular = self._inverse and recipe.root.solver in ("auto", "cholesky")
        self._core = "lower" if self._triangular else "core"
        if moment.of not in ("gradient", "momentum"):
            raise ValueError(f"window keeps gradients, of='gradient' or of='momentum', got of={moment.of!r}")
        if any(len(r.factors) != 1 or r.factors[0].diagonal or r.ties > 1 for r in layout.regions):
            raise ValueError(
                "window keeps gradients of mini-blocks: one dense factor, not tied, such as 'o | i'; "
                f"got partition {str(recipe.partition)!r}"
            )
        if damping.outside or damping.relative_to == "largest" or damping.split:
            raise ValueError(
                f"window needs a damping that is absolute or relative to 'trace' or 'layer', got {damping}"
            )

    def spec(self) -> dict[str, Spec]:
        """The window ``[blocks, W, f]``, its Gram matrix and what solves with it, ``[blocks, W, W]``, and weights ``[W]``."""
        w = self._length
        specs = {"weight": Spec((w,), rows=False), "place": Spec((1,), dtype=torch.int64, rows=False)}
        for index, region in enumerate(self.layout.regions):
            blocks = region.blocks
            specs[f"window_{index}"] = Spec((blocks, w, region.factors[0].size))
            specs[f"gram_{index}"] = Spec((blocks, w, w))
            start = _ENDLESS if self._triangular else 0.0  # until M is solved nothing is corrected: the inverse is zero
            specs[f"{self._core}_{index}"] = Spec((blocks, w, w), "cores", fill=start, identity=self._triangular)
            if not self._inverse:
                specs[f"values_{index}"] = Spec((blocks, w), "cores")
            specs[f"damping_{index}"] = Spec((blocks,), "cores", fill=1.0)
            specs[f"residual_{index}"] = Spec((blocks,), "diagnostics")
            specs[f"kept_{index}"] = Spec((blocks,), "diagnostics", dtype=torch.int64)
        return specs

    def update(self, state: State, operand: Tensor, keep: Weight, gain: Weight) -> None:
        """Put the gradients where the oldest are, and their products with the window into the Gram matrix."""
        place = state["place"][0]  # operands of a batch have taken equally many statistics
        weight = state["weight"].mul_(keep)
        masked = isinstance(gain, Tensor)
        new = torch.as_tensor(gain, device=operand.device) > 0  # nothing is forgotten for a step that is masked
        weight.index_copy_(1, place, torch.where(new, gain, weight.index_select(1, place)).to(weight.dtype))
        for index, block in enumerate(self.layout.block(operand)):
            window, gram = (state[f"{name}_{index}"].flatten(0, 1) for name in ("window", "gram"))
            row = torch.where(new, block, window.index_select(1, place)) if masked else block
            window.index_copy_(1, place, row)
            column = torch.bmm(window, row.mT)  # own W 1
            gram.index_copy_(2, place, column)
            gram.index_copy_(1, place, column.mT)
        state["place"].add_(new).remainder_(self._length)

    def roots(self, state: State, recipe: Recipe, scale: float) -> Iterable[RootJob]:
        """A job for the small matrix of every block."""
        power = float(recipe.root.exponent)
        how = self._how(recipe, state["weight"].dtype)
        for index in range(len(self.layout.regions)):
            m, damping = self._matrix(state, recipe, scale, index)
            state[f"damping_{index}"].flatten().copy_(damping)
            core = state[f"{self._core}_{index}"].flatten(0, 1)
            values = None if power == 1 else state[f"values_{index}"].flatten(0, 1)
            residual, kept = (state[f"{what}_{index}"].flatten() for what in ("residual", "kept"))
            yield RootJob(m, 1.0, damping, how, core, residual, kept, values)

    def correct(self, state: State, operand: Tensor, recipe: Recipe, keep: Weight, gain: Weight, scale: float) -> None:
        """Solve, if no refresh has done so: a root of another window would be of no use."""
        if not recipe.schedule.every_step:
            roots.refresh(self.roots(state, recipe, scale))

    def _how(self, recipe: Recipe, dtype: torch.dtype) -> How:
        dtype = torch.float64 if recipe.root.dtype == "float64" else dtype
        floor = None if recipe.damping.relative_to is None else number(recipe.damping.floor)
        tolerance = recipe.root.tolerance
        if not self._inverse:
            return chosen(How(1.0, recipe.root.solver, dtype, tolerance=tolerance, basis=True))
        form = How(1.0, recipe.root.solver, dtype, floor=floor, tolerance=tolerance, triangular=self._triangular)
        return chosen(form)

    def _matrix(self, state: State, recipe: Recipe, scale: float, index: int) -> tuple[Tensor, Tensor]:
        """M ``[n * blocks, W, W]`` and λ ``[n * blocks]`` of a region."""
        region = self.layout.regions[index]
        gram, root = state[f"gram_{index}"].flatten(0, 1), self._weights(state, region.blocks, scale).sqrt()
        m = (root[:, :, None] * gram).mul_(root[:, None, :])
        rule, value = recipe.damping, number(recipe.damping.value)
        if rule.relative_to is None:
            return m, m.new_full((m.shape[0],), value)
        mean = m.diagonal(dim1=1, dim2=2).sum(1) / max(1, region.factors[0].size)
        if rule.relative_to == "layer":
            mean = mean.unflatten(0, (-1, region.blocks)).mean(1).repeat_interleave(region.blocks)
        return m, (value * mean).clamp_min(number(rule.floor))

    def _weights(self, state: State, blocks: int, scale: float) -> Tensor:
        """``[n * blocks, W]``."""
        return (state["weight"] * scale).repeat_interleave(blocks, 0)

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """Two passes over the window."""
        cores = list(self._cores(state, recipe, exponent, scale))
        directions = []
        for (index, plain, share, core), block in zip(cores, self.layout.block(operand), strict=True):
            root = self._weights(state, self.layout.regions[index].blocks, scale).sqrt()[:, :, None]
            window = state[f"window_{index}"].flatten(0, 1)  # own W f
            seen = root * torch.bmm(window, block.mT)  # own W 1; a third faster than by rows
            along = root * core(share[:, None, None] * seen)
            directions.append(flush_subnormals_(torch.baddbmm(plain[:, None, None] * block, along.mT, window)))
        return self.layout.unblock(directions, operand)

    def _cores(
        self, state: State, recipe: Recipe, exponent: float, scale: float
    ) -> Iterator[tuple[int, Tensor, Tensor, Callable[[Tensor], Tensor]]]:
        """(region, a, c, C) so that the power is aI + c AᵀCA; C multiplies vectors ``[n * blocks, W, 1]``."""
        stored = exponent == recipe.root.exponent
        for index in range(len(self.layout.regions)):
            λ, core = state[f"damping_{index}"].flatten(), state[f"{self._core}_{index}"].flatten(0, 1)
            if stored and self._inverse:
                plain, share = 1 / λ, -1 / λ
            elif exponent == -1:
                plain, share = torch.zeros_like(λ), torch.ones_like(λ)
                core = torch.eye(self._length, dtype=core.dtype, device=core.device).expand_as(core)
            else:
                if stored:
                    vectors, values = core, state[f"values_{index}"].flatten(0, 1)
                else:
                    m, damping = self._matrix(state, recipe, scale, index)
                    solved, _ = solve(m, torch.zeros_like(λ), chosen(How(1.0, "auto", m.dtype, basis=True)))
                    vectors, values, λ = solved[:, :-1], solved[:, -1], damping * float(exponent > 0)
                plain, shares = _shares(values, λ, exponent)
                share, core = torch.ones_like(plain), (vectors * shares[:, None, :]) @ vectors.mT
            product = partial(_solved if stored and self._triangular else torch.matmul, core)
            silent = (λ <= SILENT) & (recipe.damping.relative_to is not None and exponent > 0)
            yield index, torch.where(silent, 1.0, plain), torch.where(silent, 0.0, share), product

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """Σ_k w_k g_k g_kᵀ, put in place."""
        blocks = []
        for index, region in enumerate(self.layout.regions):
            rows = state[f"window_{index}"].flatten(0, 1)
            blocks.append((rows * self._weights(state, region.blocks, scale)[:, :, None]).mT @ rows)
        return put_in_place(self.layout, blocks, next(iter(state.values())))


def _solved(lower: Tensor, vectors: Tensor) -> Tensor:
    return torch.cholesky_solve(vectors, lower.mT, upper=True)  # by columns, as LAPACK wants it


def _shares(values: Tensor, damping: Tensor, exponent: float) -> tuple[Tensor, Tensor]:
    """λ^-p, and ((Λ + λ)^-p - λ^-p) / Λ without cancellation: ``[B]`` and ``[B, W]``."""
    if exponent < 0:  # undamped: Λ^-p / Λ, and nothing outside the window
        positive = values.clamp_min(torch.finfo(values.dtype).tiny)
        return torch.zeros_like(damping), torch.where(values > 0, positive ** (-exponent - 1), 0.0)
    ratio = (values / damping[:, None]).clamp_min(torch.finfo(values.dtype).eps ** 2)
    share = torch.expm1(-exponent * torch.log1p(ratio)) / ratio
    return damping**-exponent, share * damping[:, None] ** (-exponent - 1)
