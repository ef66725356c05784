"""Inverse roots by products alone, against eigendecompositions in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import curvlib
from curvlib.newton import inverse_root, largest_eigenvalue, steps_for
from curvlib.roots import solve
from curvlib.solvers import How
from tests.test_differentiable import power, spd

F64 = torch.float64


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 24),
    st.floats(0, 6),
    st.integers(1, 3),
    st.integers(1, 3),
    st.floats(-8, 8),
    st.booleans(),
    st.integers(0, 99),
)
def test_roots_of_any_condition_and_scale(f, log_condition, halvings, count, log_scale, double, seed):
    condition, dtype = 10.0**log_condition if f > 1 else 1.0, F64 if double else torch.float32
    scale = 10.0**log_scale
    matrix = (spd(f, condition, (count,), seed) * scale).to(dtype)
    least = torch.full((count,), scale / condition, dtype=dtype)
    found = inverse_root(matrix, least, halvings)
    wanted = power(matrix, -(0.5**halvings))
    error = (found.double() - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))
    assert (error <= 20 * f * condition * torch.finfo(dtype).eps).all()
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize(("condition", "most"), [(1e2, 8), (1e4, 11), (1e6, 14), (2**23, 15), (2**52, 26)])
def test_so_many_steps_are_enough(condition, most):
    steps = steps_for(condition)
    assert steps <= most + 1
    matrix = spd(12, condition, seed=3)[None]
    if condition <= 1e6:  # beyond, rounding of float64 shows
        least = torch.tensor([1 / condition], dtype=F64)
        exact = power(matrix, -0.5)
        errors = [
            float((inverse_root(matrix, least, 1, n) - exact).norm() / exact.norm())
            for n in (steps, steps - 2, steps - 4)
        ]
        assert errors[0] < 1e-8 < errors[2]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.floats(0, 8), st.integers(0, 99))
def test_the_largest_eigenvalue_from_below(f, log_condition, seed):
    matrix = spd(f, 10.0**log_condition if f > 1 else 1.0, (2,), seed)
    found, wanted = largest_eigenvalue(matrix), torch.linalg.eigvalsh(matrix)[:, -1]
    assert (found <= wanted * (1 + 1e-12)).all()
    assert (found >= 0.9 * wanted).all()
    assert torch.equal(largest_eigenvalue(torch.zeros(2, f, f)), torch.zeros(2))


@pytest.mark.parametrize("power_", [0.5, 0.25, 0.125])
@pytest.mark.parametrize(("largest", "floor"), [(False, None), (False, 0.0), (True, 0.0)])
def test_the_solver_is_the_eigendecomposition(power_, largest, floor):
    matrix, damping = spd(10, 1e3, (4,), seed=1), torch.tensor([1e-2, 1e-3, 0.1, 1.0], dtype=F64)
    matrix[1] = 0  # without signal
    damping = torch.where(torch.arange(4) == 1, torch.zeros(()) if floor is not None else torch.tensor(0.1), damping)
    found, residual = solve(matrix, damping, How(power_, "newton", F64, largest=largest, floor=floor))
    wanted, _ = solve(matrix, damping, How(power_, "eigh", F64, largest=largest, floor=floor))
    tolerance = 2e-2 if largest else 1e-9  # a largest eigenvalue from below damps a little less
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    assert (residual < 1e-8).all()


def test_what_is_not_positive_or_finite_is_a_failure():
    matrix = torch.eye(3).repeat(3, 1, 1)
    matrix[0, 1, 1], matrix[1, 0, 0] = -5.0, torch.nan
    _, residual = solve(matrix, torch.full((3,), 0.1), How(0.5, "newton", torch.float32))
    assert not residual[0] <= 0.1
    assert not residual[1] <= 0.1
    assert residual[2] < 1e-4


@pytest.mark.parametrize("relative", [True, False])
def test_shampoo_by_products_alone(relative):
    """Fifty steps with either solver."""
    found = []
    for solver in ("eigh", "newton"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        recipe = curvlib.Recipe(
            "| ,...",
            curvlib.Moment(beta=0.9, debias=True, composition="power-mean"),
            curvlib.Root(0.5, curvlib.Damping(0.1, "largest" if relative else None), solver=solver),
        )
        optimizer = curvlib.CurvatureOptimizer(model, recipe, lr=1e-2)
        for t in range(50):
            x = torch.randn(8, 5, dtype=F64, generator=torch.Generator().manual_seed(t))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert optimizer.health().ok
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    tolerance = 1e-2 if relative else 1e-8
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)
