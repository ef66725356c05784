"""A pytest plugin that puts the subject in the place of torch's SGD, Adam and AdamW."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from subject import subject

KIND = subject()
KNOWN = set(inspect.signature(KIND).parameters) - {"flags"}


class Swapped(KIND):  # type: ignore[misc, valid-type]
    """The subject, without settings that it does not know."""

    def __init__(self, params: Any, *arguments: Any, **settings: Any) -> None:
        given = dict(zip(("lr",), arguments, strict=False)) | settings
        super().__init__(params, **{name: value for name, value in given.items() if name in KNOWN})


class SGD(Swapped):
    """In the place of torch's; each has a class of its own, since tests patch them one by one."""


class Adam(Swapped):
    """In the place of torch's."""


class AdamW(Swapped):
    """In the place of torch's."""


for kind in (SGD, Adam, AdamW):
    setattr(torch.optim, kind.__name__, kind)
