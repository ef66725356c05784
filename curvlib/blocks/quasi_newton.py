"""The quasi-Newton block: inverses of Kronecker factors that follow secant pairs (K-BFGS)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import number
from ..contraction import add_first, add_independent, independent_places
from ..layout import Layout
from ..moments import Weight
from ..quasi_newton import bfgs_, compact, dot, times, usable
from ..recipe import Recipe
from ..roots import RootJob
from ..signals import Signal
from ..solvers import How, chosen
from .base import Means, Spec, State, Sums
from .standard import Place, StandardBlock, put_in_place

_POWELL = 0.2  # μ1 of the authors: the least sᵀy over yᵀHy


class QuasiNewtonBlock(StandardBlock):
    """The inverse curvature H_g ⊗ H_a of a layer, with a its input (a one appended) and g its output's gradient.

    In formulas (Goldfarb, Ren & Bahamou 2020), with means over the batch and at + the same batch at the new parameters::

        A   <- β A + (1 - β) E[a aᵀ];             at a refresh H_a = (A + √λ I)^-1
        the step, along H_g M H_a
        s   <- β s + (1 - β) (h̄⁺ - h̄)   h = W a, the pre-activation
        y   <- β y + (1 - β) (ḡ⁺ - ḡ)
        H_g <- BFGS(H_g; s, y)          doubly damped
        H_a <- BFGS(H_a; s, y)          s = H_a ā, y = (A + √λ I) s

    The first damping is Powell's: where sᵀy < μ yᵀH_g y, s moves towards H_g y. The second keeps sᵀy above √λ sᵀs: where it
    is not, y moves towards s. A pair without sᵀy > 0, or one that is not finite, is left out. With a ``window`` H_g is that
    of its last W pairs from the identity (L-BFGS, in compact form). Of convolutions ḡ is summed over positions, ā and h̄ are
    means; implementations of KF-QN-CNN average ḡ, too, which scales H_g. A is debiased, where the authors start it with a
    pass over the data.

    State: ``factor_…`` and ``inverse_…`` of the input, ``inverse_…`` of the output, or ``steps_…``, ``changes_…`` and
    ``place``, the averages ``step_…``, ``change_…``, the last batch's ``mean_…``, and ``kept_…``, of both.
    """

    again: ClassVar[bool] = True
    uses: ClassVar[frozenset[str]] = frozenset({"window"})
    additive: ClassVar[bool] = False
    """Whether the second damping is y <- y + √λ s, whatever the pair (KF-QN-CNN)."""

    def __init__(self, layout: Layout, recipe: Recipe) -> None:
        moment, damping = recipe.moment, recipe.damping
        if moment.of != "signals":
            raise ValueError(f"{type(self).__name__} needs Moment(of='signals'), got of={moment.of!r}")
        if moment.labels != "data":
            raise ValueError(
                f"{type(self).__name__} compares gradients of the training loss, labels='data', got {moment.labels!r}"
            )
        if damping.relative_to or damping.outside or recipe.root.exponent != 1:
            raise ValueError(
                f"{type(self).__name__} keeps inverses with an absolute damping; "
                f"got exponent={float(recipe.root.exponent):g}, {damping}"
            )
        super().__init__(layout, recipe)
        places = independent_places(layout)
        regular = len(places) == 1 and layout.regions[0].ties == 1 and len(places[0]) == 2
        if not regular or not all(all(place.carried) for place in places[0]):
            raise ValueError(
                f"{type(self).__name__} needs one factor of outputs and one of inputs, uncut, such as '| o, i k...'; "
                f"got partition {str(recipe.partition)!r}"
            )
        self._output, self._input = sorted(places[0], key=lambda place: place.source or 0)
        self._memory = moment.window

    def spec(self) -> dict[str, Spec]:
        """See the class; ``[rows, f, f]`` for inverses, ``[rows, f]`` for vectors, ``[rows, W, f]`` for pairs."""
        (region,) = self.layout.regions
        rows = region.blocks
        outputs, inputs = (region.factors[place.number].size for place in (self._output, self._input))
        out, given = self._output.name, self._input.name
        specs = {
            f"factor_{given}": Spec((rows, inputs, inputs), of_input=True),
            f"inverse_{given}": Spec((rows, inputs, inputs), "inverses", fill=1.0, identity=True),
            f"residual_{given}": Spec((rows,), "diagnostics"),
            f"kept_{given}": Spec((rows,), "diagnostics", dtype=torch.int64),
            f"mean_{given}": Spec((rows, inputs), of_input=True, order=1),
            f"mean_{out}": Spec((rows, outputs), order=1),
            f"kept_{out}": Spec((rows,), "diagnostics", dtype=torch.int64),
            f"step_{out}": Spec((rows, outputs), "pairs"),
            f"change_{out}": Spec((rows, outputs), "pairs"),
        }
        if self._memory is None:
            specs[f"inverse_{out}"] = Spec((rows, outputs, outputs), "inverses", fill=1.0, identity=True)
        else:
            specs[f"steps_{out}"] = Spec((rows, self._memory, outputs), "pairs")
            specs[f"changes_{out}"] = Spec((rows, self._memory, outputs), "pairs")
            specs["place"] = Spec((rows,), "pairs", dtype=torch.int64)
        return specs

    def update(self, state: State, operand: Tensor, keep: Weight, gain: Weight) -> None:
        """Refused: a gradient has no signals.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} averages the signals of layers; give the recipe a fallback for what can't be heard"
        )

    def collect(self, sums: Sums, signals: Sequence[Signal], recipe: Recipe) -> None:
        """Add the inputs' second moment, if it is wanted, and the signals themselves."""
        tensors = sums.zeroed_()
        for place in (self._output, self._input):
            if f"factor_{place.name}" in tensors:
                add_independent(tensors[f"factor_{place.name}"], place, self.layout, signals[0], reduce=False)
            add_first(tensors[f"mean_{place.name}"], place, self.layout, signals[0])

    def average(self, state: State, means: Sequence[Means], keep: Weight, gain: Weight) -> None:
        """Average the inputs' second moment; the means are of this batch alone."""
        factors = [{name: one for name, one in mean.items() if name.startswith("factor_")} for mean in means]
        super().average(state, factors, keep, gain)
        for name in (f"mean_{self._input.name}", f"mean_{self._output.name}"):
            new = _stacked(means, name)
            state[name].copy_(torch.where(torch.as_tensor(gain, device=new.device) > 0, new, state[name]))

    def roots(self, state: State, recipe: Recipe, scale: float) -> Iterable[RootJob]:
        """The inverse of the inputs' factor."""
        name = self._input.name
        factor, inverse = (state[f"{what}_{name}"].flatten(0, 1) for what in ("factor", "inverse"))
        residual, kept = (state[f"{what}_{name}"].flatten() for what in ("residual", "kept"))
        how = chosen(How(1.0, recipe.root.solver, factor.dtype, tolerance=recipe.root.tolerance))
        yield RootJob(factor, scale, _shift(recipe), how, inverse, residual, kept)

    def follow(
        self,
        state: State,
        before: Tensor,
        after: Tensor,
        means: Sequence[Means],
        recipe: Recipe,
        keep: Weight,
        gain: Weight,
        scale: float,
    ) -> None:
        """Average the pair of this step in, damp it, and update H_g; then the Hessian's action on H_a."""
        out, given = self._output.name, self._input.name
        activations = [
            times(self.layout.block(weights)[0][:, 0], mean.flatten(0, 1))
            for weights, mean in ((before, state[f"mean_{given}"]), (after, _stacked(means, f"mean_{given}")))
        ]
        slopes = [one.flatten(0, 1) for one in (state[f"mean_{out}"], _stacked(means, f"mean_{out}"))]
        step, change = (state[f"{what}_{out}"].flatten(0, 1) for what in ("step", "change"))
        moved, bent = activations[1] - activations[0], slopes[1] - slopes[0]
        wanted = (torch.as_tensor(gain, device=moved.device) > 0).expand(moved.shape[0])
        sound = moved.isfinite().all(-1) & bent.isfinite().all(-1) & wanted
        for average, new in ((step, moved), (change, bent)):
            average.copy_(torch.where(sound[:, None], average * keep + new * gain, average))
        s, y = (torch.where(sound[:, None], one, 0.0) for one in self._damped(state, step, change, _shift(recipe)))
        finite = sound & s.isfinite().all(-1) & y.isfinite().all(-1)
        if self._memory is None:
            finite &= bfgs_(state[f"inverse_{out}"].flatten(0, 1), s, y)
        else:
            self._remember(state, s, y)
        state[f"kept_{out}"].flatten().add_(wanted & ~finite)
        self._act(state, recipe, scale, wanted)

    def _remember(self, state: State, s: Tensor, y: Tensor) -> None:
        """Put a pair in the place of the oldest, if it can be used."""
        assert self._memory is not None
        good, place = usable(s, y), state["place"].flatten()
        where = torch.nn.functional.one_hot(place, self._memory).bool() & good[:, None]
        for what, new in (("steps", s), ("changes", y)):
            pairs = state[f"{what}_{self._output.name}"].flatten(0, 1)
            pairs.copy_(torch.where(where[:, :, None], new[:, None], pairs))
        place.copy_((place + good) % self._memory)

    def _act(self, state: State, recipe: Recipe, scale: float, wanted: Tensor) -> None:
        """The Hessian's action on the mean input: H_a <- BFGS(H_a; H_a ā, (A + √λI) H_a ā)."""
        name = self._input.name
        factor, inverse, mean = (state[f"{what}_{name}"].flatten(0, 1) for what in ("factor", "inverse", "mean"))
        s = torch.where(wanted[:, None], times(inverse, mean), 0.0)
        finite = bfgs_(inverse, s, times(factor, s) * scale + _shift(recipe) * s)
        state[f"kept_{name}"].flatten().add_(~finite)

    def _damped(self, state: State, s: Tensor, y: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """Double damping: sᵀy at least μ yᵀHy, and at least the bound times sᵀs."""
        hy = self._inverse_times(state, y[..., None])[..., 0]
        sy, yhy = dot(s, y), dot(y, hy)
        share = torch.where(sy < _POWELL * yhy, (1 - _POWELL) * yhy / _apart(yhy - sy), 1.0)
        s = share * s + (1 - share) * hy
        if self.additive:
            return s, y + bound * s
        sy, ss = dot(s, y), dot(s, s)
        share = torch.where(sy <= bound * ss, (1 - bound) * ss / _apart(ss - sy), 1.0)
        return s, share * y + (1 - share) * s

    def _inverse_times(self, state: State, columns: Tensor) -> Tensor:
        """H_g times ``[n * rows, o, c]``."""
        out = self._output.name
        if self._memory is None:
            return state[f"inverse_{out}"].flatten(0, 1) @ columns
        place = state["place"].flatten()
        order = (place[:, None] + torch.arange(self._memory, device=place.device)) % self._memory
        s, y = (
            state[f"{what}_{out}"].flatten(0, 1).take_along_dim(order[..., None], 1) for what in ("steps", "changes")
        )
        return columns + compact(s, y, columns)

    def apply(self, state: State, operand: Tensor, recipe: Recipe, exponent: float, scale: float) -> Tensor:
        """H_g G H_a; with exponent -1 the inverses of these.

        Raises:
            ValueError: for other exponents than 1 and -1.
        """
        if exponent not in (1, -1):
            raise ValueError(
                f"exponent must be 1 or -1 for {type(self).__name__}, which keeps inverses, got {exponent}"
            )
        (block,) = self.layout.block(operand)  # own ties f1 f2
        inputs = state[f"inverse_{self._input.name}"].flatten(0, 1)
        if exponent < 0:
            return self.layout.unblock([self._multiplied(0, block, self._curvatures(state))], operand)
        block = self._multiplied(0, block, [(self._input, inputs)])
        moved = block.movedim(2 + self._output.number, 1)  # own o ties i
        product = self._inverse_times(state, moved.flatten(2)).view(moved.shape)
        return self.layout.unblock([product.movedim(1, 2 + self._output.number)], operand)

    def _curvatures(self, state: State) -> list[tuple[Place, Tensor]]:
        """The inverses of H_g and H_a."""
        inputs = state[f"inverse_{self._input.name}"].flatten(0, 1)
        outputs = self._inverse_times(state, _identities(state[f"mean_{self._output.name}"].flatten(0, 1)))
        pairs = ((self._output, outputs), (self._input, inputs))
        return [(place, torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix)[0])) for place, matrix in pairs]

    def dense(self, state: State, recipe: Recipe, scale: float) -> Tensor:
        """(H_g ⊗ H_a)^-1, put in place."""
        matrices = {place.number: (place, matrix) for place, matrix in self._curvatures(state)}
        return put_in_place(self.layout, [self._kron(state, 0, matrices)], next(iter(state.values())))


class AdditiveQuasiNewtonBlock(QuasiNewtonBlock):
    """The quasi-Newton block of convolutions (Ren, Bahamou & Goldfarb 2021): the second damping is y <- y + √λ s."""

    additive = True


def _shift(recipe: Recipe) -> float:
    """√λ, for one of two factors."""
    return number(recipe.damping.value) ** 0.5


def _stacked(means: Sequence[Means], name: str) -> Tensor:
    return torch.stack([value * factor for value, factor in (mean[name] for mean in means)])


def _apart(difference: Tensor) -> Tensor:
    """A difference that may be divided by where it is used."""
    return torch.where(difference > 0, difference, 1.0)


def _identities(vectors: Tensor) -> Tensor:
    return torch.ones_like(vectors).diag_embed()
