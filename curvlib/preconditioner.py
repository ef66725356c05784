"""Directions for somebody else's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from . import engine
from .optimizer import CurvatureOptimizer, Tables
from .recipe import Recipe
from .routing import Route


class Preconditioner(CurvatureOptimizer):
    """Replaces every gradient by the direction of a recipe; another optimizer takes the step.

    In a loop::

        loss.backward()
        preconditioner.step()      # .grad is now curvature^-1 times the gradient
        optimizer.step()

    Momentum, grafting, finishes and clip of the recipe's rule apply; its decay does not. The direction is that of the mean
    loss, whatever the reduction.

    Args:
        params: a model, parameters, groups, or (name, parameter) pairs, as :class:`CurvatureOptimizer` takes them.
        recipe: a :class:`Recipe`, routes, or a function that makes them from ``settings``.
        lr: the other optimizer's step size, which only a KL clip needs to know.
        reduction: see :class:`CurvatureOptimizer`.
        model: see :class:`CurvatureOptimizer`.
        settings: see :class:`CurvatureOptimizer`.
    """

    _steps_itself = False

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        recipe: Recipe | Route | Sequence[Route] | Tables,
        lr: float | Tensor | Callable[[int], float] = 1.0,
        *,
        reduction: Literal["mean", "sum"] | float = "mean",
        model: nn.Module | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(params, recipe, lr, reduction=reduction, model=model, **settings)

    def _move(self, finished: list[engine.Direction], settings: Sequence[engine.Group], gate: Tensor | None) -> None:
        engine.write(finished)
