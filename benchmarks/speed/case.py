"""What a case is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .timing import Contest, Setting, Target


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: how it is called on the command line.
        what: our side.
        against: the other side.
        cpu: what is asked on a CPU.
        gpu: what is asked on a GPU.
        build: makes both sides; raises :class:`~benchmarks.speed.peers.Missing` where the other side is not there.
    """

    name: str
    what: str
    against: str
    cpu: Target
    gpu: Target
    build: Callable[[Setting], Contest]

    def target(self, device: torch.device) -> Target:
        """What is asked on a device."""
        return self.gpu if device.type == "cuda" else self.cpu


def at_most(limit: float | None) -> Target:
    """A bound of ours over theirs."""
    return Target(limit)


def faster(limit: float | None) -> Target:
    """A bound of theirs over ours."""
    return Target(limit, faster=True)
