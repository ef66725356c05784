"""What comes with a package."""

from __future__ import annotations

from pathlib import Path

import torch

from .base import Data, Split


def digits(_: Path | None = None) -> Data:
    """The 1,797 handwritten digits (8×8, 16 grey levels) that come with scikit-learn, scaled to [0, 1].

    Every fifth example is held out.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.from_numpy(bunch.data).float() / 16
    labels = torch.from_numpy(bunch.target).long()
    held = torch.arange(len(inputs)) % 5 == 0
    return Data(Split(inputs[~held], labels[~held]), Split(inputs[held], labels[held]))
