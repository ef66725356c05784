"""LO-FI against dense algebra, the authors' equations in plain numpy lines, and ridge regression; in float64."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from curvlib.filtering import DenseCovariance, Dynamics, ExtendedKalmanFilter, LoFi, LowRankPrecision, Observation

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


sizes = st.tuples(st.integers(1, 12), st.integers(0, 14), st.booleans(), st.integers(0, 1000))


@given(sizes)
@settings(max_examples=60, deadline=None)
def test_low_rank_precision_is_its_dense_matrix(drawn):
    size, memory, spherical, seed = drawn
    belief = low_rank(size, memory, spherical, seed)
    dense = torch.eye(size, dtype=torch.float64) * belief.diagonal + belief.basis @ belief.basis.T
    condition = torch.linalg.cond(dense).item()
    vectors = normal(size, 3, seed=seed + 2)
    assert torch.equal(belief.dense(), belief.dense().T)
    assert_near(belief.dense(), dense, 1.0)
    assert torch.linalg.eigvalsh(belief.dense()).min() > 0
    assert_near(belief.solve(vectors), torch.linalg.solve(dense, vectors), condition)
    assert_near(belief.solve(vectors[:, 0]), torch.linalg.solve(dense, vectors[:, 0]), condition)
    assert_near(belief.variances(), torch.linalg.inv(dense).diagonal(), condition)


@given(sizes, st.floats(0.1, 1.0), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_predict_step_loses_nothing_at_any_memory(drawn, gamma, q):
    size, memory, spherical, seed = drawn
    belief = low_rank(size, memory, spherical, seed)
    covariance = gamma**2 * torch.linalg.inv(belief.dense()) + q * torch.eye(size, dtype=torch.float64)
    moved = belief.predicted(gamma, q)
    assert moved.basis.shape == belief.basis.shape
    assert moved.diagonal.shape == belief.diagonal.shape
    condition = torch.linalg.cond(belief.dense()).item() * torch.linalg.cond(covariance).item()
    assert_near(moved.dense(), torch.linalg.inv(covariance), condition)
    dense = DenseCovariance(torch.linalg.inv(belief.dense())).predicted(gamma, q)
    assert_near(dense.dense(), torch.linalg.inv(covariance), condition)


@given(sizes, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_an_update_steps_exactly_and_keeps_the_best_columns_and_the_diagonal(drawn, count):
    size, memory, spherical, seed = drawn
    belief = low_rank(size, memory, spherical, seed)
    rows, residual = normal(count, size, seed=seed + 3), normal(count, seed=seed + 4)
    after, step = belief.conditioned(rows, residual)
    exact = belief.dense() + rows.T @ rows
    condition = torch.linalg.cond(exact).item()
    assert_near(step, torch.linalg.solve(exact, rows.T @ residual), condition)
    wide = torch.cat([belief.basis, rows.T], 1)
    values = F.pad(torch.linalg.svdvals(wide), (0, memory + count)).square()
    lost = wide @ wide.T - after.basis @ after.basis.T
    kept = F.pad(torch.linalg.svdvals(after.basis).square(), (0, memory + 1))[:memory]
    assert_near(F.pad(kept, (0, 1)), F.pad(values[:memory], (0, 1)), 1.0 + size)
    assert_near(
        torch.linalg.matrix_norm(lost, 2).view(1), values[memory].view(1), size * values[0].item()
    )  # Eckart-Young
    grown = belief.diagonal + (0.0 if spherical else lost.diagonal())
    assert_near(after.diagonal.expand(size), grown.expand(size), size * values[0].item())
    if not spherical:
        assert_near(after.dense().diagonal(), exact.diagonal(), size)
    if memory >= size:
        assert_near(after.dense(), exact, size)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(
    ("likelihood", "dynamics"),
    [
        ("gaussian", Dynamics()),
        ("gaussian", MOVING),
        ("gaussian", Dynamics(0.95, 0.02, inflation=0.1, kind="simple")),
        ("gaussian", Dynamics(0.95, 0.02, inflation=0.1, kind="hybrid")),
        ("gaussian", Dynamics(0.9, steady_state=True)),
        ("categorical", MOVING),
        ("bernoulli", MOVING),
    ],
    ids=repr,
)
def test_with_all_the_memory_lofi_is_the_dense_filter(likelihood, dynamics, spherical):
    observation = Observation(likelihood, variance=0.5, adaptive=likelihood == "gaussian")
    models = network(), network()
    size = sum(one.numel() for one in models[0].parameters())
    shared = dict(prior_variance=0.5, dynamics=dynamics, observation=observation)
    lofi = LoFi(models[0], memory=size, spherical=spherical, **shared)
    dense = ExtendedKalmanFilter(models[1], **shared)
    steps, condition = 20, 1.0
    for step in range(steps):
        batch = examples(likelihood, step, count=1 + step % 3)
        lofi.step(*batch)
        dense.step(*batch)
        condition = max(condition, torch.linalg.cond(dense.belief.matrix).item())
    assert_near(lofi.mean, dense.mean, condition, steps)
    assert_near(lofi.belief.dense(), dense.belief.dense(), condition, steps)
    assert_near(lofi.noise.view(1), dense.noise.view(1), condition, steps * size)
    for mine, other in zip(lofi.predictive(batch[0]), dense.predictive(batch[0]), strict=True):
        assert_near(mine, other, condition, steps)
    with torch.no_grad():
        assert torch.equal(models[0](batch[0]), torch.func.functional_call(models[0], lofi._named(lofi.mean), batch[0]))
    assert torch.equal(nn.utils.parameters_to_vector(models[0].parameters()), lofi.mean)


@pytest.mark.parametrize("kind", ["bayesian", "simple", "hybrid"])
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "bernoulli"])
def test_the_dense_filter_is_the_textbooks(likelihood, kind):
    model, gamma, q, alpha, eps, size = network(1), 0.97, 0.01, 0.2, 1e-3, 26
    dynamics = Dynamics(gamma, q, inflation=alpha, kind=kind)
    ekf = ExtendedKalmanFilter(model, prior_variance=2.0, dynamics=dynamics, observation=Observation(likelihood, 0.3))
    reference, eye = network(1), torch.eye(size, dtype=torch.float64)
    mean = prior = nn.utils.parameters_to_vector(reference.parameters()).detach()
    precision, eta = eye / 2, 0.5

    def outputs(theta, inputs):
        w, b, v, c = theta[:12].view(4, 3), theta[12:16], theta[16:24].view(2, 4), theta[24:]
        z = torch.tanh(inputs @ w.T + b) @ v.T + c
        return {"gaussian": z, "categorical": z.softmax(-1), "bernoulli": z.sigmoid()}[likelihood]

    for step in range(10):
        inputs, labels = examples(likelihood, step, count=2)
        ekf.step(inputs, labels)
        precision = (precision + (0.0 if kind == "simple" else alpha * eta) * eye) / (1 + alpha)
        if kind == "bayesian":
            mean = mean + torch.linalg.solve(precision, alpha * eta / (1 + alpha) * (prior - mean))
        mean, prior, eta = gamma * mean, gamma * prior, eta / (gamma**2 + q * eta)
        covariance = gamma**2 * torch.linalg.inv(precision) + q * eye
        target = F.one_hot(labels, 2).double() if likelihood == "categorical" else labels
        h = outputs(mean, inputs)
        noise = torch.zeros(4, 4, dtype=torch.float64)
        for row in range(2):
            p = h[row]
            noise[2 * row : 2 * row + 2, 2 * row : 2 * row + 2] = {
                "gaussian": 0.3 * torch.eye(2, dtype=torch.float64),
                "categorical": torch.diag(p) - torch.outer(p, p) + eps * torch.eye(2, dtype=torch.float64),
                "bernoulli": torch.diag(p * (1 - p)) + eps * torch.eye(2, dtype=torch.float64),
            }[likelihood]
        jacobian = torch.autograd.functional.jacobian(lambda theta, rows=inputs: outputs(theta, rows).reshape(-1), mean)
        innovation = jacobian @ covariance @ jacobian.T + noise
        gain = covariance @ jacobian.T @ torch.linalg.inv(innovation)
        mean = mean + gain @ (target - h).reshape(-1)
        precision = torch.linalg.inv(covariance) + jacobian.T @ torch.linalg.inv(noise) @ jacobian
    condition = torch.linalg.cond(precision).item() / eps
    assert_near(ekf.mean, mean, condition)
    assert_near(ekf.belief.dense(), precision, condition)
    expected, spread = ekf.predictive(inputs)
    assert_near(expected, outputs(mean, inputs), condition)
    jacobian = torch.autograd.functional.jacobian(lambda theta: outputs(theta, inputs[:1]).reshape(-1), mean)
    p = outputs(mean, inputs[:1])[0]
    noise = {"gaussian": 0.3 + 0 * p, "categorical": p + eps, "bernoulli": p * (1 - p) + eps}[likelihood].diag()
    noise = noise - torch.outer(p, p) if likelihood == "categorical" else noise
    assert_near(spread[0], jacobian @ torch.linalg.inv(precision) @ jacobian.T + noise, condition)


def authors_step(m0, m, w, eta, ups, jacobian, noise, error, gamma, q, alpha, spherical):
    """Inflation, predict and update as the paper and its authors have them, up to the names; ``error`` is of the mean."""
    memory = w.shape[1]
    w = w / np.sqrt(1 + alpha)
    if spherical:
        g = np.linalg.pinv(np.eye(memory) + w.T @ w / eta)
        m = m + alpha / (1 + alpha) * ((m0 - m) - w / eta @ g @ w.T @ (m0 - m))
        m0, m, denominator = gamma * m0, gamma * m, gamma**2 + q * eta
        c = np.linalg.pinv(np.eye(memory) + q / denominator * w.T @ w)
        w, eta = gamma / denominator * w @ np.linalg.cholesky(c), eta / denominator
        ups = np.full_like(ups, eta)
    else:
        ups = ups / (1 + alpha) + alpha * eta / (1 + alpha)
        g = np.linalg.pinv(np.eye(memory) + w.T @ (w / ups[:, None]))
        k = 1 / ups * ((m0 - m) - w @ g @ (w / ups[:, None]).T @ (m0 - m))
        m0, m, eta_now = gamma * m0, gamma * (m + alpha * eta / (1 + alpha) * k), eta
        eta, moved = eta_now / (gamma**2 + q * eta_now), 1 / (gamma**2 / ups + q)
        ratio = (moved / ups)[:, None]
        c = np.linalg.pinv(np.eye(memory) + q * w.T @ (w * ratio))
        w, ups = gamma * ratio * w @ np.linalg.cholesky(c), moved
    h, r = jacobian(m), noise(m)
    a = np.linalg.inv(np.linalg.cholesky(r)).T
    wide = np.hstack([w, h.T @ a])
    g = np.linalg.pinv(np.eye(wide.shape[1]) + wide.T @ (wide / ups[:, None]))
    k = h.T @ a @ a.T / ups[:, None] - wide / ups[:, None] @ g @ (wide / ups[:, None]).T @ h.T @ a @ a.T
    m = m + k @ error(m_before := m)
    assert m_before is not m
    u, s, _ = np.linalg.svd(wide, full_matrices=False)
    if not spherical:
        ups = ups + ((u * s)[:, memory:] ** 2).sum(1)
    return m0, m, (u * s)[:, :memory], eta, ups


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("memory", [1, 3, 5])
def test_lofi_follows_the_authors_equations(memory, likelihood, spherical):
    classes, size, gamma, q, alpha = 3, 4, 0.98, 0.01, 0.05
    observation = Observation(likelihood, 0.4)
    initial, scales = normal(classes * size), np.array([1.0, 1.5, 2.2])  # equal scales leave W a choice: ties
    lofi = LoFi(
        lambda theta, inputs: inputs @ theta.view(classes, size).T * torch.from_numpy(scales),
        initial,
        prior_variance=0.5,
        memory=memory,
        spherical=spherical,
        dynamics=Dynamics(gamma, q, inflation=alpha),
        observation=observation,
    )
    m0 = m = initial.numpy()
    w, eta, ups = np.zeros((len(m), memory)), 2.0, np.full(len(m), 2.0)
    for step in range(12):
        x, y = normal(1, size, seed=step), normal(1, classes, seed=50 + step)
        label, row = torch.tensor([step % classes]), x.numpy()[0]

        def mean(theta, row=row):
            z = scales * (theta.reshape(classes, size) @ row)
            return np.exp(z) / np.exp(z).sum() if likelihood == "categorical" else z

        def slope(theta, mean=mean):
            p = mean(theta)
            return np.diag(p) - np.outer(p, p) if likelihood == "categorical" else np.eye(classes)

        def noise(theta, slope=slope):
            return slope(theta) + 1e-3 * np.eye(classes) if likelihood == "categorical" else 0.4 * np.eye(classes)

        def jacobian(theta, slope=slope, row=row):
            return np.kron(slope(theta) * scales, row)

        target = np.eye(classes)[label.item()] if likelihood == "categorical" else y[0].numpy()
        m0, m, w, eta, ups = authors_step(
            m0,
            m,
            w,
            eta,
            ups,
            jacobian,
            noise,
            lambda theta, t=target, h=mean: t - h(theta),
            gamma,
            q,
            alpha,
            spherical,
        )
        lofi.step(x, label if likelihood == "categorical" else y)
    expected = torch.from_numpy(np.diag(ups) + w @ w.T)
    condition = torch.linalg.cond(expected).item() * (1e3 if likelihood == "categorical" else 1.0)
    assert_near(lofi.mean, torch.from_numpy(m), condition, 12)
    assert_near(lofi.belief.dense(), expected, condition, 12)
    assert lofi.prior_precision == pytest.approx(eta, rel=100 * U)
    assert_near(lofi.prior_mean, torch.from_numpy(m0), 1.0, 12)


@given(st.integers(1, 8), st.integers(1, 30), st.integers(1, 4), st.floats(0.01, 10), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_on_a_linear_model_both_filters_are_ridge_regression(size, count, batch, variance, seed):
    inputs, observed = normal(count, size, seed=seed), normal(count, seed=seed + 1)
    shared = dict(prior_variance=3.0, observation=Observation(variance=variance))
    filters = (
        ExtendedKalmanFilter(linear, torch.zeros(size).double(), **shared),
        LoFi(linear, torch.zeros(size).double(), memory=size, **shared),
    )
    precision = inputs.T @ inputs / variance + torch.eye(size, dtype=torch.float64) / 3.0
    ridge = torch.linalg.solve(precision, inputs.T @ observed / variance)
    condition = torch.linalg.cond(precision).item()
    for one in filters:
        for rows in range(0, count, batch):
            one.step(inputs[rows : rows + batch], observed[rows : rows + batch])
        assert_near(one.mean, ridge, condition, count)
        assert_near(one.belief.dense(), precision, condition, count)
        assert one.examples == count
        assert one.updates == math.ceil(count / batch)


def test_without_memory_the_diagonal_filter_remains():
    model = network()
    lofi = LoFi(model, memory=0, prior_variance=0.5)
    inputs, observed = examples("gaussian", 0)
    jacobian = torch.autograd.functional.jacobian(
        lambda *values: torch.func.functional_call(
            model, dict(zip(dict(model.named_parameters()), values, strict=True)), inputs
        ),
        tuple(one.detach() for one in model.parameters()),
    )
    squares = torch.cat([one.reshape(2, -1) for one in jacobian], 1).square().sum(0)
    lofi.step(inputs, observed)
    assert lofi.belief.basis.shape == (26, 0)
    assert_near(lofi.belief.diagonal, 2.0 + squares, 10.0)


def test_steady_state_keeps_the_prior():
    lofi = LoFi(
        linear, normal(5), prior_variance=0.3, memory=2, spherical=True, dynamics=Dynamics(0.9, steady_state=True)
    )
    for step in range(50):
        lofi.step(normal(1, 5, seed=step), normal(1, seed=step))
    assert lofi.prior_precision == pytest.approx(1 / 0.3, rel=100 * U)
    assert lofi.belief.diagonal.item() == pytest.approx(1 / 0.3, rel=100 * U)


def test_adaptive_noise_is_the_running_mean_with_a_floor():
    observation = Observation(adaptive=True, variance=7.0)
    lofi = LoFi(linear, torch.zeros(3).double(), memory=3, observation=observation)
    squares: list[torch.Tensor] = []
    for step in range(6):
        inputs, observed = normal(2, 3, seed=step), normal(2, seed=50 + step)
        before = lofi.noise.clone(), lofi.belief.dense()
        lofi.step(inputs, observed)
        assert_near(lofi.belief.dense(), before[1] + inputs.T @ inputs / before[0], 1e3)
        squares += list((observed - inputs @ lofi.mean).square())
        assert_near(lofi.noise.view(1), torch.stack(squares).mean().view(1), 10.0)
    exact = LoFi(linear, torch.zeros(3).double(), memory=3, observation=observation)
    exact.step(normal(2, 3), torch.zeros(2).double())
    assert exact.noise.item() == 1e-6


def test_settings_may_be_callables_of_the_update():
    seen = []
    dynamics = Dynamics(gamma=lambda update: seen.append(update) or 0.5 ** (update + 1))
    lofi = LoFi(linear, torch.ones(2).double(), memory=1, dynamics=dynamics)
    for _ in range(3):
        lofi.step(torch.zeros(1, 2).double(), torch.zeros(1).double())
    assert seen == [0, 1, 2]
    assert_near(lofi.mean, torch.full((2,), 0.5**6).double(), 1.0)


def test_samples_have_the_belief_as_their_covariance():
    for belief in (
        low_rank(4, 2),
        low_rank(4, 2, spherical=True),
        DenseCovariance(torch.linalg.inv(low_rank(4, 2).dense())),
    ):
        draws = belief.sample(200_000, generator(3))
        covariance = torch.linalg.inv(belief.dense())
        error = draws.T @ draws / len(draws) - covariance
        assert (
            error.abs().max() <= 6 * math.sqrt(2 / len(draws)) * covariance.diagonal().max()
        )  # six standard deviations
        assert torch.equal(draws, belief.sample(200_000, generator(3)))


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
    for one in (LoFi(nn.Linear(3, 1), memory=2), ExtendedKalmanFilter(nn.Linear(3, 1))):
        before = one.mean.clone()
        with pytest.raises(FloatingPointError, match="nothing was changed"):
            one.step(torch.full((1, 3), 1e30), torch.zeros(1, 1))
        assert torch.equal(one.mean, before)
    broken = LoFi(lambda theta, inputs: inputs @ theta.log().unsqueeze(1), torch.tensor([-1.0]))
    with pytest.raises(FloatingPointError, match="outputs or their Jacobian are not finite"):
        broken.step(torch.ones(1, 1), torch.zeros(1))
