"""Matrix roots and their gradients against eigendecompositions, Lyapunov equations and listed coefficients."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import curvlib
from curvlib import (
    CurvatureOptimizer,
    Damping,
    DecorrelatedNorm,
    Moment,
    Recipe,
    Root,
    matrix_inverse_sqrt,
    matrix_sqrt,
)
from curvlib.differentiable import pade_coefficients, solve_lyapunov, taylor_coefficients

F64 = torch.float64


def spd(size, condition, batch=(), seed=0, dtype=F64):
    """Matrices of a given condition number, with a log-uniform spectrum below one."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*batch, size, size, dtype=F64, generator=generator))[0]
    exponents = torch.linspace(0, 1, size, dtype=F64) if size > 1 else torch.zeros(1, dtype=F64)
    return ((q * condition**-exponents) @ q.mT).to(dtype)


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values[..., None, :] ** exponent) @ vectors.mT


def in_z(coefficients):
    """Σ c_k (1 - z)^k in powers of z, over its constant."""
    result, power = [Fraction(0)] * len(coefficients), [Fraction(1)]
    for c in coefficients:
        for place, one in enumerate(power):
            result[place] += c * one
        power = [a - b for a, b in zip([*power, Fraction(0)], [Fraction(0), *power], strict=True)]
    return tuple(one / result[0] for one in result)


def test_coefficients():
    """Those that the authors' code computes with arbitrary precision."""
    half = [Fraction(*one) for one in [(1, 1), (-1, 2), (-1, 8), (-1, 16), (-5, 128), (-7, 256), (-21, 1024)]]
    assert taylor_coefficients(6) == tuple(half)
    p, q = (in_z(one) for one in pade_coefficients(5))
    assert p == tuple(Fraction(*one) for one in [(1, 1), (-11, 4), (11, 4), (-77, 64), (55, 256), (-11, 1024)])
    assert q == tuple(Fraction(*one) for one in [(1, 1), (-9, 4), (7, 4), (-35, 64), (15, 256), (-1, 1024)])


@pytest.mark.parametrize("degree", range(1, 9))
def test_pade_agrees_with_the_series_to_twice_its_degree(degree):
    p, q = (in_z(one) for one in pade_coefficients(degree))
    a = taylor_coefficients(2 * degree)
    for order in range(2 * degree + 1):
        product = sum(q[k] * a[order - k] for k in range(min(order, degree) + 1))
        assert product == (p[order] if order <= degree else 0)


def scalar(method, degree, z):
    """What a method makes of the eigenvalue 1 - z of a matrix of norm one."""
    if method == "taylor":
        return sum(float(a) * z**k for k, a in enumerate(taylor_coefficients(degree)))
    p, q = (sum(float(a) * (1 - z) ** k for k, a in enumerate(one)) for one in pade_coefficients(degree))
    return p / q


def condition_of_denominator(degree, x):
    """κ(Q), at most 4^m/(2m + 1): what a Cholesky solve multiplies its rounding by."""
    q = sum(float(a) * x**k for k, a in enumerate(pade_coefficients(degree)[1]))
    return float((q.amax(-1) / q.amin(-1)).max())


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(["pade", "taylor"]),
    degree=st.sampled_from([1, 3, 5, 10, None]),
    size=st.integers(1, 6),
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
    condition=st.sampled_from([1.0, 10.0, 1e3, 1e6]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, F64]),
)
def test_roots_are_their_polynomials_of_the_eigenvalues(method, degree, size, batch, condition, scale, dtype):
    matrix = scale * spd(size, condition, batch, dtype=dtype)
    values, vectors = torch.linalg.eigh(matrix.double())
    norm = torch.linalg.matrix_norm(matrix.double())[..., None]
    known = {"pade": 5, "taylor": 10}[method] if degree is None else degree
    approximate = scalar(method, known, 1 - values / norm)
    root, inverse = matrix_sqrt(matrix, method, degree), matrix_inverse_sqrt(matrix, method, degree)
    wanted = (vectors * (approximate * norm.sqrt())[..., None, :]) @ vectors.mT
    # sums of positive terms in Padé; in Taylor all terms are below one
    slack = 30 * size * known * torch.finfo(dtype).eps
    worst = condition_of_denominator(known, values / norm) if method == "pade" else 1.0
    assert ((root.double() - wanted).norm() <= slack * worst * wanted.norm()).all()
    wanted = (vectors * (1 / approximate / norm.sqrt())[..., None, :]) @ vectors.mT
    ratio = float((approximate.amax(-1) / approximate.amin(-1)).max())  # the condition number of what is inverted
    assert ((inverse.double() - wanted).norm() <= slack * worst * ratio * wanted.norm()).all()


