"""Recipes: one choice of partition, moment, root and rule, on a schedule.

Everything here is a frozen dataclass that checks itself. A number may also be a callable of the step (0, 1, 2, …).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import torch

from . import solvers
from .checks import Number, check_choice, check_count, check_number, check_period, number, period, resolve
from .partition import Partition
from .rule import Clip, Grafting, Momentum, Rule

__all__ = [
    "Clip",
    "Damping",
    "Grafting",
    "Labels",
    "Moment",
    "Momentum",
    "Recipe",
    "Root",
    "Rule",
    "Schedule",
    "Tracking",
]

Labels = Literal["data", "sampled", "exact"]


@dataclass(frozen=True)
class Moment:
    """Which second moment fills the blocks, how it is averaged over steps, and how factors compose.

    Args:
        of: ``"gradient"``: of the batch gradient (the mean over examples of per-example loss gradients);
            ``"momentum"``: of what the rule's momentum makes of it; ``"samples"``: the mean over examples of the second
            moments of their own gradients; ``"signals"``: every factor is the second moment of the one signal of its
            layer that carries its axes, the input or the output gradient (KFAC); ``"hessian"``: of z ⊙ Hz, with H the
            Hessian of the batch and z random signs, whose mean is H's diagonal (Hutchinson), for diagonal partitions; it
            needs ``optimizer.observe(loss=loss)``. ``"samples"`` and ``"signals"`` listen to the layers of an attached
            model; parameters whose layers can't be heard have the gradient's moment instead, said once.
        average: ``"ema"``: β F + (1-β) S; ``"sum"``: F + S; ``"mean"``: the running mean over all updates.
        beta: β of the EMA.
        debias: divide an EMA by 1 - β^n after n updates.
        initial: value of the diagonal before the first update.
        composition: what the curvature of a block is, from its factors F_1 … F_k (k counts sizes above one):
            ``"independent"``: ⊗ F_i; ``"trace"``: ⊗ F_i / tr^(k-1); ``"power-mean"``: ⊗ F_i^(1/k).
        centered: subtract the outer product of the gradient's own EMA (diagonal partitions only).
        maximum: keep the entrywise maximum over steps (AMSGrad; diagonal partitions only).
        dtype: ``"float32"``: float32 or the parameter's dtype if that is wider; ``"parameter"``: the parameter's.
        labels: whose gradients are taken: ``"data"``: the training backward's own; ``"sampled"``: of labels drawn from the
            model (for ``"gradient"``: its batch gradient, TNT); ``"exact"``: the mean over all such labels in closed form
            (the generalised Gauss-Newton matrix). The last two need ``optimizer.observe`` in the loop.
        sharing: for ``"signals"``, of a layer's shared positions: ``"expand"``: each counts by itself; ``"reduce"``: inputs
            are averaged and output gradients summed first (Eschenhagen et al. 2023).
        subsample: use every s-th example only (for ``"expand"``, position), scaled up to all.
        order: 2: squares and products; 1: for ``"hessian"``, the estimate of its diagonal itself, of which the root takes the
            positive part.
        pooling: for ``"hessian"``, of convolutions: the mean of the estimate over each kernel (``"mean"``), or of its
            absolute values (``"absolute"``); ``None`` for neither.
        window: keep the last W batch gradients instead of the matrices of their second moment, and forget what is older
            (see :class:`~curvlib.blocks.WindowBlock`); or the last W pairs of a quasi-Newton block; or the W leading
            directions of a :class:`~curvlib.blocks.LowRankBlock`.
    """

    of: Literal["gradient", "momentum", "samples", "signals", "hessian"] = "gradient"
    average: Literal["ema", "sum", "mean"] = "ema"
    beta: Number = 0.9
    debias: bool = False
    initial: Number = 0.0
    composition: Literal["independent", "trace", "power-mean"] = "independent"
    centered: bool = False
    maximum: bool = False
    dtype: Literal["float32", "parameter"] = "float32"
    labels: Labels = "data"
    sharing: Literal["expand", "reduce"] = "expand"
    subsample: int = 1
    order: Literal[1, 2] = 2
    pooling: Literal["mean", "absolute"] | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        check_choice("of", self.of, ("gradient", "momentum", "samples", "signals", "hessian"))
        check_choice("order", self.order, (1, 2))
        check_choice("pooling", self.pooling, (None, "mean", "absolute"))
        check_choice("labels", self.labels, ("data", "sampled", "exact"))
        check_choice("sharing", self.sharing, ("expand", "reduce"))
        check_period("subsample", self.subsample)
        check_choice("average", self.average, ("ema", "sum", "mean"))
        check_choice("composition", self.composition, ("independent", "trace", "power-mean"))
        check_choice("dtype", self.dtype, ("float32", "parameter"))
        check_number("beta", self.beta, high=1.0)
        check_number("initial", self.initial)
        if not self.listens and self.labels != "data" and (self.of, self.labels) != ("gradient", "sampled"):
            raise ValueError(f"labels={self.labels!r} needs of='samples' or of='signals', got of={self.of!r}")
        if self.window is not None:
            check_count("window", self.window)
            if self.of in ("samples", "hessian") or self.initial != 0:
                got = f"got of={self.of!r}, initial={self.initial!r}"
                raise ValueError(f"window keeps batch gradients, or pairs of signals, with initial=0; {got}")
        if self.of != "hessian" and (self.order != 2 or self.pooling is not None):
            raise ValueError(f"order=1 and pooling need of='hessian', got of={self.of!r}")
        if self.extra and self.centered:
            raise ValueError("centered=True needs labels='data' and the gradient")
        if self.of == "signals" and self.composition != "independent":
            raise ValueError(f"of='signals' fills independent factors; got composition={self.composition!r}")
        if self.listens and self.centered:
            raise ValueError(f"centered=True needs of='gradient' or of='momentum', got of={self.of!r}")

    @property
    def listens(self) -> bool:
        """Whether it needs the signals of a layer."""
        return self.of in ("samples", "signals")

    @property
    def extra(self) -> Literal["", "drawn", "probed"]:
        """The pass that takes the training gradient's place, see :mod:`curvlib.passes`; empty for none."""
        if self.of == "hessian":
            return "probed"
        return "drawn" if self.of == "gradient" and self.labels == "sampled" else ""

    def weights(self, updates: int) -> tuple[float, float]:
        """(keep, gain) of update number ``updates`` (from 0): F <- keep F + gain S."""
        if self.average == "ema":
            return number(self.beta), 1.0 - number(self.beta)
        if self.average == "sum":
            return 1.0, 1.0
        return updates / (updates + 1), 1 / (updates + 1)

    def scale(self, updates: int, warm: bool = False) -> float:
        """What the stored average is multiplied by, after ``updates`` updates, to undo its bias towards the start.

        An average that was warm-started has none.
        """
        if warm or not (self.debias and self.average == "ema" and updates):
            return 1.0
        return 1.0 / (1.0 - number(self.beta) ** updates)

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the statistics of a parameter of this dtype are kept."""
        return dtype if self.dtype == "parameter" else torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Damping:
    """What is added to a factor before its root is taken, λ.

    Args:
        value: the strength δ.
        relative_to: ``None``: λ = δ; ``"trace"``: δ times the mean eigenvalue of the factor; ``"layer"``: δ times the mean
            of that over all blocks of the parameter, so that blocks without signal are not blown up; ``"largest"``: δ times
            the largest eigenvalue of the factor.
        floor: least λ of a relative damping. Without it a factor that has no signal yet is not preconditioned.
        split: for k factors whose product should be damped by δ: ``None``: every factor gets λ; ``"sqrt"``: δ^(1/k);
            ``"pi"``: δ^(1/k) times the factor's mean eigenvalue over the geometric mean of all (Martens & Grosse 2015,
            §6.3, where k = 2); ``"trace"``: likewise of traces, which is δ^(1/k) for factors scaled to one trace (TKFAC).
        outside: add δ to the root's denominator instead, (F^p + δ)^-1, as Adam's eps.
    """

    value: Number = 1e-3
    relative_to: Literal["trace", "layer", "largest"] | None = None
    floor: Number = 0.0
    split: Literal["sqrt", "pi", "trace"] | None = None
    outside: bool = False

    def __post_init__(self) -> None:
        check_number("damping", self.value)
        check_number("damping floor", self.floor)
        check_choice("relative_to", self.relative_to, (None, "trace", "layer", "largest"))
        check_choice("split", self.split, (None, "sqrt", "pi", "trace"))
        if self.split and (self.relative_to or self.outside):
            raise ValueError(
                f"split={self.split!r} shares out an absolute damping; set relative_to=None, outside=False"
            )
        if self.relative_to and self.outside:
            raise ValueError(f"outside=True adds an absolute number; got relative_to={self.relative_to!r}")


@dataclass(frozen=True)
class Tracking:
    """How a root is tracked from statistic to statistic instead of being solved, see :mod:`curvlib.blocks.tracked`.

    Args:
        rate: step size of the root.
        momentum: of its steps (SINGD), or of the bound that they are divided by (PSGD).
        coupled: for SINGD: factors know of each other's traces; not: IKFAC.
        normalize: for SINGD: bound the steps by their largest entry.
        triangular: for SINGD: lower triangular factors.
    """

    rate: Number = 0.1
    momentum: Number = 0.9
    coupled: bool = True
    normalize: bool = False
    triangular: bool = False

    def __post_init__(self) -> None:
        check_number("tracking rate", self.rate, strict=True)
        check_number("tracking momentum", self.momentum, high=1.0)


@dataclass(frozen=True)
class Root:
    """Which power of the damped curvature is applied, direction = curvature^(-exponent) gradient, and how it is solved.

    Args:
        exponent: p; 1 is the natural gradient, 1/2 Adam's and Shampoo's, 0 no preconditioning. Any number from 0.
        damping: a :class:`Damping`, or a number for an absolute one.
        solver: ``"cholesky"`` (exponent 1 of a factor), ``"eigh"``, ``"qr"`` (of bases only), a registered one, or
            ``"auto"``: Cholesky where it can, else eigh.
        dtype: ``"float64"`` solves in double precision whatever the statistics' dtype; ``None`` in theirs.
        tolerance: a root whose relative residual exceeds it is not used; the previous one stays.
        tracking: of structures that track their roots, such as :class:`~curvlib.blocks.InverseFreeBlock`.
    """

    exponent: float | Fraction = 1.0
    damping: Damping | Number = field(default_factory=Damping)
    solver: str = "auto"
    dtype: Literal["float64"] | None = None
    tolerance: float = 0.1
    tracking: Tracking | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.damping, Damping):
            object.__setattr__(self, "damping", Damping(self.damping))
        check_number("exponent", self.exponent)
        check_number("tolerance", self.tolerance, strict=True)
        check_choice("solver", self.solver, ("auto", *solvers.SOLVERS))
        check_choice("dtype", self.dtype, (None, "float64"))


@dataclass(frozen=True)
class Schedule:
    """When statistics are taken and roots refreshed, in steps of the parameter, from 0.

    Args:
        statistics: T1, the period of statistics.
        refresh: T2, the period of roots.
        dense_start: also refresh at every statistic of the first T2 steps, as the MBF and TNT authors do.
        stagger: spread the refreshes of a period over its steps, about 1/T2 of the work each, instead of all at once.
    """

    statistics: int | Callable[[int], int] = 1
    refresh: int | Callable[[int], int] = 1
    dense_start: bool = False
    stagger: bool = False

    def __post_init__(self) -> None:
        check_period("statistics period", self.statistics)
        check_period("refresh period", self.refresh)

    @property
    def every_step(self) -> bool:
        """Whether statistics and roots are always fresh."""
        return self.statistics == 1 and self.refresh == 1

    def takes_statistics(self, step: int) -> bool:
        """Whether statistics are due."""
        return step % period(self.statistics) == 0

    def refreshes(self, step: int) -> bool:
        """Whether every root is due."""
        if self.dense_start and step <= period(self.refresh) and self.takes_statistics(step):
            return True
        return step % period(self.refresh) == 0 and not (self.stagger and step)


@dataclass(frozen=True)
class Recipe:
    """One choice of partition, moment, root and rule: an optimizer for the parameters that are routed to it.

    Args:
        partition: a text of the partition language, or a :class:`Partition`.
        moment: which second moment fills the blocks.
        root: which power of it is applied.
        rule: momentum, grafting, clipping, decay.
        schedule: when statistics and roots are due.
        axes: names for the parameter's dimensions instead of its layer's, which may split them: ``"(head d) i"``.
        sizes: sizes of split axes, e.g. ``{"head": 12}``.
        join_bias: treat a layer's bias as one more input column of its weight, where the layer is known.
        block: a structure that is more than a partition, a subclass of :class:`curvlib.blocks.Block`; ``None`` is the
            standard block.
        fallback: for a recipe that listens: what a parameter gets whose layer can't be heard, instead of this recipe on
            the moments of the batch gradient.

    Raises:
        ValueError, PartitionError: naming the parameter, the value and what is allowed.
    """

    partition: Partition | str
    moment: Moment = field(default_factory=Moment)
    root: Root = field(default_factory=Root)
    rule: Rule = field(default_factory=Rule)
    schedule: Schedule = field(default_factory=Schedule)
    axes: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    join_bias: bool = False
    block: type | None = None
    fallback: Recipe | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.partition, Partition):
            object.__setattr__(self, "partition", Partition(self.partition))
        for name, kind in {"moment": Moment, "root": Root, "rule": Rule, "schedule": Schedule}.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        for option in ("centered", "maximum"):
            if getattr(self.moment, option) and not self.cut.diagonal:
                raise ValueError(
                    f"{option}=True needs a diagonal partition such as '... |', got {str(self.partition)!r}"
                )
        if self.moment.of == "hessian" and not (self.cut.diagonal and self.block is None):
            raise ValueError(f"of='hessian' needs a diagonal partition such as '... |', got {str(self.partition)!r}")
        known = getattr(self.block, "uses", {"window"} if self.block is None else set())
        for name, value in (("window", self.moment.window), ("tracking", self.root.tracking)):
            if value is not None and name not in known:
                whose = "the standard block" if self.block is None else self.block.__name__
                raise ValueError(
                    f"{name}={value!r} means nothing to {whose}; leave it out, or choose a block that uses it"
                )
        momentum = self.rule.momentum
        if self.moment.of == "momentum" and (momentum is None or momentum.after or momentum.inside):
            raise ValueError("of='momentum' needs a rule with momentum before preconditioning")
        if momentum is not None and momentum.inside:
            self._check_inside()

    def _check_inside(self) -> None:
        """Momentum in a block's bases can't be compared with what lies outside of them."""
        if not getattr(self.block, "turns", False):
            whose = "the standard block" if self.block is None else self.block.__name__
            raise ValueError(f"momentum inside needs a block that turns, such as EigenbasisBlock; got {whose}")
        rule = self.rule
        unfit = {"grafting": rule.grafting, "finish": rule.finish, "clip": rule.clip, "model": rule.model}
        if some := [name for name, value in unfit.items() if value]:
            raise ValueError(f"momentum inside goes without {', '.join(some)}; set inside=False")

    @property
    def cut(self) -> Partition:
        """The partition, parsed."""
        assert isinstance(self.partition, Partition)
        return self.partition

    @property
    def damping(self) -> Damping:
        """The root's damping."""
        assert isinstance(self.root.damping, Damping)
        return self.root.damping

    @property
    def squares(self) -> bool:
        """Whether squares of gradients, or their products with directions, are taken."""
        rule = self.rule
        return self.root.exponent != 0 or rule.grafting is not None or rule.clip is not None or rule.model is not None

    @property
    def on_gradients(self) -> Recipe:
        """What a parameter gets whose layer can't be heard: the fallback, or gradients' moments normalised by the trace."""
        if not self.moment.listens:
            return self
        if self.fallback is not None:
            return self.fallback.on_gradients
        composition = "trace" if self.moment.composition == "independent" else self.moment.composition
        moment = replace(self.moment, of="gradient", labels="data", composition=composition)
        return replace(self, moment=moment)

    def at(self, step: int) -> Recipe:
        """This recipe with every callable replaced by its number at a step."""
        return resolve(self, step)
