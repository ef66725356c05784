"""Adam, AdamW, and the Adam of the MBF, TNT and K-BFGS papers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Unpack

from torch import Tensor, nn

from ..blocks import DIAGONAL
from ..checks import Flags
from ..optimizer import CurvatureOptimizer
from ..recipe import Damping, Moment, Momentum, Recipe, Root, Rule
from ..routing import Route, Table


class Adam(CurvatureOptimizer):
    """Adam (Kingma & Ba 2015, Algorithm 1); the twin of :class:`torch.optim.Adam`.

    ::

        m <- β1 m + (1 - β1) g                m̂ = m / (1 - β1^t)
        v <- β2 v + (1 - β2) g²               v̂ = v / (1 - β2^t)
        w <- w - lr m̂ / (√v̂ + eps)

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        betas: β1, β2.
        eps: added to the denominator.
        weight_decay: L2: added to the gradient times the weight.
        amsgrad: use the running maximum of v (Reddi et al. 2018).
        maximize: ascend instead.
        decoupled_weight_decay: decay as :class:`AdamW` does.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        settings: dict[str, Any] = dict(
            betas=betas, eps=eps, amsgrad=amsgrad, decoupled_weight_decay=decoupled_weight_decay
        )
        super().__init__(
            params, adam, lr, weight_decay=weight_decay, maximize=maximize, model=model, **settings, **flags
        )


class AdamW(CurvatureOptimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); the twin of :class:`torch.optim.AdamW`.

    As :class:`Adam`, but w <- (1 - lr·weight_decay) w - lr m̂ / (√v̂ + eps).

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        betas: β of the averages of gradients and of their squares.
        eps: added to the denominator.
        weight_decay: decoupled.
        amsgrad: divide by the largest average of squares so far.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        table = partial(adam, decoupled_weight_decay=True)
        settings: dict[str, Any] = dict(betas=betas, eps=eps, amsgrad=amsgrad)
        super().__init__(
            params, table, lr, weight_decay=weight_decay, maximize=maximize, model=model, **settings, **flags
        )


class MomentumAdam(CurvatureOptimizer):
    """Adam with the momentum's second moment: the baseline of the MBF, TNT and K-BFGS authors (Bahamou et al. 2023).

    ::

        m <- β1 m + (1 - β1) g                m̂ = m / (1 - β1^t)
        v <- β2 v + (1 - β2) m̂²               v̂ = v / (1 - β2^t)
        w <- (1 - lr·weight_decay) w - lr m̂ / (√v̂ + eps)

    It squares m̂ where Adam squares g, which matters where the gradient's sign changes often. The authors' curves that are
    labelled Adam are this variant (released MBF code), with eps tuned (1e-4 on the MNIST autoencoder).

    Args:
        params: parameters, groups, named parameters, or a model.
        lr: step size.
        betas: β1, β2.
        eps: added to the denominator.
        weight_decay: decoupled.
        maximize: ascend instead.
        model: see :class:`CurvatureOptimizer`.
        flags: ``foreach`` and torch's others, see :class:`CurvatureOptimizer`.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        model: nn.Module | None = None,
        **flags: Unpack[Flags],
    ) -> None:
        settings: dict[str, Any] = dict(betas=betas, eps=eps)
        super().__init__(
            params, momentum_adam, lr, weight_decay=weight_decay, maximize=maximize, model=model, **settings, **flags
        )


def adam(betas: tuple[float, float], eps: float, amsgrad: bool, decoupled_weight_decay: bool) -> Table:
    """Everything: the diagonal of the gradient's second moment, to the power -1/2."""
    moment = Moment(beta=betas[1], debias=True, maximum=amsgrad, dtype="parameter")
    rule = Rule(Momentum(betas[0], "ema", debias=True), decay="decoupled" if decoupled_weight_decay else "l2")
    return (Route(Recipe(DIAGONAL, moment, Root(0.5, Damping(eps, outside=True)), rule)),)


def momentum_adam(betas: tuple[float, float], eps: float) -> Table:
    """Everything: the diagonal of the momentum's second moment, to the power -1/2."""
    moment = Moment("momentum", beta=betas[1], debias=True)
    rule = Rule(Momentum(betas[0], "ema", debias=True))
    return (Route(Recipe(DIAGONAL, moment, Root(0.5, Damping(eps, outside=True)), rule)),)
