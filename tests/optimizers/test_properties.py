"""What every method must do, whatever the numbers: descend, commute with permutations, scale as its exponent says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib
from curvlib import CurvatureOptimizer, Damping, Moment, Recipe, Root
from tests.optimizers.oracles import F64
from tests.strategies import partition_texts


def one_step(make, weight, gradient):
    """The step that an optimizer takes, without lr."""
    parameter = nn.Parameter(weight.clone())
    optimizer = make([parameter])
    parameter.grad = gradient
    optimizer.step()
    return parameter.detach() - weight


def recipe(text, composition="independent", exponent=1.0, damping=0.1):
    return Recipe(text, Moment(composition=composition, beta=0.5), Root(exponent, Damping(damping)))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_step_descends(data):
    sizes = {"o": data.draw(st.integers(1, 5)), "i": data.draw(st.integers(1, 5))}
    text = data.draw(partition_texts(sizes))
    composition = data.draw(st.sampled_from(["independent", "trace", "power-mean"]))
    exponent = data.draw(st.sampled_from([0.25, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    weight, gradient = torch.randn(2, *sizes.values(), dtype=F64, generator=generator)
    made = recipe(text, composition, exponent)
    step = one_step(lambda parameters: CurvatureOptimizer(parameters, made, lr=1.0), weight, gradient)
    assert (step * gradient).sum() < 0


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "MomentumAdam", "Shampoo", "MBF"])
@given(seed=st.integers(0, 1000), columns=st.integers(1, 6), scale=st.floats(-6, 6))
@settings(max_examples=15, deadline=None)
def test_the_first_step_of_every_method_descends(name, seed, columns, scale):
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, 4, columns, dtype=F64, generator=generator)
    gradient = gradient * 10**scale
    options = {} if name != "AdamW" else {"weight_decay": 0.0}
    step = one_step(lambda parameters: getattr(curvlib, name)(parameters, lr=1e-3, **options), weight, gradient)
    assert (step * gradient).sum() < 0


UNCUT = ["... |", "o | i", "i | o", "~o | i", "~i | o", "| o, i", "| o i", "| [o], i", "~o ~i |", "o | [i]"]


@pytest.mark.parametrize("text", UNCUT)
@pytest.mark.parametrize("composition", ["independent", "trace", "power-mean"])
def test_permuting_output_units_permutes_the_update(text, composition):
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 5, 4, dtype=F64)
    order = torch.randperm(5)
    made = recipe(text, composition)
    plain = one_step(lambda parameters: CurvatureOptimizer(parameters, made, lr=1.0), weight, gradient)
    permuted = one_step(lambda parameters: CurvatureOptimizer(parameters, made, lr=1.0), weight[order], gradient[order])
    torch.testing.assert_close(permuted, plain[order], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("text", ["| o/2, i", "| o/2 i/2", "~o/2 | i", "| (o i)~/i"])
def test_permutations_that_keep_chunks_permute_the_update_and_others_do_not(text):
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 6, 4, dtype=F64)
    made = recipe(text)

    def step(order):
        return one_step(lambda parameters: CurvatureOptimizer(parameters, made, lr=1.0), weight[order], gradient[order])

    plain = step(torch.arange(6))
    keeping = torch.tensor([4, 5, 0, 1, 3, 2])
    torch.testing.assert_close(step(keeping), plain[keeping], rtol=1e-9, atol=1e-10)
    mixing = torch.tensor([1, 2, 3, 4, 5, 0])
    rows = "(o i)" in text  # chunks of one row each: every permutation of rows keeps them
    assert torch.allclose(step(mixing), plain[mixing]) == rows


@pytest.mark.parametrize("text", UNCUT)
@pytest.mark.parametrize(("composition", "exponent"), [("independent", 1.0), ("power-mean", 0.5), ("power-mean", 1.0)])
def test_a_large_absolute_damping_leaves_sgd_scaled_by_its_power(text, composition, exponent):
    """Each of k factors tends to λ^-p (independent) or λ^(-p/k) (power mean)."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 5, 4, dtype=F64)
    damping = 1e8
    made = recipe(text, composition, exponent, damping)
    k = text.count(",") + 1
    lr = damping ** (exponent * (k if composition == "independent" else 1))
    step = one_step(lambda parameters: CurvatureOptimizer(parameters, made, lr=lr), weight, gradient)
    torch.testing.assert_close(step, -gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("composition", "exponent"), [("power-mean", 0.5), ("power-mean", 1.0), ("trace", 1.0)])
@pytest.mark.parametrize("text", ["... |", "o | i", "| o, i", "~o | i"])
def test_scaling_the_gradient_scales_an_almost_undamped_step_as_the_exponent_says(text, composition, exponent):
    """The direction is curvature^-p g and curvature is quadratic in g: it scales like s^(1 - 2p)."""
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 4, 4, dtype=F64)
    relative = Damping(1e-3, "trace")
    made = Recipe(text, Moment(composition=composition, beta=0.0), Root(exponent, relative))

    def step(scale):
        return one_step(lambda parameters: CurvatureOptimizer(parameters, made, lr=1.0), weight, scale * gradient)

    torch.testing.assert_close(step(10.0), 10.0 ** (1 - 2 * exponent) * step(1.0), rtol=1e-7, atol=1e-9)
