"""SINGD beside its authors' package, step by step (extra `peers`)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import curvlib
from tests.optimizers.test_tnt import batch, network


@pytest.mark.parametrize("structure", ["dense", "diagonal"])
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_singd_beside_its_authors(structure, coupled, normalize):
    theirs = pytest.importorskip("singd.optim.optimizer", reason="needs the extra 'peers'").SINGD
    momentum = 0.5 if coupled else 0.0  # without coupling theirs has none
    mine, other = network(), network()
    optimizer = curvlib.SINGD(
        mine,
        0.02,
        momentum=0.8,
        damping=0.1,
        rate=0.05,
        factor_momentum=momentum,
        structure=structure,
        coupled=coupled,
        normalize=normalize,
        statistics_every=2,
    )
    peer = theirs(
        other,
        lr=0.02,
        momentum=0.8,
        damping=0.1,
        lr_cov=0.05,
        alpha1=momentum,
        T=2,
        structures=(structure, structure),
        kfac_like=not coupled,
        normalize_lr_cov=normalize,
    )
    for t in range(50):
        x, y = batch(t)
        for model, one in ((mine, optimizer), (other, peer)):
            one.zero_grad()
            F.cross_entropy(model(x), y).backward()
            one.step()
        for found, wanted in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
