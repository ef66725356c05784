"""Roots that are tracked instead of solved: SINGD's inverse factors, and PSGD's whitening factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from .. import moments
from ..checks import number
from ..layout import FactorShape, Layout, Region
from ..moments import Weight
from ..recipe import Recipe, Tracking
from ..roots import RootJob
from .base import Spec, State
from .standard import Place, StandardBlock, put_in_place


class _Tracked(StandardBlock):
    """What both have in common: a matrix X (or a diagonal) for every factor, ``tracked_…``, and no roots to solve."""

    uses: ClassVar[frozenset[str]] = frozenset({"tracking"})
    exponent: ClassVar[float]
    """The power of the curvature that is applied, to which X Xᵀ belongs."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        name, damping = type(self).__name__, recipe.damping
        if recipe.root.tracking is None:
            raise ValueError(f"{name} needs Root(tracking=Tracking(...)), got {recipe.root}")
        if recipe.root.exponent != self.exponent or damping.relative_to or damping.split or damping.outside:
            raise ValueError(
                f"{name} tracks the power -{self.exponent:g} with an absolute damping; "
                f"got exponent={float(recipe.root.exponent):g}, {damping}"
            )

    def spec(self) -> dict[str, Spec]:
        """Without the residuals of solves; updates that were not finite are counted as roots that were kept."""
        return {name: one for name, one in super().spec().items() if not name.startswith("residual_")}

    def _root_spec(self, name: str, rows: int, factor: FactorShape) -> dict[str, Spec]:
        return {f"tracked_{name}": Spec((rows, *factor.shape), "tracked", fill=1.0, identity=not factor.diagonal)}

    def roots(self, state: State, recipe: Recipe, scale: float) -> Iterable[RootJob]:
        """Nothing is solved."""
        return ()

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """Mode products with X and Xᵀ; other exponents than the tracked one by eigendecomposition of X Xᵀ."""
        blocks = []
        for index, block in enumerate(self.layout.block(operand)):
            for place in self._places[index]:
                x = state[f"tracked_{place.name}"].flatten(0, 1)
                if exponent != self.exponent:
                    block = self._multiplied(index, block, [(place, _power(x, exponent / self.exponent))])
                elif x.ndim == 2:
                    block = self._multiplied(index, block, [(place, x.square())])
                else:
                    block = self._multiplied(index, block, [(place, x.mT), (place, x)])
            blocks.append(block)
        return self.layout.unblock(blocks, operand)

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """What X Xᵀ is the power of, put in place."""
        products = []
        for index in range(len(self.layout.regions)):
            tracked = {place: state[f"tracked_{place.name}"].flatten(0, 1) for place in self._places[index]}
            matrices = {place.number: (place, _power(x, -1 / self.exponent)) for place, x in tracked.items()}
            products.append(self._kron(state, index, matrices))
        return put_in_place(self.layout, products, next(iter(state.values())))


def _power(x: Tensor, power: float) -> Tensor:
    """(X Xᵀ)^power, ``[B, f, f]``, or of a diagonal ``[B, f]``."""
    if x.ndim == 2:
        return x.square() ** power
    values, vectors = torch.linalg.eigh(x @ x.mT)
    return (vectors * values.clamp_min(torch.finfo(x.dtype).tiny)[:, None, :] ** power) @ vectors.mT


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix if matrix.ndim == 2 else matrix.diagonal(dim1=-2, dim2=-1)


