"""The twins follow torch's own optimizers, fed identical recorded gradients."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib

SHAPES = [(), (3,), (0, 3), (4, 5), (2, 3, 4), (2, 3, 2, 2)]
CASES = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"betas": (0.8, 0.9), "eps": 1e-3, "maximize": True}),
    ("Adam", {"decoupled_weight_decay": True, "weight_decay": 0.2}),
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True, "weight_decay": 0.3}),
    ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "maximize": True}),
    ("Adagrad", {}),
    ("Adagrad", {"lr_decay": 0.1, "initial_accumulator_value": 0.2, "weight_decay": 0.1, "maximize": True}),
]
names = [f"{name}-{'-'.join(options)}" for name, options in CASES]


def walk(make, dtype, steps, schedule=None, shapes=SHAPES, seed=0):
    """Parameters after ``steps`` recorded gradients, some of them missing now and then."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes
    ]
    optimizer = make(parameters)
    scheduler = schedule(optimizer) if schedule else None
    for step in range(steps):
        for number, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
            parameter.grad = None if (7 * step + number) % 11 == 0 else gradient
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [parameter.detach() for parameter in parameters]


def distance(ours, theirs):
    pairs = [(one.double(), other.double()) for one, other in zip(ours, theirs, strict=True) if one.numel()]
    return max(((one - other).norm() / other.norm().clamp_min(1e-300)).item() for one, other in pairs)


@pytest.mark.parametrize(("name", "options"), CASES, ids=names)
def test_a_twin_follows_torch_over_1000_steps_in_float64(name, options):
    ours = walk(lambda parameters: getattr(curvlib, name)(parameters, **options), torch.float64, 1000)
    theirs = walk(lambda parameters: getattr(torch.optim, name)(parameters, **options), torch.float64, 1000)
    assert distance(ours, theirs) <= 1e-10


@pytest.mark.parametrize(("name", "options"), CASES, ids=names)
def test_a_twin_is_as_near_in_float32_as_torchs_own_implementations_are(name, options):
    theirs = [
        walk(
            lambda parameters, flag=flag: getattr(torch.optim, name)(parameters, foreach=flag, **options),
            torch.float32,
            300,
        )
        for flag in (False, True)
    ]
    exact = walk(lambda parameters: getattr(torch.optim, name)(parameters, **options), torch.float64, 300)
    ours = walk(lambda parameters: getattr(curvlib, name)(parameters, **options), torch.float32, 300)
    # torch's two implementations may agree bitwise; each is then still as far from float64 as float32 makes it
    bound = max(distance(*theirs), *(distance(one, exact) for one in theirs))
    assert distance(ours, exact) <= 2 * bound + 1e-7


def test_a_learning_rate_may_be_a_tensor():
    lr = torch.tensor(2e-3, dtype=torch.float64)
    ours = walk(lambda parameters: curvlib.Adam(parameters, lr=lr), torch.float64, 200)
    theirs = walk(lambda parameters: torch.optim.Adam(parameters, lr=lr, foreach=False), torch.float64, 200)
    assert distance(ours, theirs) <= 1e-10


SCHEDULES = {
    "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 30, 0.5),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=201),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "options"), [("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {"amsgrad": True})])
def test_schedulers_drive_a_twin_as_they_drive_torch(name, options, schedule):
    ours, theirs = (
        walk(
            lambda parameters, home=home: getattr(home, name)(parameters, **options),
            torch.float64,
            200,
            SCHEDULES[schedule],
        )
        for home in (curvlib, torch.optim)
    )
    assert distance(ours, theirs) <= 1e-10


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_shapes_will_do(data):
    name, options = data.draw(st.sampled_from(CASES))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=4))
    seed = data.draw(st.integers(0, 100))
    ours, theirs = (
        walk(
            lambda parameters, home=home: getattr(home, name)(parameters, **options),
            torch.float64,
            20,
            None,
            shapes,
            seed,
        )
        for home in (curvlib, torch.optim)
    )
    if any(parameter.numel() for parameter in ours):
        assert distance(ours, theirs) <= 1e-10


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_names_and_defaults_are_torchs(name):
    ours = inspect.signature(getattr(curvlib, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    flags = {"foreach", "fused", "capturable", "differentiable"}
    assert set(theirs) - flags == set(ours) - {"model"}
    for option in set(theirs) - flags - {"params"}:
        assert ours[option].default == theirs[option].default, option
    positional = [option for option in theirs if theirs[option].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    shared = [option for option in positional if option not in flags and option != "maximize"]
    assert shared == [option for option in ours if option in shared][: len(shared)]


def test_bfloat16_parameters_keep_torchs_dtype_in_twins():
    ours = walk(lambda parameters: curvlib.Adam(parameters, lr=1e-2), torch.bfloat16, 50)
    theirs = walk(lambda parameters: torch.optim.Adam(parameters, lr=1e-2), torch.bfloat16, 50)
    exact = walk(lambda parameters: torch.optim.Adam(parameters, lr=1e-2), torch.float64, 50)
    assert distance(ours, exact) <= 2 * distance(theirs, exact)
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    optimizer = curvlib.Adam([parameter])
    optimizer.step()
    assert optimizer.state[parameter]["moment"].dtype == torch.bfloat16


def test_the_authors_adam_squares_the_debiased_momentum():
    parameters = [nn.Parameter(torch.ones(4, dtype=torch.float64))]
    optimizer = curvlib.MomentumAdam(parameters, lr=1e-2, betas=(0.9, 0.99), eps=1e-4, weight_decay=0.1)
    weight, momentum, second = torch.ones(4, dtype=torch.float64), 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 100):
        gradient = torch.randn(4, generator=generator, dtype=torch.float64)
        parameters[0].grad = gradient
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient
        debiased = momentum / (1 - 0.9**step)
        second = 0.99 * second + 0.01 * debiased**2
        weight = (1 - 1e-2 * 0.1) * weight - 1e-2 * debiased / ((second / (1 - 0.99**step)).sqrt() + 1e-4)
    torch.testing.assert_close(parameters[0].detach(), weight, rtol=1e-12, atol=1e-12)


def test_nesterov_needs_momentum_without_dampening():
    for options in ({"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(ValueError, match="nesterov"):
            curvlib.SGD([nn.Parameter(torch.ones(1))], lr=0.1, **options)
