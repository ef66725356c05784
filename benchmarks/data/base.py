"""What a data set is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class DataError(RuntimeError):
    """Data that are missing, damaged or not what they should be; says which file, and the way out."""


@dataclass(frozen=True)
class Split:
    """Examples of one split.

    Args:
        inputs: ``[n, ...]``: pixels, float32; characters or nodes of a graph, int64.
        labels: ``[n, ...]``, int64: classes; of a text one for every character.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def first(self, count: int) -> Split:
        """The first so many examples, or all."""
        return Split(self.inputs[:count], self.labels[:count])


@dataclass(frozen=True)
class Data:
    """A data set.

    Args:
        train: what is trained on.
        test: what is held out.
        note: a sentence for reports, where the data are derived, generated or lossy.
        extra: what a model is built with, such as the graph that its nodes belong to.
    """

    train: Split
    test: Split
    note: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
