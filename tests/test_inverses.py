"""Inverses: every way obeys Cholesky's error law, reads one triangle, and tells what failed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from curvlib import inverses
from curvlib.calibration import KINDS

CPU = KINDS["cpu"]
WAYS = {"by planes": (CPU.planes_count, 9), "at once": (3, 20), "in halves": (3, 130), "LAPACK": (2, CPU.lapack_rows)}


def matrices(n, f, condition, dtype, seed=0):
    """Positive definite matrices and their inverses, in float64."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, f, f, dtype=torch.float64, generator=generator))[0]
    values = condition ** -torch.linspace(0, 1, f, dtype=torch.float64)
    matrix = ((basis * values) @ basis.mT).to(dtype)
    return (matrix + matrix.mT) / 2, (basis / values) @ basis.mT


@given(st.integers(1, 200), st.integers(1, 3), st.floats(0, 4), st.sampled_from([torch.float32, torch.float64]))
@examples(max_examples=60, deadline=None)
def test_the_error_law(f, n, log_condition, dtype):
    matrix, wanted = matrices(n, f, 10**log_condition, dtype)
    found, failed = inverses.inverse(matrix)
    error = (found - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2))
    assert not failed.any()
    assert (error <= 10 * f * 10**log_condition * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("way", WAYS)
def test_every_way(way):
    n, f = WAYS[way]
    matrix, wanted = matrices(n, f, 100.0, torch.float64)
    found, failed = inverses.inverse(matrix)
    assert not failed.any()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, found.mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_positive_definite_is_told_and_harms_no_other(way):
    n, f = WAYS[way]
    matrix, wanted = matrices(n, f, 100.0, torch.float64)
    matrix[1, -1, -1] = -1.0
    found, failed = inverses.inverse(matrix)
    assert failed.nonzero().flatten().tolist() == [1]
    torch.testing.assert_close(found[~failed], wanted[~failed], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", ["at once", "in halves", "LAPACK"])
def test_one_triangle_is_read(way):
    n, f = WAYS[way]
    matrix, wanted = matrices(n, f, 100.0, torch.float64)
    found, failed = inverses.inverse(matrix.tril())
    assert not failed.any()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
