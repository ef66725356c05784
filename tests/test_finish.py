"""Finishes: where they stand in a step, what they are handed, and what they may not spoil."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvlib import (
    Clip,
    CurvatureOptimizer,
    Damping,
    Finish,
    Grafting,
    Moment,
    Momentum,
    Preconditioner,
    Recipe,
    Root,
    Route,
    Rule,
)
from curvlib.checks import resolve
from tests.listening import F64

PACKED = Recipe("| ...", Moment(beta=0.9), Root(1, Damping(0.1)), join_bias=True)
SEPARATE = Recipe("... |", Moment(beta=0.9), Root(0.5, Damping(0.1)))
PLAIN = Recipe("... |", root=Root(0))
EACH = pytest.mark.parametrize("recipe", [PACKED, SEPARATE, PLAIN], ids=["packed", "separate", "plain"])


@dataclass(frozen=True)
class Shift(Finish):
    """d + c w: of nothing it makes something."""

    strength: float = 0.5

    def __call__(self, direction, reference, parameters):
        return torch._foreach_add(direction, parameters, alpha=self.strength)


@dataclass(frozen=True)
class Trust(Finish):
    """‖w‖ d / ‖d‖, NaN for no direction."""

    def __call__(self, direction, reference, parameters):
        return [w.norm() * d / d.norm() for d, w in zip(direction, parameters, strict=True)]


@dataclass(frozen=True)
class Seen(Finish):
    """Notes what it is handed."""

    notes: list = None

    def __call__(self, direction, reference, parameters):
        self.notes.append((list(direction), list(reference), list(parameters)))
        return direction

    def __hash__(self):
        return 0


def network(dtype=F64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3), nn.LayerNorm(3)).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def directions(recipe, steps=1, finish=(), momentum=None, lr=0.0, skip=(), mask=False, **rule):
    """What ``Preconditioner`` puts into ``.grad`` at the last of some steps, by parameter name; and the model."""
    model = network()
    recipe = Recipe(
        recipe.partition, recipe.moment, recipe.root, Rule(momentum, finish=finish, **rule), join_bias=recipe.join_bias
    )
    preconditioner = Preconditioner(model, recipe)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=F64)
            parameter.grad = None if name in skip else gradient
        preconditioner.step()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, model


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])


@EACH
def test_every_parameter_is_finished_by_itself(recipe):
    plain, model = directions(recipe)
    weights = dict(model.named_parameters())
    found, _ = directions(recipe, finish=(Shift(0.5), Trust()))
    shifted = {name: one + 0.5 * weights[name].detach() for name, one in plain.items()}
    sizes = {name: weights[name].detach().norm() / one.norm() for name, one in shifted.items()}
    assert_same(found, {name: sizes[name] * one for name, one in shifted.items()})


@EACH
def test_it_sees_directions_references_and_parameters_apart(recipe):
    notes: list = []
    _, model = directions(recipe, finish=(Seen(notes),), momentum=Momentum(0.9))
    shapes = sorted(tuple(one.shape) for one in model.parameters() if one.ndim != 4)
    seen = sorted(tuple(one.shape) for note in notes for one in note[2] if one.ndim != 4)
    assert seen == shapes
    for direction, reference, parameters in notes:
        assert len(direction) == len(reference) == len(parameters)
        for one, other, parameter in zip(direction, reference, parameters, strict=True):
            assert one.shape == other.shape == parameter.shape
            assert one.dtype == parameter.dtype


@EACH
def test_it_follows_grafting_and_comes_before_a_momentum_of_directions(recipe):
    grafted, _ = directions(recipe, grafting=Grafting("sgd"))
    found, model = directions(recipe, grafting=Grafting("sgd"), finish=(Trust(),))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].norm(), parameter.detach().norm())
        torch.testing.assert_close(found[name] / found[name].norm(), grafted[name] / grafted[name].norm())
    averaged, _ = directions(recipe, 2, (Trust(),), Momentum(0.5, after=True))
    first, second = (directions(recipe, steps, (Trust(),))[0] for steps in (1, 2))
    assert_same(averaged, {name: 0.5 * first[name] + second[name] for name in first})


@EACH
def test_a_clip_bounds_what_is_finished(recipe):
    found, _ = directions(recipe, finish=(Shift(100.0),), clip=Clip("norm", 0.5))
    torch.testing.assert_close(torch.stack([one.norm() for one in found.values()]).norm(), torch.tensor(0.5, dtype=F64))


@EACH
def test_parameters_without_a_gradient_stay_out(recipe):
    skip = ("0.bias", "2.bias")
    plain, model = directions(recipe, skip=skip)
    found, _ = directions(recipe, finish=(Shift(0.5),), skip=skip)
    assert not set(skip) & set(found)
    weights = dict(model.named_parameters())
    assert_same(found, {name: one + 0.5 * weights[name].detach() for name, one in plain.items()})


@EACH
@pytest.mark.parametrize("momentum", [None, Momentum(0.9, after=True)])
@pytest.mark.parametrize("finish", [Shift(0.5), Trust()])
def test_a_masked_step_moves_nothing_whatever_is_made_of_it(recipe, momentum, finish):
    held = []
    for masked in (False, True):
        model = network()
        rule = Rule(momentum, finish=(finish,))
        recipe = Recipe(recipe.partition, recipe.moment, recipe.root, rule, join_bias=recipe.join_bias)
        optimizer = CurvatureOptimizer(model, recipe, lr=0.1)
        optimizer.on_nonfinite = "mask"
        for step in range(3):
            if step == 1 and not masked:
                continue
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) * (torch.inf if step == 1 else 1.0)
            optimizer.step()
        held.append({name: one.detach() for name, one in model.named_parameters()})
    assert_same(*held)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_parameters_are_seen_in_the_dtype_of_directions(dtype):
    notes: list = []
    weight = nn.Parameter(torch.ones(3, 2, dtype=dtype))
    recipe = Recipe("| o, i", rule=Rule(finish=(Shift(), Seen(notes))))
    weight.grad = torch.ones_like(weight)
    CurvatureOptimizer([weight], recipe).step()
    ((direction, _, parameters),) = notes
    assert direction[0].dtype == parameters[0].dtype == torch.float32
    assert weight.isfinite().all()


def test_only_some_of_a_batch_are_finished():
    start = [torch.randn(3, 2, dtype=F64) for _ in range(3)]
    together, apart = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    recipe = Recipe("| o, i", rule=Rule(finish=(Shift(), Trust())))
    batched, looped = CurvatureOptimizer(together, recipe), [CurvatureOptimizer([one], recipe) for one in apart]
    for step in range(5):
        for number, (one, other) in enumerate(zip(together, apart, strict=True)):
            gradient = None if (step + number) % 3 == 0 else torch.randn(3, 2, dtype=F64)
            one.grad, other.grad = gradient, gradient
        for optimizer in (batched, *looped):
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


def test_numbers_follow_their_schedule():
    rule = Rule(finish=(Trust(), Shift(lambda step: 0.1 * step)))
    assert resolve(rule, 3).finish == (Trust(), Shift(0.1 * 3))
    assert resolve(rule, 3).finish[0] is rule.finish[0]
    fixed = Rule(finish=(Trust(),))
    assert resolve(fixed, 3) is fixed
    weight = nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = CurvatureOptimizer([weight], Recipe("... |", root=Root(0), rule=Rule(finish=rule.finish[1:])), lr=1.0)
    for expected in (1.0, 0.9, 0.9 * 0.8):
        weight.grad = torch.zeros(2, dtype=F64)
        optimizer.step()
        torch.testing.assert_close(weight, torch.full((2,), expected, dtype=F64), check_dtype=False)


def test_units_with_different_finishes_share_state_and_nothing_else():
    weights = [nn.Parameter(torch.ones(3, 2, dtype=F64)) for _ in range(2)]
    bare = Recipe("| o, i", Moment(beta=0.9), Root(1, 0.1))
    shifted = Recipe("| o, i", Moment(beta=0.9), Root(1, 0.1), Rule(finish=(Shift(1.0),)))
    named = [("one", weights[0]), ("two", weights[1])]
    optimizer = CurvatureOptimizer(named, [Route(bare, name="one"), Route(shifted)], lr=1.0)
    for weight in weights:
        weight.grad = torch.ones(3, 2, dtype=F64)
    optimizer.step()
    assert len(optimizer._storage.buckets) == 1
    torch.testing.assert_close(weights[0] - 1.0, weights[1])


def test_a_finish_without_a_map_says_what_is_missing():
    weight = nn.Parameter(torch.ones(2))
    optimizer = CurvatureOptimizer([weight], Recipe("... |", rule=Rule(finish=(Finish(),))))
    F.mse_loss(weight, torch.zeros(2)).backward()
    with pytest.raises(TypeError, match=r"Finish must define __call__\(direction, reference, parameters\)"):
        optimizer.step()