def _spread(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


def _finite(matrices: Tensor) -> Tensor:
    """Which are finite, ``[B]``."""
    return matrices.flatten(1).isfinite().all(1)


def _put_(state: State, place: Place, new: Tensor, sound: Tensor, wanted: Tensor) -> None:
    """Put in what is sound, block by block; what is wanted and not sound leaves the last good one, and is counted."""
    old = state[f"tracked_{place.name}"].flatten(0, 1)
    old.copy_(torch.where(_spread(sound, old), new, old))
    if (kept := state.get(f"kept_{place.name}")) is not None:
        kept.flatten().add_(wanted & ~sound)


class InverseFreeBlock(_Tracked):
    """Inverses of KFAC's factors as K Kᵀ, by descent in the coordinates of K (Lin et al. 2024, SINGD).

    In formulas, for the factor U of inputs with K and the factor G of output gradients with C, traces over dimensions::

        H_K = Kᵀ U K,   H_C = Cᵀ G C
        m_K <- α m_K + ½ (tr(H_C) H_K + λ tr(CᵀC) KᵀK - I)          likewise m_C
        K   <- K - β K m_K

    and (⊗ F)^-1 is applied as C Cᵀ g K Kᵀ. Without ``coupled`` both traces are one (IKFAC: K Kᵀ tends to (U + λI)^-1). A
    factor that is a diagonal, ``[i]``, has a diagonal K; one that is cut is block-diagonal, with traces over all its blocks;
    with ``triangular`` K is lower triangular, and entries below the diagonal count twice. ``normalize`` divides β by the
    largest absolute entry of m, where that is above one, and adds (1 - α) of the new instead.

    State: ``factor_…``, ``tracked_…`` (K), ``turn_…`` (m).
    """

    exponent = 1.0

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        if recipe.moment.of != "signals":
            raise ValueError(f"InverseFreeBlock needs Moment(of='signals'), got of={recipe.moment.of!r}")
        super().__init__(layout, recipe)
        if any(len(places) != 2 for places in self._places):
            raise ValueError(
                "InverseFreeBlock needs one factor of outputs and one of inputs, such as '| o, i k...'; "
                f"got partition {str(recipe.partition)!r}"
            )

    def _root_spec(self, name: str, rows: int, factor: FactorShape) -> dict[str, Spec]:
        return {
            **super()._root_spec(name, rows, factor),
            f"turn_{name}": Spec((rows, *factor.shape), "tracked"),
        }

    def correct(self, state: State, operand: Tensor, recipe: Recipe, keep: Weight, gain: Weight, scale: float) -> None:
        """One step of K and C."""
        tracking = _tracking(recipe)
        alpha, rate, damping = number(tracking.momentum), number(tracking.rate), number(recipe.damping.value)
        stored = [(region, place, *self._inner(state, place, scale)) for region, place in self._stored()]
        traces = {
            source: [self._mean_trace(stored, source, which) for which in (0, 1)] if tracking.coupled else [1.0, 1.0]
            for source in (0, 1)
        }
        share = 0.5 * (1 - alpha) if tracking.normalize else 0.5
        for region, place, h, square in stored:
            x, m = (state[f"{what}_{place.name}"].flatten(0, 1) for what in ("tracked", "turn"))
            of_h, of_square = (self._for(region, place, one, h) for one in traces[1 - (place.source or 0)])
            new = h * of_h + square * (damping * of_square)
            _diagonal(new).sub_(1.0)
            if tracking.triangular and new.ndim == 3:
                new = new.tril() + new.tril(-1)
            new = m * alpha + new * share
            beta = new.new_full((new.shape[0],), rate)
            if tracking.normalize:
                beta = rate / new.abs().flatten(1).amax(1).clamp_min(1.0)
            wanted = (torch.as_tensor(gain, device=beta.device) > 0).expand_as(beta)
            turned = x - _spread(beta, x) * (x * new if x.ndim == 2 else x @ new)
            sound = _finite(turned) & wanted
            m.copy_(torch.where(_spread(sound, m), new, m))
            _put_(state, place, turned, sound, wanted)

    def _inner(self, state: State, place: Place, scale: float) -> tuple[Tensor, Tensor]:
        """(Kᵀ F K, KᵀK)."""
        x, factor = (state[f"{what}_{place.name}"].flatten(0, 1) for what in ("tracked", "factor"))
        if x.ndim == 2:
            return x.square() * factor * scale, x.square()
        return x.mT @ (factor @ x) * scale, x.mT @ x

    def _mean_trace(self, stored: list[tuple[Region, Place, Tensor, Tensor]], source: int, which: int) -> Tensor:
        """The mean diagonal entry of all that has a source: ``[n * rows]`` where rows belong together, else ``[n]``."""
        mine = [(region, place, one[which]) for region, place, *one in stored if place.source == source]
        if all(all(place.carried) for _, place, _, _ in stored):
            return _diagonal(mine[0][2]).mean(-1)
        sums = [_diagonal(one).unflatten(0, (-1, place.rows(region))) for region, place, one in mine]
        return torch.cat([one.flatten(1) for one in sums], 1).mean(1)

    @staticmethod
    def _for(region: Region, place: Place, value: Tensor | float, like: Tensor) -> Tensor | float:
        if not isinstance(value, Tensor):
            return value
        return _spread(value.repeat_interleave(like.shape[0] // value.shape[0]), like)


class WhiteningBlock(_Tracked):
    """Factors Q_i with ⊗ Q_i² as the inverse root of the gradients' covariance, E[g gᵀ]^-½ (Li 2015 to 2025, PSGD-Kron).

    With the whitened gradient P g, P = ⊗ Q_i², unfolded along axis i, of d entries of which d_i along the axis::

        T = (P g)_(i) (P g)_(i)ᵀ + δ² Q⁴ Π_{j≠i} tr(Q_j⁴),   t = d / d_i,   L <- max(β L + (1 - β) ℓ, ℓ),   ℓ = ‖T‖₂ + t
        Q <- Q - η/(2L) (T Q - t Q),   Q <- Q - η/(2L) (Q T - t Q),   Q <- (Q + Qᵀ) / 2

    the authors' geometry "QUAD", which keeps Q symmetric and solves for nothing; their other geometries have the same fixed
    point, E[(P g)_(i) (P g)_(i)ᵀ] = t I. ‖T‖₂ is estimated by two power iterations from T's largest row. The first gradient
    sets the scale, Q = mean(g⁴)^(-1/(8k)) I for k factors (the authors have one scale for all parameters); Q's are balanced
    to one largest entry. The authors add white noise of deviation δ, the damping, to g; here T has what this adds to it on
    average, so that P stays below about 1/δ where there are no gradients. A gradient that is all zero changes nothing.

    State: ``tracked_…`` (Q), ``bound_…`` (L), and ``kept_…``, how often a Q that is not finite was not taken.
    """

    exponent = 0.5

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        if recipe.moment.listens or recipe.moment.composition != "independent":
            raise ValueError(
                "WhiteningBlock fits independent factors to batch gradients; "
                f"got of={recipe.moment.of!r}, composition={recipe.moment.composition!r}"
            )
        super().__init__(layout, recipe)

    def spec(self) -> dict[str, Spec]:
        """Factors and bounds; no statistics."""
        return {name: one for name, one in super().spec().items() if not name.startswith("factor_")}

    def _root_spec(self, name: str, rows: int, factor: FactorShape) -> dict[str, Spec]:
        return {**super()._root_spec(name, rows, factor), f"bound_{name}": Spec((rows,), "tracked")}

    def update(self, state: State, operand: Tensor, keep: Weight, gain: Weight) -> None:
        """Nothing is averaged; :meth:`correct` does it all."""

    def correct(self, state: State, operand: Tensor, recipe: Recipe, keep: Weight, gain: Weight, scale: float) -> None:
        """One step of every Q; a gradient of zeros says nothing."""
        tracking = _tracking(recipe)
        rate, beta, damping = number(tracking.rate), number(tracking.momentum), number(recipe.damping.value)
        for index, block in enumerate(self.layout.block(operand)):
            region, places = self.layout.regions[index], self._places[index]
            live = block.flatten(1).any(1) & (torch.as_tensor(gain, device=block.device) > 0)
            stored = [state[f"tracked_{place.name}"].flatten(0, 1) for place in places]
            bounds = [state[f"bound_{place.name}"].flatten() for place in places]
            qs = self._started(block, stored, bounds, live)
            squares = [q.square() if q.ndim == 2 else q @ q for q in qs]
            whitened = self._multiplied(index, block, zip(places, squares, strict=True))
            entries = whitened[0, 0].numel()
            noise = [damping**2 * one for one in self._noises(squares)]
            turned = []
            for place, q, square, bound, share in zip(places, qs, squares, bounds, noise, strict=True):
                t = entries / region.factors[place.number].size
                gram = share * square.square() if q.ndim == 2 else share * (square @ square)
                moments.accumulate(gram, whitened, place.number, 1.0, 1.0)
                size = _largest(gram) + t
                higher = torch.maximum(beta * bound + (1 - beta) * size, size)
                half = _spread(rate / 2 / higher, q)
                if q.ndim == 2:
                    new = q * (1 - half * (gram - t)).square()
                else:
                    new = q - half * (gram @ q - t * q)
                    new = new - half * (new @ gram - new * t)
                    new = (new + new.mT) / 2
                sound = _finite(new) & live
                bound.copy_(torch.where(sound, higher, bound))
                turned.append((torch.where(_spread(sound, q), new, q), sound))
            for place, new, (_, sound) in zip(places, self._balanced([q for q, _ in turned]), turned, strict=True):
                _put_(state, place, new, sound & _finite(new), live)

    @staticmethod
    def _noises(squares: list[Tensor]) -> list[Tensor]:
        """For each factor Π_{j≠i} tr(Q_j⁴), the other axes' share of what unit noise adds to T."""
        traces = [one.square().flatten(1).sum(1) for one in squares]
        others = [traces[:place] + traces[place + 1 :] for place in range(len(squares))]
        return [
            _spread(torch.stack([torch.ones_like(trace), *rest]).prod(0), one)
            for trace, rest, one in zip(traces, others, squares, strict=True)
        ]

    @staticmethod
    def _started(block: Tensor, qs: list[Tensor], bounds: list[Tensor], live: Tensor) -> list[Tensor]:
        """With a scale for blocks that see their first gradient."""
        mean = block.flatten(1).pow(4).mean(1)
        scale = torch.where((bounds[0] == 0) & live & (mean > 0), mean, 1.0) ** (-1 / (8 * len(qs)))
        return [q * _spread(scale, q) for q in qs]

    @staticmethod
    def _balanced(qs: list[Tensor]) -> list[Tensor]:
        """With one largest entry in all factors of a block; their product stays."""
        if len(qs) == 1:
            return qs
        norms = [q.flatten(1).abs().amax(1).clamp_min(torch.finfo(q.dtype).tiny) for q in qs]
        common = torch.stack(norms).log().mean(0).exp()
        return [q * _spread(common / norm, q) for q, norm in zip(qs, norms, strict=True)]


def _tracking(recipe: Recipe) -> Tracking:
    assert recipe.root.tracking is not None
    return recipe.root.tracking


def _largest(gram: Tensor) -> Tensor:
    """A lower bound of the largest eigenvalue, ``[B]``, of ``[B, f, f]``; exact for a diagonal ``[B, f]``."""
    if gram.ndim == 2:
        return gram.amax(-1)
    tiny = torch.finfo(gram.dtype).tiny
    row = gram.square().sum(-1).argmax(-1)
    vector = gram.take_along_dim(row[:, None, None], 1)  # B 1 f
    norm = vector.norm(dim=-1, keepdim=True)
    for _ in range(2):
        vector = torch.bmm(vector / norm.clamp_min(tiny), gram)
        norm = vector.norm(dim=-1, keepdim=True)
    return norm.flatten()
