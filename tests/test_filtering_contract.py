"""What a filter promises beyond its equations: checkpoints that resume bitwise, bad input refused in words."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

from curvlib.filtering import DenseCovariance, Dynamics, ExtendedKalmanFilter, LoFi, LowRankPrecision, Observation
from tests.filters import MOVING, examples, linear, network, normal


@pytest.mark.parametrize("kind", [LoFi, ExtendedKalmanFilter])
def test_resumed_equals_uninterrupted(kind):
    shared = dict(dynamics=MOVING, observation=Observation(adaptive=True))
    whole, model = kind(network(), **shared), network(5)
    for step in range(4):
        whole.step(*examples("gaussian", step))
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    file.seek(0)
    resumed = kind(model, **shared)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(whole)
    for step in range(4, 8):
        for one in (whole, resumed, twin):
            one.step(*examples("gaussian", step))
    inputs = examples("gaussian", 9)[0]
    for other in (resumed, twin):
        assert torch.equal(whole.mean, other.mean)
        assert torch.equal(whole.belief.dense(), other.belief.dense())
        assert torch.equal(whole.noise, other.noise)
        assert torch.equal(whole.model(inputs), other.model(inputs))
        assert (whole.examples, whole.updates) == (other.examples, other.updates) == (8, 8)


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
@pytest.mark.parametrize("kind", [LoFi, ExtendedKalmanFilter])
def test_a_step_that_stops_between_its_halves_changes_nothing(kind, error, monkeypatch):
    one, twin = (kind(network(), dynamics=MOVING) for _ in range(2))

    def stop(inputs, observed):
        raise error

    for each in (one, twin):
        each.step(*examples("gaussian", 0))
    with monkeypatch.context() as patch:
        patch.setattr(one, "update", stop)
        with pytest.raises(error):
            one.step(*examples("gaussian", 1))
    assert torch.equal(one.belief.dense(), twin.belief.dense())
    for each in (one, twin):
        each.step(*examples("gaussian", 1))
    assert torch.equal(one.belief.dense(), twin.belief.dense())
    assert torch.equal(one.mean, twin.mean)


@pytest.mark.parametrize("kind", [LoFi, ExtendedKalmanFilter])
def test_a_state_is_a_copy(kind):
    one, other = kind(network()), kind(network(1))
    state = one.state_dict()
    other.load_state_dict(state)
    mean, dense = one.mean.clone(), one.belief.dense()
    for tensor in (state["mean"], state["prior_mean"], *state["belief"].values()):
        tensor.fill_(7.0)
    for each in (one, other):
        assert torch.equal(each.mean, mean)
        assert torch.equal(each.belief.dense(), dense)


def test_foreign_states_are_refused_and_change_nothing():
    lofi = LoFi(network(), memory=3)
    before = lofi.state_dict()
    for state, words in (
        (ExtendedKalmanFilter(network()).state_dict(), "belief"),
        (LoFi(network(), memory=4).state_dict(), r"belief.basis must be \[26, 3\]"),
        (LoFi(network(outputs=1), memory=3).state_dict(), r"mean must be \[26\]"),
        ({"mean": lofi.mean}, "entries"),
    ):
        with pytest.raises(ValueError, match=words):
            lofi.load_state_dict(state)
    assert torch.equal(lofi.belief.dense(), LowRankPrecision(**before["belief"]).dense())


def test_frozen_parameters_stay_and_narrow_ones_have_a_wide_mean():
    model = network().to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    lofi = LoFi(model, memory=2)
    lofi.step(normal(1, 3).bfloat16(), torch.ones(1, 2))
    assert lofi.mean.dtype == torch.float32
    assert len(lofi.mean) == 14
    assert torch.equal(model[0].weight, frozen)
    assert torch.equal(nn.utils.parameters_to_vector(list(model.parameters())[1:]), lofi.mean.bfloat16())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Dynamics(gamma=0), "gamma must be a number above 0"),
        (lambda: Dynamics(gamma=1.5), "gamma must be a number above 0 and up to 1, got 1.5"),
        (lambda: Dynamics(q=-1), "q must be a number from 0, got -1"),
        (lambda: Dynamics(q=0.1, steady_state=True), "q must be 0 with steady_state"),
        (lambda: Dynamics(inflation=math.nan), "inflation must be a number from 0, got nan"),
        (lambda: Dynamics(kind="strong"), "kind must be one of 'bayesian', 'simple', 'hybrid', got 'strong'"),
        (lambda: Observation("poisson"), "likelihood must be one of"),
        (lambda: Observation(variance=0), "variance must be a number above 0"),
        (lambda: Observation("bernoulli", adaptive=True), "adaptive must be False"),
        (lambda: Observation(eps=0.0), "eps must be a number above 0"),
        (lambda: LoFi(network(), memory=-1), "memory must be a whole number from 0, got -1"),
        (lambda: LoFi(network(), memory=2.0), "memory must be a whole number from 0, got 2.0"),
        (lambda: LoFi(network(), spherical="yes"), "spherical must be one of"),
        (lambda: LoFi(network(), prior_variance=0), "prior_variance must be a number above 0, got 0"),
        (lambda: LoFi(network(), prior_variance=lambda _: 1.0), "prior_variance must be a number above 0, got <"),
        (lambda: LoFi(nn.Tanh()), "model must have parameters"),
        (lambda: LoFi("model"), "model must be a module or a function"),
        (lambda: LoFi(linear), "initial must be a vector"),
        (lambda: LoFi(network(), normal(3)), "initial must be None for a module"),
        (lambda: LoFi(linear, torch.tensor([math.inf])), "parameters must be finite"),
        (lambda: LowRankPrecision(torch.ones(2), torch.ones(3, 1)), "diagonal and basis must be"),
        (lambda: LowRankPrecision(torch.tensor([1.0, -2.0]), torch.ones(2, 1)), "diagonal must be positive, got -2"),
        (lambda: LoFi(network().float(), prior_variance=1e60), "diagonal must be positive, got 0"),
        (lambda: DenseCovariance(torch.ones(2, 3)), r"matrix must be \[P, P\], got \[2, 3\]"),
    ],
)
def test_bad_settings_are_refused_in_words(build, words):
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize("kind", [LoFi, ExtendedKalmanFilter])
@pytest.mark.parametrize(
    ("likelihood", "change", "error", "words"),
    [
        ("gaussian", lambda x, y: (x, y.fill_(math.nan)), ValueError, r"observations must be finite.* rows \[0, 1\]"),
        ("gaussian", lambda x, y: (x.index_fill(0, torch.tensor(1), math.inf), y), ValueError, r"inputs .* rows \[1\]"),
        ("gaussian", lambda x, y: (x, y[:1]), ValueError, "same number of rows"),
        ("gaussian", lambda x, y: (x[:0], y[:0]), ValueError, "same number of rows from 1"),
        ("gaussian", lambda x, y: (x, y[:, :1]), ValueError, r"shape \[2, 2\], got \[2, 1\]"),
        ("gaussian", lambda x, y: (x, y * 1e308), FloatingPointError, "not finite"),
        ("categorical", lambda x, y: (x, y + 5), ValueError, "class numbers from 0 to 1"),
        ("categorical", lambda x, y: (x, y.double()), ValueError, "integer dtype"),
        ("bernoulli", lambda x, y: (x, y + 1.5), ValueError, r"\[0, 1\]"),
    ],
)
def test_bad_examples_are_refused_and_change_nothing(kind, likelihood, change, error, words):
    model = network()
    one = kind(model, dynamics=MOVING, observation=Observation(likelihood, 1e-3))
    one.step(*examples(likelihood, 0, 2))
    before, weights = one.state_dict(), nn.utils.parameters_to_vector(model.parameters()).clone()
    inputs, observed = examples(likelihood, 1, 2)
    with pytest.raises(error, match=words):
        one.step(*change(inputs, observed + 1 if words == "not finite" else observed))
    after = one.state_dict()
    beliefs = before.pop("belief"), after.pop("belief")
    assert all(torch.equal(beliefs[0][name], beliefs[1][name]) for name in beliefs[0])
    assert all(torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])) for name in before)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), weights)


def test_what_overflows_is_said_in_words():
    for one in (LoFi(nn.Linear(3, 1).double(), memory=2), ExtendedKalmanFilter(nn.Linear(3, 1).double())):
        before = one.mean.clone()
        with pytest.raises(FloatingPointError, match="nothing was changed"):
            one.step(torch.full((1, 3), 1e200, dtype=torch.float64), torch.zeros(1, 1))
        assert torch.equal(one.mean, before)
    broken = LoFi(lambda theta, inputs: inputs @ theta.log().unsqueeze(1), torch.tensor([-1.0]))
    with pytest.raises(FloatingPointError, match="outputs or their Jacobian are not finite"):
        broken.step(torch.ones(1, 1), torch.zeros(1))


def test_columns_that_are_not_used_stay_zero():
    lofi = LoFi(network().float(), memory=20, prior_variance=0.3, observation=Observation(variance=0.01))
    for step in range(5):
        lofi.step(normal(1, 3, seed=step).float(), normal(1, 2, seed=step).float())
    norms = lofi.belief.basis.norm(dim=0)
    assert (norms[:10] > 0).all()
    assert (norms[10:] == 0).all()
    assert (norms[:-1] >= norms[1:] * (1 - 1e-6)).all()
