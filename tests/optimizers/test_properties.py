"""What every method must do, whatever the numbers: descend, commute with permutations, scale as its exponent says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib
from curvlib import CurvatureOptimizer, Damping, Moment, Recipe, Root, Rule, Schedule
from curvlib.optimizers.mbf import LINEAR_BLOCKS
from tests.optimizers.oracles import F64
from tests.strategies import axis_sizes, partition_texts

COMPOSITIONS = st.sampled_from(["independent", "trace", "power-mean"])
EXPONENTS = st.sampled_from([0.25, 0.5, 1.0])
GROUPINGS = sorted(LINEAR_BLOCKS)
MBF = dict(momentum=0.0, beta=0.9, statistics_every=1, refresh_every=3, debias=True)
CASES = [
    *[(name, {}) for name in ("SGD", "RMSprop", "Adagrad")],
    *[(name, {"betas": (0.0, 0.999), "weight_decay": 0.0}) for name in ("Adam", "AdamW", "MomentumAdam")],
    *[
        ("MBF", MBF | dict(linear_blocks=grouping, grafting=grafting, relative_damping=relative, damping=0.5))
        for grouping in GROUPINGS
        for grafting, relative in [(None, False), ("adam", True)]
    ],
    *[
        ("Shampoo", dict(momentum=0.0, refresh_every=3, beta=beta, grafting=grafting, kernels=kernels, block_size=2))
        for beta, grafting in [(None, None), (0.99, "adam"), (0.99, "rmsprop")]
        for kernels in ["separate", "merged", "inputs"]
    ],
]
NAMED = ("linear_blocks", "kernels", "grafting", "beta")
names = ["-".join([name, *(str(options[one]) for one in NAMED if one in options)]) for name, options in CASES]


def steps_of(make, weight, gradients):
    """The step that each gradient makes."""
    parameter = nn.Parameter(weight.clone())
    optimizer = make([parameter])
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
        yield parameter.detach() - before


def recipe(text, composition="independent", exponent=1.0, damping=0.1, beta=0.5, rule=None, schedule=None):
    moment = Moment(composition=composition, beta=beta)
    return Recipe(text, moment, Root(exponent, Damping(damping)), rule or Rule(), schedule or Schedule())


def by(made, lr=1.0):
    return lambda parameters: CurvatureOptimizer(parameters, made, lr=lr)


def normal(seed, *shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@given(st.data(), COMPOSITIONS, EXPONENTS, st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_every_partition_descends_even_with_an_old_root(data, composition, exponent, refresh, seed):
    sizes = data.draw(axis_sizes(axes=data.draw(st.sampled_from([("c",), ("o", "i"), ("o", "i", "k1")]))))
    made = recipe(data.draw(partition_texts(sizes)), composition, exponent, schedule=Schedule(refresh=refresh))
    weight, *gradients = normal(seed, 5, *sizes.values())
    for step, gradient in zip(steps_of(by(made), weight, gradients), gradients, strict=True):
        assert (step * gradient).sum() < 0


@pytest.mark.parametrize(("name", "options"), CASES, ids=names)
@given(st.integers(0, 1000), st.sampled_from([(), (3,), (3, 4), (4, 1), (3, 2, 2), (2, 3, 2, 2)]), st.integers(-6, 6))
@settings(max_examples=12, deadline=None)
def test_every_method_descends_without_momentum_and_decay(name, options, seed, shape, scale):
    weight, *gradients = normal(seed, 5, *shape)
    gradients = [gradient * 10.0**scale for gradient in gradients]
    make = getattr(curvlib, name)
    steps = steps_of(lambda parameters: make(parameters, lr=1e-3, **options), weight, gradients)
    for step, gradient in zip(steps, gradients, strict=True):
        assert (step * gradient).sum() < 0


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("name", "options"), CASES, ids=names)
def test_a_layer_without_signal_at_first_descends_once_it_has_some(name, options, dtype):
    """As below a readout that starts at zero: its first gradient is zero, and roots are not due again at once."""
    weight = normal(0, 4, 3).to(dtype)
    gradients = [torch.zeros(4, 3, dtype=dtype), *(0.01 * normal(1, 3, 4, 3).to(dtype))]
    make = getattr(curvlib, name)
    steps = list(steps_of(lambda parameters: make(parameters, lr=1e-3, **options), weight, gradients))
    assert not steps[0].any()
    for step, gradient in list(zip(steps, gradients, strict=True))[1:]:
        assert (step * gradient).sum() < 0
        assert step.norm() < 10  # 1e-3 of a direction; lr-sized for Adam, lr/λ-sized without grafting


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("grafting", [None, "adam"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Shampoo", dict(block_size=2)),
        *[("MBF", dict(damping=0.5, relative_damping=True, linear_blocks=one)) for one in ("output", "row-major")],
    ],
    ids=["Shampoo-blocks", "MBF-output", "MBF-row-major"],
)
def test_a_block_without_signal_at_first_does_not_drown_the_others(name, options, grafting, size):
    """As rows of an embedding that no batch has named yet; at any scale of the gradient."""
    weight, first, second = size * normal(0, 3, 4, 4)
    first[:2] = 0
    make = getattr(curvlib, name)
    options = options | dict(momentum=0.0, grafting=grafting, refresh_every=3)
    steps = list(steps_of(lambda one: make(one, 1e-3, **options), 0 * weight, [first, second]))
    assert not steps[0][:2].any()
    silent, known = steps[1][:2].norm(), steps[1][2:].norm()
    assert silent > 0
    assert known > 1e-4 * silent, f"steps of {known:.1e} where there was signal, of {silent:.1e} where there was none"


UNCUT = ["... |", "o | i", "i | o", "~o | i", "~i | o", "| o, i", "| o i", "| [o], i", "~o ~i |", "o | [i]"]


@given(st.sampled_from(UNCUT), COMPOSITIONS, EXPONENTS, st.permutations(range(5)), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_permuting_output_units_permutes_the_update(text, composition, exponent, order, seed):
    made, order = recipe(text, composition, exponent), torch.tensor(order)
    weight, *gradients = normal(seed, 4, 5, 4)
    plain = steps_of(by(made), weight, gradients)
    permuted = steps_of(by(made), weight[order], [gradient[order] for gradient in gradients])
    for one, other in zip(plain, permuted, strict=True):
        torch.testing.assert_close(other, one[order], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["MBF", "Shampoo"])
@given(data=st.data(), order=st.permutations(range(4)), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_permuting_the_units_of_a_network_permutes_its_training(name, data, order, seed):
    """Rows of [W, b] of one layer and columns of the next, with grafting and momentum on."""
    order = torch.tensor(order)
    if name == "MBF":
        groupings = [one for one in GROUPINGS if one != "row-major"]  # which knows no units
        options = dict(linear_blocks=data.draw(st.sampled_from(groupings)), damping=0.1, relative_damping=True)
    else:
        options = dict(block_size=None, damping=1e-2, vectors=data.draw(st.sampled_from(["diagonal", "kronecker"])))
    torch.manual_seed(seed)
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(2)]
    state = models[0].state_dict()
    state = state | {key: state[key][order] for key in ("0.weight", "0.bias")}
    models[1].load_state_dict(state | {"2.weight": state["2.weight"][:, order]})
    grafting = data.draw(st.sampled_from([None, "adam"]))
    make = getattr(curvlib, name)
    optimizers = [make(model, 1e-2, momentum=0.9, grafting=grafting, refresh_every=2, **options) for model in models]
    for _ in range(5):
        batch = torch.randn(6, 3, dtype=F64)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(batch).pow(2).sum().backward()
            optimizer.step()
    ours, theirs = (model.state_dict() for model in models)
    for key in ("0.weight", "0.bias"):
        torch.testing.assert_close(ours[key][order], theirs[key], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ours["2.weight"][:, order], theirs["2.weight"], rtol=1e-7, atol=1e-8)


@given(st.sampled_from(["| o/2, i", "| o/2 i/2", "~o/2 | i", "| (o i)~/i"]), COMPOSITIONS, st.data())
@settings(max_examples=40, deadline=None)
def test_permutations_that_keep_chunks_permute_the_update_and_others_do_not(text, composition, data):
    chunks = data.draw(st.permutations([(0, 1), (2, 3), (4, 5)]))
    keeping = torch.tensor([row for chunk in chunks for row in data.draw(st.permutations(chunk))])
    weight, *gradients = normal(data.draw(st.integers(0, 1000)), 4, 6, 4)
    made = recipe(text, composition)

    def last(order):
        return list(steps_of(by(made), weight[order], [gradient[order] for gradient in gradients]))[-1]

    plain = last(torch.arange(6))
    torch.testing.assert_close(last(keeping), plain[keeping], rtol=1e-9, atol=1e-10)
    mixing = torch.tensor([1, 2, 3, 4, 5, 0])
    rows = "(o i)" in text  # chunks of one row each: every permutation of rows keeps them
    assert torch.allclose(last(mixing), plain[mixing]) == rows


@given(st.data(), COMPOSITIONS, EXPONENTS, st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_a_large_absolute_damping_leaves_sgd_scaled_by_its_power(data, composition, exponent, seed):
    """Each of k factors tends to λ^-p (independent, trace) or λ^(-p/k) (power mean), block by block."""
    sizes = data.draw(axis_sizes(axes=data.draw(st.sampled_from([("c",), ("o", "i"), ("o", "i", "k1")]))))
    text = data.draw(partition_texts(sizes))
    weight, gradient = normal(seed, 2, *sizes.values())
    damping = 1e10
    made = recipe(text, composition, exponent, damping)
    layout = curvlib.Partition(text).layout(sizes)
    active = [
        len(region.factors) if composition == "independent" else sum(one.size > 1 for one in region.factors) or 1
        for region in layout.regions
    ]
    assume(composition == "power-mean" or len(set(active)) == 1)  # otherwise regions differ in their power
    power = exponent * (1 if composition == "power-mean" else active[0])
    (step,) = steps_of(by(made, lr=damping**power), weight, [gradient])
    # the weight itself swallows what lies below its own rounding; the relative difference is λmax(F)/λ
    torch.testing.assert_close(step, -gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", ["separate", "merged", "inputs"])
@given(EXPONENTS, st.sampled_from([None, 2]), st.sampled_from([None, 0.9]), st.booleans(), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_shampoos_damping_counts_with_its_exponent(kernels, exponent, block, beta, heavy, seed):
    """Of k factors each has λ^(-p/k): whatever k, the step tends to λ^-p times heavy-ball (or EMA) SGD."""
    damping, shapes = 1e12, [(3,), (4, 3), (2, 3, 2), (2, 3, 2, 2)]
    parameters = [nn.Parameter(normal(seed, *shape)) for shape in shapes]
    expected = [parameter.detach().clone() for parameter in parameters]
    options = dict(beta=beta, grafting=None, relative_damping=False, vectors="kronecker", refresh_every=1)
    optimizer = curvlib.Shampoo(
        parameters,
        0.1 * damping**exponent,
        damping=damping,
        exponent=exponent,
        kernels=kernels,
        block_size=block,
        heavy_ball=heavy,
        **options,
    )
    average = [torch.zeros_like(one) for one in expected]
    for step in range(3):
        for number, parameter in enumerate(parameters):
            parameter.grad = normal(seed + step + 1, *shapes[number])
            average[number] = 0.9 * average[number] + (1.0 if heavy else 0.1) * parameter.grad
            expected[number] -= 0.1 * average[number] / (1 if heavy else 1 - 0.9 ** (step + 1))
        optimizer.step()
    for parameter, weight in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-8, atol=1e-8)


@given(
    st.sampled_from(["... |", "o | i", "| o, i", "~o | i", "| o/2, i", "| o/2 i/2", "| [o], [i]"]),
    st.sampled_from([("power-mean", 0.5), ("power-mean", 1.0), ("power-mean", 0.25), ("trace", 1.0), ("trace", 0.5)]),
    st.sampled_from(["trace", "layer", "largest"]),
    st.floats(-3, 3),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_scaling_the_loss_scales_the_direction_as_the_exponent_says(text, form, relative, scale, seed):
    """The direction is curvature^-p g and curvature is quadratic in g: with a relative damping it scales like s^(1-2p)."""
    composition, exponent = form
    root = Root(exponent, Damping(1e-2, relative))
    made = Recipe(text, Moment(composition=composition, beta=0.5), root)
    weight, *gradients = normal(seed, 4, 4, 4)
    size = 10.0**scale
    plain = steps_of(by(made), 0 * weight, gradients)
    scaled = steps_of(by(made), 0 * weight, [size * gradient for gradient in gradients])
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(other / size ** (1 - 2 * exponent), one, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "options", "degree"),
    [
        *[("MBF", dict(linear_blocks=one, grafting=None, relative_damping=True), -1) for one in GROUPINGS],
        ("MBF", dict(grafting="sgd", relative_damping=True), 1),
        ("MBF", dict(grafting="adam", relative_damping=True, eps=0.0), 0),
        ("Shampoo", dict(grafting=None), 0),
        ("Shampoo", dict(grafting=None, exponent=1), -1),
        ("Shampoo", dict(grafting=None, exponent=0.25), 0.5),
        ("Shampoo", dict(grafting="adagrad", grafting_eps=0.0), 0),
        ("Shampoo", dict(grafting="sgd"), 1),
    ],
)
def test_scaling_the_loss_scales_a_methods_step_to_its_degree(name, options, degree):
    weight, *gradients = normal(0, 4, 4, 3)
    make = getattr(curvlib, name)

    def steps(size):
        made = lambda parameters: make(parameters, 1.0, damping=1e-2, refresh_every=1, **options)  # noqa: E731
        return steps_of(made, 0 * weight, [size * gradient for gradient in gradients])

    for one, other in zip(steps(1.0), steps(100.0), strict=True):
        torch.testing.assert_close(other / 100.0**degree, one, rtol=1e-6, atol=1e-8)
