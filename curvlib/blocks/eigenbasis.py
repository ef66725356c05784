"""Second moments in the eigenbases of factors: EKFAC, SOAP, KL-Shampoo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import moments
from ..contraction import gradients, slices
from ..layout import FactorShape, Layout
from ..moments import Weight
from ..precision import flush_subnormals_
from ..recipe import Recipe
from ..roots import Moved, RootJob
from ..signals import Index, Signal
from .base import Spec, State, Sums
from .eigen import EigenBlock, damped_power
from .standard import Place, diagonal, gathered, mode_product, put_in_place, scattered


class EigenbasisBlock(EigenBlock):
    """The curvature (⊗ Q_i) diag(s) (⊗ Q_i)ᵀ: eigenvectors of the factors, and the best diagonal in their basis.

    In formulas (George et al. 2018), with F_i = Q_i Λ_i Q_iᵀ the factors of any partition::

        s <- β s + (1 - β) E[((⊗ Q_i)ᵀ g)²]
        (curvature + λI)^-p g = (⊗ Q_i) (s + λ)^-p (⊗ Q_i)ᵀ g

    g are the batch gradients, or those of single examples where the moment listens to layers. State, beside that of the
    eigen block: ``second_{region}``. When a basis changes, s is carried over by the squared overlaps (q_new · q_old)², since
    the diagonal of QᵀQ' D Q'ᵀQ is their matrix times D's: whatever the signs and the order of the vectors, a second moment
    stays with its directions, and keeps its sum.
    """

    looks: ClassVar[int] = 2
    recalls: ClassVar[bool] = True
    turns: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        self._listens = recipe.moment.listens
        self._inside = recipe.rule.momentum is not None and recipe.rule.momentum.inside

    def spec(self) -> dict[str, Spec]:
        """Factors and bases, and a second moment ``[blocks, *factor sizes]`` for every region."""
        regions = enumerate(self.layout.regions)
        seconds = {
            f"second_{index}": Spec((region.blocks, *(factor.size for factor in region.factors)))
            for index, region in regions
        }
        return {**super().spec(), **seconds}

    def _moved(self, state: State, place: Place) -> Moved:
        return partial(self._carry, state, place)

    def _carry(self, state: State, place: Place, first: int, old: Tensor, new: Tensor) -> None:
        """Carry second moments, and momentum that is kept here, over to some new bases of a factor."""
        turn = new.mT @ old
        if self._inside:
            momentum = state["momentum"][0]
            blocks = self.layout.block(momentum)
            for index, block in enumerate(blocks):
                self._carry_(block, index, place, first, turn)
            moved = self.layout.unblock(blocks, momentum)
            if moved.data_ptr() != momentum.data_ptr():  # blocks that are no views
                momentum.copy_(moved)
        overlap = turn.square_()
        for index in range(len(self.layout.regions)):
            second = state[f"second_{index}"].flatten(0, 1)
            self._carry_(second[:, None], index, place, first, overlap.to(second.dtype))

    def _carry_(self, value: Tensor, index: int, place: Place, first: int, matrix: Tensor) -> None:
        """Multiply some rows of a factor's mode, in place; ``value`` is ``[n * blocks, ties, *factor sizes]``."""
        region = self.layout.regions[index]
        if place not in self._places[index]:
            return
        last = first + matrix.shape[0]
        if all(place.carried):
            value[first:last] = mode_product(value[first:last], matrix, place.number)
            return
        apart = gathered(value, region, place).clone()  # rows blocks-that-share ties f1 f2 …
        part = apart[first:last]
        apart[first:last] = mode_product(part.flatten(1, 2), matrix, place.number).view(part.shape)
        value.copy_(scattered(apart, region, place, value))

    def collect(self, sums: Sums, signals: Sequence[Signal], recipe: Recipe) -> None:
        """Add the factors' moments, and the squares of single examples' gradients in the bases of the last step."""
        sums.zeroed_()
        super().collect(sums, signals, recipe)
        state = {name: value[None] for name, value in sums.held.items() if name.startswith("basis_")}
        if self._rotates(signals):
            self._collect_products(sums, signals[0], state)
            return
        for part in slices(signals, 3 * max(1, sum(region.numel for region in self.layout.regions))):
            n, gain = part[0].delta.shape[0], part[0].gain
            for index, block in enumerate(self.layout.block(gradients(part, self.layout))):
                region = self.layout.regions[index]
                examples = block.unflatten(0, (n, region.blocks)).transpose(0, 1).flatten(1, 2)  # own (n tied) f1 f2 …
                rotated = self._multiplied(index, examples, ((p, basis.mT) for p, basis in self._bases(state, index)))
                sums.tensors[f"second_{index}"].add_(rotated.square().sum(1), alpha=gain / region.ties)

    def _rotates(self, signals: Sequence[Signal]) -> bool:
        """Whether gradients are outer products of one vector each, whose squares are those of the rotated vectors."""
        (signal, *others), (region, *regions) = signals, self.layout.regions
        sources = [place.source for place in self._places[0]]
        whole = not regions and region.blocks == region.ties == 1 and sources == [0, 1]
        return whole and not others and signal.positions == 1 and not isinstance(signal.input, Index)

    def _collect_products(self, sums: Sums, signal: Signal, state: State) -> None:
        """Σ_n (Q_1ᵀδ_n)² ⊗ (Q_2ᵀa_n)², two matrix products."""
        signal = signal.written()
        assert isinstance(signal.input, Tensor)
        squares, bases = [], {place.number: basis[0] for place, basis in self._bases(state, 0)}
        for number, value in enumerate((signal.delta, signal.input)):
            rows = value.flatten(1)
            squares.append((rows @ bases[number] if number in bases else rows).square())
        sums.tensors["second_0"][0].addmm_(squares[0].mT, squares[1], alpha=signal.gain)

    def correct(self, state: State, operand: Tensor, recipe: Recipe, keep: Weight, gain: Weight, scale: float) -> None:
        """Average the squares of the rotated gradient in; those of single examples came with the signals."""
        if not self._listens:
            self._square(state, operand, keep, gain)

    def _square(self, state: State, operand: Tensor, keep: Weight, gain: Weight) -> None:
        turned = operand if self._inside else self.turn(state, operand)
        for index, block in enumerate(self.layout.block(turned)):
            second = state[f"second_{index}"].flatten(0, 1).mul_(keep)
            if block.shape[1] == 1 and not isinstance(gain, Tensor):
                second.addcmul_(block[:, 0], block[:, 0], value=gain)
            else:
                second.add_(block.square().mean(1) * gain)
            flush_subnormals_(second)

    def turn(self, state: State, operand: Tensor, back: bool = False) -> Tensor:
        """×_i Q_iᵀ, or ×_i Q_i."""
        turned = [
            self._multiplied(index, block, ((p, basis if back else basis.mT) for p, basis in self._bases(state, index)))
            for index, block in enumerate(self.layout.block(operand))
        ]
        return self.layout.unblock(turned, operand)

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """Rotate into the eigenbases, divide by the second moment, rotate back."""
        divided = self.divide(state, self.turn(state, operand), recipe, exponent, scale)
        return self.turn(state, divided, back=True)

    def divide(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """Divide by the second moment in the eigenbases."""
        divided = []
        for index, block in enumerate(self.layout.block(operand)):
            second = state[f"second_{index}"].flatten(0, 1) * scale
            power = damped_power(second, recipe.damping, exponent, self.layout.regions[index].blocks)
            divided.append(power[:, None] * block)
        return self.layout.unblock(divided, operand)

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """(⊗ Q_i) diag(s) (⊗ Q_i)ᵀ, put in place."""
        blocks = []
        for index in range(len(self.layout.regions)):
            bases = {place.number: (place, basis) for place, basis in self._bases(state, index)}
            vectors, second = self._kron(state, index, bases), state[f"second_{index}"].flatten(0, 1).flatten(1)
            blocks.append(vectors * (scale * second)[:, None, :] @ vectors.mT)
        return put_in_place(self.layout, blocks, next(iter(state.values())))


class RunningEigenbasisBlock(EigenbasisBlock):
    """The eigenbasis block with the squares of batch gradients, also where its factors come from signals (EKFAC-ra)."""

    def spec(self) -> dict[str, Spec]:
        """As the eigenbasis block; what layers say is of the factors alone."""
        specs = super().spec()
        return {
            name: replace(one, role="second moments") if name.startswith("second_") else one
            for name, one in specs.items()
        }

    def collect(self, sums: Sums, signals: Sequence[Signal], recipe: Recipe) -> None:
        """Add the factors' moments."""
        super(EigenBlock, self).collect(sums, signals, recipe)

    def correct(self, state: State, operand: Tensor, recipe: Recipe, keep: Weight, gain: Weight, scale: float) -> None:
        """Average the squares of the rotated batch gradient in."""
        self._square(state, operand, keep, gain)


class LikelihoodBlock(EigenBlock):
    """Kronecker factors of the Gaussian that is closest to the gradients in Kullback-Leibler divergence (Lin et al. 2025).

    Each factor averages the second moment of gradients that all others have whitened::

        F_i <- β F_i + (1 - β) G_(i) (⊗_{j≠i} (F_j + λI)^-1) G_(i)ᵀ / Π_{j≠i} d_j
        curvature = ⊗ F_i,     direction = ×_i Q_i (Λ_i + λ)^-p Q_iᵀ

    At first all factors are multiples of the identity whose product is the mean square of the first gradient. Between two
    refreshes eigenvalues are tracked in the bases as they stand, Λ_i = diag(Q_iᵀ F_i Q_i).

    State, beside that of the eigen block: ``whiten_…``, (Λ_i + λ)^-½.
    """

    damps: ClassVar[Literal["whole", "factors"]] = "factors"

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        super().__init__(layout, recipe)
        if recipe.moment.listens or recipe.moment.composition != "independent":
            raise ValueError(
                "LikelihoodBlock fills independent factors from batch gradients; "
                f"got of={recipe.moment.of!r}, composition={recipe.moment.composition!r}"
            )
        if recipe.damping.outside:
            raise ValueError("LikelihoodBlock adds its damping to eigenvalues; set outside=False")

    def _root_spec(self, name: str, rows: int, factor: FactorShape) -> dict[str, Spec]:
        return {
            **super()._root_spec(name, rows, factor),
            f"whiten_{name}": Spec((rows, factor.size), "eigenvalues"),
        }

    def _moved(self, state: State, place: Place) -> Moved:
        return partial(self._carry, state, place)

    @staticmethod
    def _carry(state: State, place: Place, first: int, old: Tensor, new: Tensor) -> None:
        """Carry eigenvalues over to new bases."""
        whiten = state[f"whiten_{place.name}"].flatten(0, 1)[first : first + old.shape[0]]
        overlap = (new.mT @ old).square().to(whiten.dtype)
        moved = (overlap @ whiten[..., None] ** -2)[..., 0] ** -0.5
        whiten.copy_(torch.where(whiten > 0, moved, whiten))

    def update(self, state: State, operand: Tensor, keep: Weight, gain: Weight) -> None:
        """Accumulate every factor's second moment of gradients that the others have whitened."""
        blocks = self.layout.block(operand)
        for index, block in enumerate(blocks):
            self._start(state, index, block)
        whitened = [list(self._whitened(state, index, block)) for index, block in enumerate(blocks)]
        for region, place in self._stored():
            factor = state[f"factor_{place.name}"].flatten(0, 1)
            others = region.shape[2:][: place.number] + region.shape[3:][place.number :]
            entries = 1
            for size in others:
                entries *= size
            moments.accumulate(factor, whitened[place.region][place.number], place.number, keep, gain / entries)

    def _start(self, state: State, index: int, block: Tensor) -> None:
        """Give factors that have seen nothing but zeros one share each of the gradient's mean square."""
        places = self._places[index]
        mean = block.square().flatten(1).mean(1, keepdim=True)
        share = torch.where(mean > 0, mean, 1.0) ** (-0.5 / len(places))
        for place in places:
            factor, whiten = (state[f"{what}_{place.name}"].flatten(0, 1) for what in ("factor", "whiten"))
            trace = factor if factor.ndim == 2 else factor.diagonal(dim1=1, dim2=2)
            started = (trace.sum(1, keepdim=True) > 0) & (whiten > 0)
            whiten.copy_(torch.where(started, whiten, share))

    def _whitened(self, state: State, index: int, block: Tensor) -> Iterator[Tensor]:
        """For each factor the block, whitened by all others."""
        places = self._places[index]
        for place in places:
            one = block
            for other in places:
                if other is not place:
                    one = self._whiten(state, index, one, other, 1.0)
            sound = one.square().flatten(1).sum(1).isfinite()  # what overflows says nothing
            yield torch.where(sound.view(-1, *[1] * (one.ndim - 1)), one, 0.0)

    def _whiten(self, state: State, index: int, block: Tensor, place: Place, power: float) -> Tensor:
        """Multiply Q (Λ + λ)^(-power/2) Qᵀ into a factor's mode."""
        whiten = state[f"whiten_{place.name}"].flatten(0, 1)
        basis = state.get(f"basis_{place.name}")
        if basis is not None:
            block = self._multiplied(index, block, [(place, basis.flatten(0, 1).mT)])
        block = self._multiplied(index, block, [(place, whiten if power == 1.0 else whiten**power)])
        return block if basis is None else self._multiplied(index, block, [(place, basis.flatten(0, 1))])

    def roots(self, state: State, recipe: Recipe, scale: float) -> Iterable[RootJob]:
        """A job for the basis of every dense factor; eigenvalues are carried over to it."""
        self._track(state, recipe, scale)
        yield from super().roots(state, recipe, scale)

    def correct(self, state: State, operand: Tensor, recipe: Recipe, keep: Weight, gain: Weight, scale: float) -> None:
        """Track the eigenvalues."""
        self._track(state, recipe, scale)

    def _track(self, state: State, recipe: Recipe, scale: float) -> None:
        """(diag(Qᵀ F Q) + λ)^-½ in the bases as they are."""
        recipe = replace(recipe, root=replace(recipe.root, solver="auto"))  # of diagonals, whatever solves for bases
        for index in range(len(self.layout.regions)):
            for place, factor, factor_scale, damping, how in self._prepared(state, index, recipe, scale, 0.5):
                basis, value = state.get(f"basis_{place.name}"), factor
                if basis is not None:
                    vectors = basis.flatten(0, 1)
                    value = (vectors * (factor @ vectors)).sum(1).clamp_min(0)
                state[f"whiten_{place.name}"].flatten(0, 1).copy_(diagonal(value, factor_scale, damping, how))

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """Mode products with Q_i (Λ_i + λ)^-p Q_iᵀ; below zero with the undamped factors."""
        if exponent < 0:
            return super().apply(state, operand, recipe, exponent, scale)
        directions = []
        for index, block in enumerate(self.layout.block(operand)):
            for place in self._places[index]:
                block = self._whiten(state, index, block, place, 2 * exponent)
            directions.append(block)
        return self.layout.unblock(directions, operand)
