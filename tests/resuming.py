"""Trainings that are described by plain values, and a worker that goes on with them in a process of its own.

The worker reads checkpoints from its standard input and answers on its standard output: the bytes of ``torch.save``, after
eight that tell how many.
"""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.optim import lr_scheduler

import curvlib
from curvlib import TapWarning
from curvlib.testing.trainings import Training, convolutional, perceptron
from tests.campaign import Odd


def odd():
    """Empty, scalar and oblong parameters between two linear layers."""
    return nn.Sequential(nn.Linear(6, 3), Odd(), nn.Linear(2, 3))


NETWORKS = {"perceptron": perceptron, "convolutional": convolutional, "odd": odd}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULERS = {
    "none": lambda optimizer: None,
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "milestones": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 5], 0.5),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.StepLR(optimizer, 2)], [3]
    ),
    "one-cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, 0.02, total_steps=40, cycle_momentum="momentum" in optimizer.param_groups[0]
    ),
}


class Fading:
    """A setting that falls with the step."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, step: int) -> float:
        return self.start * 0.9**step


class Run:
    """A training on its way.

    Args:
        case: plain values: ``method``, ``network``, ``dtype``, ``seed``; ``model``, whether it is handed over; ``lr``, a
            number, ``lr_form``; ``scheduler``; ``settings``, of which those in ``fading`` are callables of the step; for
            every step in ``frozen`` the parameters without gradient.
    """

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.training = Training(self._make, NETWORKS[case["network"]], case["seed"], 1)
        self.model, self.optimizer = self.training.start(DTYPES[case["dtype"]])
        self.scheduler = SCHEDULERS[case["scheduler"]](self.optimizer)

    def _make(self, model: nn.Module) -> curvlib.CurvatureOptimizer:
        case = self.case
        lr: Any = {"number": float, "tensor": torch.tensor, "callable": Fading}[case["lr_form"]](case["lr"])
        settings = {name: Fading(v) if name in case["fading"] else v for name, v in case["settings"].items()}
        kind = getattr(curvlib, case["method"])
        return kind(model if case["model"] else model.parameters(), lr=lr, **settings)

    def steps(self, first: int, last: int) -> None:
        """Train from one step up to another."""
        for number in range(first, last):
            frozen = self.case["frozen"][number]
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name not in frozen)
            self.training.step(self.model, self.optimizer, number)
            if self.scheduler is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a schedule's remark on a step that overflowed
                    plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
                    self.scheduler.step(*([1.0] if plateau else []))

    def state(self) -> dict[str, Any]:
        """All that a checkpoint has."""
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


class Worker:
    """A fresh interpreter that resumes one training after another."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.resuming"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def resume(self, case: dict[str, Any], saved: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        """What becomes of a checkpoint over there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"case": case, "saved": saved, "first": first, "last": last, "threads": torch.get_num_threads()}
        send(self.process.stdin, order)
        return receive(self.process.stdout)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def send(stream: BinaryIO, content: dict[str, Any]) -> None:
    """Write one message."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    stream.write(len(buffer.getvalue()).to_bytes(8, "big") + buffer.getvalue())
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, Any]:
    """Read one message; nothing but plain values and tensors."""
    length = int.from_bytes(stream.read(8), "big")
    if not length:
        raise EOFError
    return torch.load(io.BytesIO(stream.read(length)), weights_only=True)


def main() -> None:
    """Resume until nothing more comes."""
    warnings.simplefilter("ignore", TapWarning)
    while True:
        try:
            order = receive(sys.stdin.buffer)
        except EOFError:
            return
        torch.set_num_threads(order["threads"])
        run = Run(order["case"])
        run.load(order["saved"])
        run.steps(order["first"], order["last"])
        send(sys.stdout.buffer, run.state())


if __name__ == "__main__":
    main()
