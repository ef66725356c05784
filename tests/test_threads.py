"""Batches shared out to threads: the same rows, in the same order, and nothing left behind."""

from __future__ import annotations

import threading

import pytest
import torch

from curvlib.threads import shared


@pytest.fixture
def threads():
    """Three threads of torch, and what there was before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def told(seen):
    """A function of batches that tells who called it, with how many rows and on how many threads of torch."""

    def function(matrix, other):
        seen.append((threading.get_ident(), len(matrix), torch.get_num_threads(), torch.is_grad_enabled()))
        return matrix * other[:, None, None], other + 1

    return function


@pytest.mark.parametrize("count", [3, 4, 7, 50])
def test_every_row_is_taken_once_and_in_order(threads, count):
    seen = []
    matrix, other = torch.randn(count, 100, 100), torch.arange(float(count))
    with torch.no_grad():
        product, more = shared(told(seen), matrix, other)
    assert torch.equal(product, matrix * other[:, None, None])
    assert torch.equal(more, other + 1)
    assert sorted(rows for _, rows, _, _ in seen) == sorted(len(part) for part in matrix.tensor_split(3))
    assert threading.get_ident() not in {who for who, _, _, _ in seen}
    assert {(inner, grad) for _, _, inner, grad in seen} == {(1, False)}


@pytest.mark.parametrize("shape", [(1, 200, 200), (50, 4, 4), (4, 300, 300)])
def test_what_gains_nothing_stays(threads, shape):
    seen = []
    shared(told(seen), torch.randn(shape), torch.ones(shape[0]))
    assert [(who, rows) for who, rows, _, _ in seen] == [(threading.get_ident(), shape[0])]


def test_an_error_comes_out_and_threads_are_as_before(threads):
    def fail(matrix):
        raise torch.linalg.LinAlgError("no convergence")

    with pytest.raises(torch.linalg.LinAlgError, match="no convergence"):
        shared(fail, torch.randn(10, 100, 100))
    assert torch.get_num_threads() == threads


def test_eigenvectors_are_those_of_one_thread(threads):
    matrix = torch.randn(20, 60, 60, dtype=torch.float64)
    matrix = matrix @ matrix.mT
    values, vectors = shared(torch.linalg.eigh, matrix)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix))
    torch.testing.assert_close(vectors @ values.diag_embed() @ vectors.mT, matrix)
