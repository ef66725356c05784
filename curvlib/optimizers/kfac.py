"""KFAC: Kronecker-factored approximate curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL, KRONECKER, EigenBlock
from ..checks import Flags, check_choice
from ..optimizer import CurvatureOptimizer
from ..quadratic import Quadratic
from ..recipe import Clip, Damping, Labels, Moment, Momentum, Recipe, Root, Rule, Schedule
from ..routing import Route, Table, is_weight

Split = Literal["pi", "sqrt"] | None
_EMBEDDING = "| [v], d"


class KFAC(CurvatureOptimizer):
    """Kronecker-factored approximate curvature (Martens & Grosse 2015; convolutions: Grosse & Martens 2016).

    With a the inputs of a layer, its bias' 1 appended, and δ the gradients of its outputs::

        A <- β A + (1 - β) E[a aᵀ]                  every T1 steps; divided by 1 - β^n
        B <- β B + (1 - β) E[δ δᵀ]
        D  = (B + √λ/π I)^-1 M (A + π√λ I)^-1       every T2 steps; M: the gradient's momentum
        W <- (1 - lr·weight_decay) W - lr ν D       ν = min(1, √(κ / Σ lr² ⟨D, M⟩))

    with π² the ratio of the mean eigenvalues of A and B. Where a layer is applied at several positions t (of a sequence, an
    image), ``"expand"`` takes positions as examples, A = E[1/T Σ_t a aᵀ], B = E[Σ_t δ δᵀ] (which is KFAC for convolutions),
    ``"reduce"`` sums them up first, a -> 1/T Σ_t a, δ -> Σ_t δ (Eschenhagen et al. 2023).

    Embeddings have a diagonal A. Norms, and biases that stand alone, have the diagonal of the Fisher, with the same λ;
    what has no signals of single examples (batch normalisation in training mode) follows its momentum.

    The papers draw ``labels`` from the model, which needs one more line in the loop (``observe``) and one more backward
    pass; the default ``"data"`` listens to the training backward alone (empirical Fisher). With ``form="eigen"`` λ is added
    to the eigenvalues of B ⊗ A as a whole, and ``split`` is not used.

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        damping: λ.
        labels: ``"data"``, ``"sampled"``, or ``"exact"``: the mean over all labels (type-2 Fisher).
        sharing: ``"expand"`` or ``"reduce"``.
        split: how λ is shared out between A and B: ``"pi"``; ``"sqrt"``: √λ each (π = 1); ``None``: λ each, as
            kfac_pytorch has it.
        form: ``"inverse"`` or ``"eigen"``.
        kl_clip: κ; ``None`` for none.
        quadratic: choose step size and momentum as Martens & Grosse do (§7): the α and μ that minimise the exact quadratic
            model with λ, for the update αΔ + μδ₀; ``momentum`` and ``kl_clip`` are not used, lr=1 is the paper's. Needs
            ``observe`` at every step, and costs two more passes.
        adapt_every: T of their Levenberg-Marquardt rule for λ (§6.5; theirs is 5), which needs ``quadratic=True`` and
            ``step(closure)``; ``None`` for a constant λ. Theirs tunes the factors' damping apart from λ; here it follows λ.
        beta: β.
        momentum: of the gradient, a heavy ball; 0 for none.
        weight_decay: decoupled.
        statistics_every: T1, in steps.
        refresh_every: T2, in steps.
        dense_start: also refresh with every statistic of the first T2 steps.
        stagger: spread the inverses of a period over its steps.
        subsample: use every s-th position (or example) only.
        maximize: ascend instead.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`; without one KFAC warns once and uses moments of the batch gradient.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | Callable[[int], float] = 0.03,
        *,
        damping: float | Callable[[int], float] = 1e-2,
        labels: Labels = "data",
        sharing: Literal["expand", "reduce"] = "expand",
        split: Split = "pi",
        form: Literal["inverse", "eigen"] = "inverse",
        kl_clip: float | None = 1e-2,
        quadratic: bool = False,
        adapt_every: int | None = None,
        beta: float = 0.95,
        momentum: float | Callable[[int], float] = 0.9,
        weight_decay: float = 0.0,
        statistics_every: int = 1,
        refresh_every: int = 10,
        dense_start: bool = True,
        stagger: bool = False,
        subsample: int = 1,
        maximize: bool = False,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        super().__init__(
            params,
            kfac,
            lr,
            weight_decay=weight_decay,
            maximize=maximize,
            reduction=reduction,
            model=model,
            damping=damping,
            labels=labels,
            sharing=sharing,
            split=split,
            form=form,
            kl_clip=kl_clip,
            quadratic=quadratic,
            adapt_every=adapt_every,
            beta=beta,
            momentum=momentum,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            dense_start=dense_start,
            stagger=stagger,
            subsample=subsample,
            **flags,
        )


def kfac(
    damping: float,
    labels: Labels,
    sharing: Literal["expand", "reduce"],
    split: Split,
    form: Literal["inverse", "eigen"],
    kl_clip: float | None,
    quadratic: bool,
    adapt_every: int | None,
    beta: float,
    momentum: float,
    statistics_every: int,
    refresh_every: int,
    dense_start: bool,
    stagger: bool,
    subsample: int,
) -> Table:
    """Linear layers and convolutions: Kronecker; embeddings: Kronecker with a diagonal; all else: a diagonal."""
    check_choice("form", form, ("inverse", "eigen"))
    check_choice("split", split, (None, "pi", "sqrt"))
    moment = Moment("signals", beta=beta, debias=True, labels=labels, sharing=sharing, subsample=subsample)
    samples = Moment("samples", beta=beta, debias=True, labels=labels)
    if adapt_every is not None and not quadratic:
        raise ValueError(f"adapt_every={adapt_every!r} compares the loss with the quadratic model; set quadratic=True")
    clip = Clip("kl", kl_clip) if kl_clip is not None else None
    rule = Rule(Momentum(momentum) if momentum else None, clip=clip)
    if quadratic:
        rule = Rule(model=Quadratic(damping, adapt_every=adapt_every))
    schedule = Schedule(statistics_every, refresh_every, dense_start, stagger)
    root = Root(1, Damping(damping, split=split if form == "inverse" else None))
    block = EigenBlock if form == "eigen" else None
    kronecker = Recipe(KRONECKER, moment, root, rule, schedule, join_bias=True, block=block)
    embedding = Recipe(_EMBEDDING, moment, root, rule, schedule, block=block)
    plain = Recipe(DIAGONAL, root=Root(0), rule=rule)
    diagonal = Recipe(DIAGONAL, samples, Root(1, Damping(damping)), rule, schedule, fallback=plain)
    return (
        Route(kronecker, kind=("linear", "conv"), where=is_weight),
        Route(embedding, kind="embedding"),
        Route(diagonal),
    )
