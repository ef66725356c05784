"""Methods beside their authors' own files, where a folder has them: ``CURVLIB_PEERS=DIR`` with ``soap.py``, ``psgd.py``.

These files are single modules without a package: github.com/nikhilvyas/SOAP, github.com/lixilinx/psgd_torch.
"""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from torch import nn

from curvlib import CurvatureOptimizer, Damping, Moment, Recipe, Root, Tracking
from curvlib.blocks import EigenbasisBlock, WhiteningBlock
from tests.optimizers.oracles import F64


def theirs(name, monkeypatch):
    folder = os.environ.get("CURVLIB_PEERS")
    if folder is None:
        pytest.skip(f"CURVLIB_PEERS names no folder with {name}.py")
    monkeypatch.setattr(sys, "path", [*sys.path, folder])
    return pytest.importorskip(name, reason=f"{folder} has no {name}.py")


def test_orthogonal_iterations_of_soap(monkeypatch):
    """From the same factors and bases, the next bases are the same but for signs."""
    peer = theirs("soap", monkeypatch).SOAP([nn.Parameter(torch.zeros(2, 2))])
    weight = nn.Parameter(torch.zeros(6, 5))
    recipe = Recipe("| o, i", Moment(beta=0.9), Root(0.5, 1e-3, "qr", tolerance=1.0), block=EigenbasisBlock)
    optimizer = CurvatureOptimizer([weight], recipe, lr=0.0)
    for t in range(50):
        weight.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(t))
        before = [optimizer.state[weight][f"basis_0_{axis}"][0].clone() for axis in (0, 1)] if t else []
        optimizer.step()
        if not t:
            continue
        held = optimizer.state[weight]
        factors = [held[f"factor_0_{axis}"][0] for axis in (0, 1)]
        state = {"GG": factors, "Q": before, "exp_avg_sq": torch.zeros(6, 5)}
        for axis, wanted in enumerate(peer.get_orthogonal_matrix_QR(state)):
            found = held[f"basis_0_{axis}"][0]
            if t >= 10:  # of factors whose eigenvalues are apart from rounding
                torch.testing.assert_close((found.T @ wanted).abs(), torch.eye(len(found)), rtol=0, atol=2e-3)


@pytest.mark.parametrize("diagonal", [False, True])
def test_updates_of_psgd(monkeypatch, diagonal):
    """The authors' QUAD without noise, from the same start, but for the balancing that they do at random."""
    psgd = theirs("psgd", monkeypatch)
    monkeypatch.setattr(psgd, "balance_kron_precond", lambda *_: None)
    monkeypatch.setattr(psgd.torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(psgd, "norm_lower_bound_spd", lambda a: _norm(a))
    weight = nn.Parameter(torch.zeros(4, 3, dtype=F64))
    partition = "| [o], i" if diagonal else "| o, i"
    root = Root(0.5, Damping(0.0), tracking=Tracking(0.1, 0.9))
    optimizer = CurvatureOptimizer([weight], Recipe(partition, Moment(), root, block=WhiteningBlock), lr=0.0)
    state = None
    for t in range(50):
        g = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(t)) * torch.arange(1.0, 4.0)
        weight.grad = g.clone()
        if state is None:
            scale = g.pow(4).mean() ** (-1 / 8)
            state = psgd.init_kron(g, float(scale), max_size=3 if diagonal else math.inf, max_skew=math.inf, dQ="QUAD")
        optimizer.step()
        psgd.update_precond_kron_whiten_quad(state[0], (state[1][0], state[1][1]), g, 0.1, 0.9, 0.0)
        held = optimizer.state[weight]
        mine = [held[f"tracked_0_{axis}"][0] for axis in (0, 1)]
        products = [torch.einsum("...,...->", one, one).sqrt() for one in mine]
        scales = [torch.einsum("...,...->", one, one).sqrt() for one in state[0][0]]
        torch.testing.assert_close(products[0] * products[1], scales[0] * scales[1], rtol=1e-9, atol=0)
        for one, other in zip(mine, state[0][0], strict=True):  # factors share one scale
            torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-9, atol=1e-11)


def _norm(matrix):
    """The bound of WhiteningBlock."""
    row = matrix[matrix.square().sum(1).argmax()]
    for _ in range(2):
        row = row / row.norm() @ matrix
    return row.norm()
