"""A problem that trains in a blink, and methods beside the named ones; ``tests.benchmarks.tiny:TINY`` and so on."""

from __future__ import annotations

import torch
from torch import nn

import curvlib
from benchmarks.data import Data, Split
from benchmarks.methods import METHODS, Method
from benchmarks.problems import Problem, Target, classification
from benchmarks.records import Spec


def tiny_data(_=None):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(80, 6, generator=generator)
    labels = (inputs[:, :3].argmax(1)).long()
    return Data(Split(inputs[:64], labels[:64]), Split(inputs[64:], labels[64:]))


TINY = Problem(
    "tiny",
    "Tiny",
    "made up",
    lambda _: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)),
    tiny_data,
    classification,
    "categorical",
    batch_size=16,
    epochs=5,
    target=Target("train", 0.8),
    points=2,
)

WILD = Method("wild", "Wild", lambda m, **s: curvlib.SGD(m, **s), "#111", "-", {}, {"lr": 1e38})


def broken(model, lr=1.0):
    """An optimizer that fails at its third step."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the third step")

    optimizer.register_step_pre_hook(fail)
    return optimizer


def spec(method="adam", seed=0, epochs=5, **settings):
    return Spec("tiny", method, settings or METHODS[method].settings_for("tiny"), seed, epochs)
