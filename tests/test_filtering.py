"""LO-FI and the dense filter against plain lines, the authors' equations and ridge regression."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from curvlib.filtering import Dynamics, ExtendedKalmanFilter, LoFi, Observation
from tests.filters import MOVING, U, assert_near, examples, linear, network, normal


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
    m = m + k @ error(m)
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
    assert torch.linalg.eigvalsh(lofi.belief.dense()).min() > 0
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
