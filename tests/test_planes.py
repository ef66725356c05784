"""Tiny matrices by planes: the same numbers as one by one, and roots that obey the same error law."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import curvlib
from curvlib import planes
from curvlib.calibration import KINDS
from curvlib.roots import solve
from curvlib.solvers import How

B = KINDS["cpu"].planes_count
CPU = torch.device("cpu")
sizes = st.integers(2, KINDS["cpu"].planes_rows)
dtypes = st.sampled_from([torch.float32, torch.float64])


def symmetric(n, f, dtype, seed, condition=100.0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, f, f, dtype=torch.float64, generator=generator))[0]
    values = condition ** -torch.linspace(0, 1, f, dtype=torch.float64)
    return ((basis * values) @ basis.mT).to(dtype)


def vectors(n, f, dtype, seed):
    return torch.randn(n, f, dtype=dtype, generator=torch.Generator().manual_seed(seed + 1))


@given(sizes, dtypes, st.integers(0, 99), st.sampled_from([B, B + 1, 3 * B]))
@examples(max_examples=30, deadline=None)
def test_a_batch_by_planes_holds_the_same_numbers_and_knows_it(f, dtype, seed, n):
    matrix = symmetric(n, f, dtype, seed)
    laid = planes.lay(matrix)
    assert torch.equal(laid, matrix)
    assert laid.stride() == (1, f * n, n)
    assert planes.laid(laid)
    assert not planes.laid(matrix)
    assert planes.laid(laid[1 : B + 1]) == (n > B)
    assert not planes.laid(laid[: B - 1])


def test_identities():
    found = planes.identities((2, B, 3, 3), 0.5, torch.float64)
    assert torch.equal(found, 0.5 * torch.eye(3, dtype=torch.float64).expand(2, B, 3, 3))
    assert planes.laid(found.flatten(0, 1))


@given(sizes, dtypes, st.integers(0, 99))
@examples(max_examples=30, deadline=None)
def test_products_with_vectors(f, dtype, seed):
    matrix, x = symmetric(B, f, dtype, seed), vectors(B, f, dtype, seed)
    found = planes.times(planes.lay(matrix), x)
    wanted = (matrix.double() @ x.double()[:, :, None])[:, :, 0]
    bound = f * torch.finfo(dtype).eps * (matrix.double().abs() @ x.double().abs()[:, :, None])[:, :, 0]
    assert ((found - wanted).abs() <= 2 * bound).all()


@given(sizes, dtypes, st.integers(0, 99), st.booleans(), st.integers(0, 5))
@examples(max_examples=40, deadline=None)
def test_second_moments(f, dtype, seed, tensors, start):
    matrix, x = symmetric(B + 5, f, dtype, seed), vectors(B, f, dtype, seed)
    laid = planes.lay(matrix)
    keep, gain = (torch.tensor(one, dtype=dtype) for one in (0.9, 0.3))
    planes.accumulate(laid[start : start + B], x, *((keep, gain) if tensors else (float(keep), float(gain))))
    wanted = matrix.clone()
    wanted[start : start + B] = keep * wanted[start : start + B] + gain * x[:, :, None] * x[:, None, :]
    torch.testing.assert_close(laid, wanted, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    mine = laid[start : start + B]
    assert torch.equal(mine, mine.mT)


def test_second_moments_hold_no_subnormal_numbers():
    laid = planes.lay(torch.full((B, 3, 3), 2 * torch.finfo(torch.float32).tiny))
    planes.accumulate(laid, torch.zeros(B, 3), 0.25, 1.0)
    assert torch.equal(laid, torch.zeros_like(laid))


@given(sizes, dtypes, st.integers(0, 99), st.floats(0, 4), st.booleans())
@examples(max_examples=40, deadline=None)
def test_inverses_obey_the_error_law_of_cholesky(f, dtype, seed, log_condition, by_planes):
    matrix = symmetric(B, f, dtype, seed, 10**log_condition)
    given_matrix = planes.lay(matrix) if by_planes else matrix
    inverse, failed = planes.inverse(given_matrix)
    wanted = torch.linalg.inv(matrix.double())
    error = (inverse - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))
    assert not failed.any()
    assert (error <= 10 * f * 10**log_condition * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("by_planes", [True, False])
def test_what_has_no_inverse_is_retried_and_kept_alone(by_planes):
    matrix = symmetric(B, 4, torch.float32, 0)
    matrix[3] = -matrix[3]
    matrix[7] = torch.nan
    _, failed = planes.inverse(planes.lay(matrix))
    assert failed.nonzero().flatten().tolist() == [3, 7]
    root, residual = solve(
        planes.lay(matrix) if by_planes else matrix, torch.zeros(B), How(1.0, "cholesky", torch.float32)
    )
    assert residual.isinf().nonzero().flatten().tolist() == [3, 7]
    good = torch.tensor([row for row in range(B) if row not in (3, 7)])
    torch.testing.assert_close(root[good], torch.linalg.inv(matrix[good]), rtol=1e-3, atol=1e-3)


def test_kernels_of_a_convolution_are_their_equations():
    # Enough of them to lie by planes; against (λI + F)^-1 g, kernel by kernel.
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(32, 32, 3, 3, dtype=torch.float64))
    start = weight.detach().clone()
    settings = dict(grafting=None, momentum=0.0, debias=False, relative_damping=False, refresh_every=1)
    optimizer = curvlib.MBF([weight], 1.0, damping=0.1, beta=0.9, **settings)
    factor, moved = torch.zeros(1024, 9, 9, dtype=torch.float64), torch.zeros(1024, 9, dtype=torch.float64)
    for _ in range(4):
        weight.grad = torch.randn_like(weight)
        g = weight.grad.reshape(1024, 9)
        optimizer.step()
        factor = 0.9 * factor + 0.1 * g[:, :, None] * g[:, None, :]
        moved -= torch.linalg.solve(factor + 0.1 * torch.eye(9, dtype=torch.float64), g)
    (name,) = (name for name in optimizer.state[weight] if name.startswith("factor"))
    assert planes.laid(optimizer.state[weight][name])
    torch.testing.assert_close(optimizer.state[weight][name], factor)
    torch.testing.assert_close(weight.detach(), start + moved.view(weight.shape))
