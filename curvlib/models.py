"""Models of the loss along a direction, by which a rule may decide how far to step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any, ClassVar


@dataclass(frozen=True)
class Model:
    """What decides step sizes; it declares what it keeps, and what it cannot do together with.

    Attributes:
        needs: the pass that it rests on, see :class:`~curvlib.passes.Passes`: ``"outputs"`` or ``"loss"``.
        combines: whether it also takes over momentum, so that a rule may have none of its own.
        scalars: names of numbers kept for every operand.
    """

    needs: ClassVar[str] = "outputs"
    combines: ClassVar[bool] = False
    scalars: ClassVar[tuple[str, ...]] = ()


@singledispatch
def decide(
    model: Model, finished: Any, passes: Any, parameters: Any, settings: Any, gate: Any, exchange: Any = None
) -> Any:
    """Let a model change this step's directions; every kind registers how, in the room of its mathematics.

    Args:
        model: the model.
        finished: the step's directions, :class:`~curvlib.engine.Direction`, of which those with this model are changed.
        passes: what was evaluated since the last step, :class:`~curvlib.passes.Passes`.
        parameters: of the optimizer, in order.
        settings: of the groups.
        gate: 0-d bool, False where the step must change nothing; ``None`` is open.
        exchange: the ranks over whose batches a model is the mean; ``None`` for one.

    Returns:
        What the model promises of the step, :class:`~curvlib.quadratic.Minimum`, or ``None``.

    Raises:
        TapError: where a pass is missing.
        TypeError: for a kind that registered nothing.
    """
    raise TypeError(f"{type(model).__name__} does not say how it decides: register it with curvlib.models.decide")