@pytest.mark.parametrize("method", ["pade", "taylor"])
def test_errors_shrink_with_the_degree(method):
    matrix = spd(8, 100.0)
    exact = power(matrix, 0.5)
    errors = [float((matrix_sqrt(matrix, method, degree) - exact).norm() / exact.norm()) for degree in (1, 2, 4, 8, 16)]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < (1e-3 if method == "pade" else 0.1)


@pytest.mark.parametrize("method", ["pade", "taylor", "eigh"])
def test_a_zero_eigenvalue_is_damped(method):
    """Padé [5/5] takes it for ‖A‖^½/11 and Taylor to order 10 for Σ a_k ‖A‖^½."""
    matrix = torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
    root = matrix_sqrt(matrix, method)
    expected = {"pade": 1 / 11, "taylor": float(sum(taylor_coefficients(10))), "eigh": 0.0}[method]
    assert abs(root[1, 1].item() - expected) < 1e-12
    if method == "pade":
        assert abs(matrix_inverse_sqrt(matrix, method)[1, 1].item() - 11) < 1e-10
    assert torch.isfinite(matrix_sqrt(torch.zeros(2, 2), method)).all()


@pytest.mark.parametrize("function", [matrix_sqrt, matrix_inverse_sqrt])
def test_gradients_of_the_exact_root(function):
    raw = spd(4, 20.0, (2,)).requires_grad_()

    def symmetric(a):
        return function((a + a.mT) / 2, "eigh")

    assert torch.autograd.gradcheck(symmetric, (raw,))


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_lyapunov(condition):
    root, right = spd(5, condition, (3,)), torch.randn(3, 5, 5, dtype=F64)
    right = right + right.mT
    eye = torch.eye(5, dtype=F64)
    found = {"eigh": solve_lyapunov(root, right, exact=True), "newton": solve_lyapunov(root, right, steps=25)}
    for place in range(3):
        kron = torch.kron(root[place], eye) + torch.kron(eye, root[place])
        wanted = torch.linalg.solve(kron, right[place].flatten()).view(5, 5)
        for one in found.values():
            torch.testing.assert_close(one[place], wanted, rtol=0, atol=100 * condition * 2e-16 * float(wanted.norm()))
    coarse = [float((solve_lyapunov(root, right, steps=n) - found["eigh"]).norm()) for n in (2, 6, 12, 18)]
    assert all(after < before for before, after in pairwise(coarse)) or coarse[-1] < 1e-10


