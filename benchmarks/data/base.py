"""What a data set is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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

    def to(self, device: str) -> Split:
        """The same on a device."""
        return Split(self.inputs.to(device), self.labels.to(device))

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
        validation: what settings are chosen by, where that is not ``test``.
    """

    train: Split
    test: Split
    note: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    validation: Split | None = None

    def to(self, device: str) -> Data:
        """The same with all splits on a device."""
        validation = None if self.validation is None else self.validation.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), validation=validation)

    def judge(self, purpose: str) -> Split:
        """The examples that runs are judged by: of tuning the validation data, where there are such."""
        return self.validation if purpose == "tuning" and self.validation is not None else self.test
