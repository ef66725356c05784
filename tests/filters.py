"""What the tests of filters share: small networks, examples and beliefs, and the error law; all in float64."""

from __future__ import annotations

import torch
from torch import nn

from curvlib.filtering import Dynamics, LowRankPrecision

U = torch.finfo(torch.float64).eps
C = 20.0  # constant of the error law, c·P·κ·u
MOVING = Dynamics(gamma=0.95, q=0.02, inflation=0.1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def low_rank(size, memory, spherical=False, seed=0):
    diagonal = 0.5 + torch.rand(() if spherical else size, dtype=torch.float64, generator=generator(seed + 1))
    return LowRankPrecision(diagonal, normal(size, memory, seed=seed))


def network(seed=0, outputs=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def examples(likelihood, step, count=1, outputs=2):
    inputs = normal(count, 3, seed=100 + step)
    if likelihood == "categorical":
        return inputs, torch.randint(0, outputs, (count,), generator=generator(step))
    drawn = torch.rand(count, outputs, dtype=torch.float64, generator=generator(step))
    return inputs, (drawn > 0.5).double() if likelihood == "bernoulli" else drawn


def linear(theta, inputs):
    return inputs @ theta


def assert_near(found, expected, condition, steps=1):
    """Agreement to c·P·κ·u for every step, relative to the largest entry."""
    bound = C * len(expected) * condition * U * steps * max(1.0, expected.abs().max().item())
    assert (found - expected).abs().max().item() <= bound
