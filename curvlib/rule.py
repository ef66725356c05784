"""Rules: what a recipe says of the preconditioned direction. Momentum, grafting, clipping, decay.

Everything here is a frozen dataclass that checks itself; :mod:`curvlib.rules` does what it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .checks import Number, check_choice, check_number
from .finish import Finish
from .models import Model


@dataclass(frozen=True)
class Momentum:
    """A running average of the gradient, or of the direction.

    Args:
        beta: μ.
        kind: ``"heavy-ball"``: M <- μ M + (1-dampening) g; ``"ema"``: M <- μ M + (1-μ) g.
        after: of the preconditioned direction instead of the gradient.
        nesterov: look ahead: g + μ M (heavy ball), or μ M + (1-μ) g.
        dampening: of a heavy ball, as in torch.optim.SGD: not applied to the first gradient.
        debias: divide an EMA by 1 - μ^t.
        mix: use ν M + (1-ν) g of the average as it was before this step, and average with μ afterwards (Lion).
        inside: keep the average of gradients in the bases in which the block divides, and turn it with them; the same
            mathematics, without turning an average into them at every step. For blocks that ``turn``, such as SOAP's.
    """

    beta: Number = 0.9
    kind: Literal["heavy-ball", "ema"] = "heavy-ball"
    after: bool = False
    nesterov: bool = False
    dampening: Number = 0.0
    debias: bool = False
    mix: Number | None = None
    inside: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("heavy-ball", "ema"))
        if self.inside and self.after:
            raise ValueError("momentum inside is of gradients; set after=False")
        if self.mix is not None:
            check_number("mix", self.mix, high=1.0)
            if self.kind != "ema" or self.nesterov or self.debias:
                raise ValueError("mix needs kind='ema' without nesterov and debias: it says by itself what is used")
        check_number("momentum", self.beta, high=1.0 if self.kind == "ema" else math.inf)
        check_number("dampening", self.dampening, low=-math.inf)


@dataclass(frozen=True)
class Grafting:
    """Give every parameter's direction the norm that a diagonal method's direction would have.

    Args:
        kind: ``"sgd"``: ‖m‖ of the (momentum) gradient m; ``"adagrad"``, ``"rmsprop"``, ``"adam"``: ‖m / (√v + eps)‖ with
            v the sum, the EMA, the debiased EMA of squared gradients.
        beta: of the EMA.
        eps: added to the denominator.
    """

    kind: Literal["sgd", "adagrad", "rmsprop", "adam"] = "adam"
    beta: Number = 0.999
    eps: Number = 1e-8

    def __post_init__(self) -> None:
        check_choice("grafting", self.kind, ("sgd", "adagrad", "rmsprop", "adam"))
        check_number("grafting beta", self.beta, high=1.0)
        check_number("grafting eps", self.eps)


@dataclass(frozen=True)
class Clip:
    """Shrink all directions by one factor.

    Args:
        kind: ``"norm"``: to a global norm of at most ``limit``; ``"kl"``: by min(1, √(limit / Σ lr² mᵀd)), so that the
            step's quadratic size dᵀFd stays below ``limit`` (Ba et al. 2017), with m what was preconditioned: the gradient,
            or its momentum, so that mᵀd is never negative.
        limit: the bound.
    """

    kind: Literal["norm", "kl"]
    limit: Number

    def __post_init__(self) -> None:
        check_choice("clip", self.kind, ("norm", "kl"))
        check_number("clip limit", self.limit, strict=True)


@dataclass(frozen=True)
class Rule:
    """What becomes of the preconditioned direction.

    Args:
        momentum: before or after preconditioning, or none.
        grafting: or none.
        finish: maps of the direction after grafting, one after the other, see :class:`~curvlib.finish.Finish`.
        clip: or none.
        model: of the loss, which decides step sizes, see :mod:`curvlib.models`; or none.
        decay: what a group's ``weight_decay`` means: ``"decoupled"``: w <- (1 - lr·decay) w; ``"l2"``: added to the gradient.
        lr_decay: the step is lr / (1 + t · lr_decay), as in torch.optim.Adagrad.
        lr_limit: the step is no longer than this, whatever lr is, as in torch.optim.Adafactor; ``None`` for no limit.
    """

    momentum: Momentum | None = None
    grafting: Grafting | None = None
    finish: tuple[Finish, ...] = ()
    clip: Clip | None = None
    model: Model | None = None
    decay: Literal["decoupled", "l2"] = "decoupled"
    lr_decay: Number = 0.0
    lr_limit: Number | None = None

    def __post_init__(self) -> None:
        check_choice("decay", self.decay, ("decoupled", "l2"))
        check_number("lr_decay", self.lr_decay)
        if self.lr_limit is not None:
            check_number("lr_limit", self.lr_limit)
        if not isinstance(self.finish, tuple) or not all(isinstance(one, Finish) for one in self.finish):
            raise TypeError(f"finish must be a tuple of curvlib.Finish, got {self.finish!r}")
        if self.model is not None and self.clip is not None:
            raise ValueError("a model of the loss decides step sizes; set clip=None")
        if self.model is not None and self.model.combines and self.momentum is not None:
            raise ValueError(f"{type(self.model).__name__} decides step size and momentum; set momentum=None")