@pytest.mark.parametrize("method", ["pade", "taylor"])
@pytest.mark.parametrize("inverse", [False, True])
def test_gradients_are_those_of_the_root_not_of_the_polynomial(method, inverse):
    """Exact but for the root that stands in them, whose error shrinks with the degree."""
    function = matrix_inverse_sqrt if inverse else matrix_sqrt
    weight = torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    errors = []
    for degree in (2, 5, 12) if method == "pade" else (4, 16, 40):
        gradients = []
        for how, options in (("eigh", {}), (method, {"degree": degree, "backward_steps": 20})):
            matrix = spd(6, 5.0).requires_grad_()
            (function(matrix, how, **options) * weight).sum().backward()
            gradients.append(matrix.grad)
        errors.append(float((gradients[1] - gradients[0]).norm() / gradients[0].norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < (1e-7 if method == "pade" else 1e-2)


def test_batched_is_looped():
    matrix = spd(4, 50.0, (5,)).requires_grad_()
    for function in (matrix_sqrt, matrix_inverse_sqrt):
        for method in ("pade", "taylor", "eigh"):
            together = function(matrix, method)
            (gradient,) = torch.autograd.grad(together.square().sum(), matrix)
            for place in range(5):
                alone = matrix[place].detach().requires_grad_()
                one = function(alone, method)
                (own,) = torch.autograd.grad(one.square().sum(), alone)
                torch.testing.assert_close(together[place], one, rtol=1e-12, atol=1e-13)
                torch.testing.assert_close(gradient[place], own, rtol=1e-11, atol=1e-12)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match=r"matrix must be \[..., f, f\]"):
        matrix_sqrt(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="floating point"):
        matrix_sqrt(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="method"):
        matrix_sqrt(torch.eye(2), "newton")
    with pytest.raises(ValueError, match="degree"):
        matrix_inverse_sqrt(torch.eye(2), degree=0)
    matrix = spd(3, 10.0).requires_grad_()
    (first,) = torch.autograd.grad(matrix_sqrt(matrix).square().sum(), matrix, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    assert matrix_inverse_sqrt(torch.full((2, 2), torch.nan)).isnan().any()


# -- solvers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("partition", "composition"), [("| o, i", "independent"), ("| o, i", "power-mean"), ("o | i", "trace")]
)
@pytest.mark.parametrize("solver", ["pade", "taylor"])
def test_solvers_of_the_engine(solver, partition, composition):
    """Strongly damped factors, against eigh: to the methods' own accuracy."""
    found = {}
    for name in (solver, "eigh"):
        torch.manual_seed(0)
        model = nn.Linear(6, 5, bias=False).double()
        root = Root(0.5, Damping(1.0, "trace"), solver=name, tolerance=0.5)
        optimizer = CurvatureOptimizer(model, Recipe(partition, Moment(composition=composition), root), lr=1.0)
        before = model.weight.detach().clone()
        model.weight.grad = torch.randn(5, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        found[name] = before - model.weight.detach()
        assert not any(optimizer.health().kept.values())
    error = (found[solver] - found["eigh"]).norm() / found["eigh"].norm()
    assert 0 < error < 0.1


def test_an_ill_conditioned_factor_is_reported_and_keeps_its_last_root():
    model = nn.Linear(6, 5, bias=False).double()
    recipe = Recipe("| (...)", Moment(), Root(0.5, Damping(1e-9), solver="pade", tolerance=0.1))
    optimizer = CurvatureOptimizer(model, recipe, lr=1.0)
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn(5, 6, dtype=F64)
    optimizer.step()
    assert optimizer.health().kept == {"weight": 1}
    torch.testing.assert_close(model.weight.detach(), before - model.weight.grad)  # the identity that it started with


def test_powers_that_they_do_not_take_are_refused():
    model = nn.Linear(3, 2)
    optimizer = CurvatureOptimizer(model, Recipe("| (...)", root=Root(1, 0.1, solver="pade")))
    F.mse_loss(model(torch.ones(2, 3)), torch.zeros(2, 2)).backward()
    with pytest.raises(ValueError, match="solver='pade' does not compute the power -1 of a factor"):
        optimizer.step()


# -- decorrelated batch normalisation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 6), (16, 6, 5), (8, 6, 4, 3)])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_whitened_features(shape, groups):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=F64)
    x = torch.einsum("oc,nc...->no...", torch.randn(6, 6, dtype=F64), x) + 3
    layer = DecorrelatedNorm(6, groups, eps=1e-5, method="eigh", affine=False).double()
    flat = layer(x).movedim(1, 0).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(6, dtype=F64), atol=1e-10, rtol=0)
    covariance = flat @ flat.T / flat.shape[1]
    for group in range(groups):
        rows = slice(group * 6 // groups, (group + 1) * 6 // groups)
        size = 6 // groups
        torch.testing.assert_close(covariance[rows, rows], torch.eye(size, dtype=F64), atol=1e-3, rtol=0)
    for _ in range(200):
        layer(x)
    layer.eval()
    torch.testing.assert_close(layer(x).movedim(1, 0).flatten(1), flat, rtol=1e-6, atol=1e-7)


def test_it_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), DecorrelatedNorm(8, 2), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(256, 5) @ torch.randn(5, 5)
    y = torch.sin(x[:, :1])
    optimizer = curvlib.Adam(model, lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert torch.isfinite(model.eval()(x)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecorrelatedNorm(6, 4), "groups must divide channels=6, got 4"),
        (lambda: DecorrelatedNorm(0), "channels"),
        (lambda: DecorrelatedNorm(6, eps=0.0), "eps"),
        (lambda: DecorrelatedNorm(6)(torch.zeros(2, 5)), r"x must be \[n, 6, ...\]"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("method", ["pade", "taylor", "eigh"])
@pytest.mark.parametrize("function", [matrix_sqrt, matrix_inverse_sqrt])
def test_autocast_and_half_types_change_no_digit(function, method):
    matrix = spd(6, 5.0, (3,), dtype=torch.float32).requires_grad_()

    def both(given):
        root = function(given, method)
        (gradient,) = torch.autograd.grad(root.float().square().sum(), given)
        return root, gradient

    plain = both(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(both(matrix), plain, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other)
    for dtype in (torch.bfloat16, torch.float16):
        half = matrix.detach().to(dtype).requires_grad_()
        wide = half.detach().float().requires_grad_()
        for one, other in zip(both(half), both(wide), strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one.float(), other, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_decorrelated_norm_under_autocast():
    torch.manual_seed(0)
    x, norm = torch.randn(64, 6), DecorrelatedNorm(6)
    wanted = norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), wanted)
        half = norm(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wanted, rtol=0.05, atol=0.05)
