"""A pytest plugin that puts the subject in the place of torch's SGD, Adam and AdamW."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from subject import subject

KIND = subject()
KNOWN = {name for base in KIND.__mro__[:2] for name in inspect.signature(base).parameters} - {"flags", "settings"}


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


class OneCycleLR(torch.optim.lr_scheduler.OneCycleLR):
    """Torch's, which leaves a momentum alone that is not there, as it has to be told."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{"cycle_momentum": bool({"momentum", "betas"} & KNOWN), **settings})


torch.optim.lr_scheduler.OneCycleLR = OneCycleLR  # type: ignore[misc]


def pytest_runtest_setup() -> None:
    """The same weights in every run: where they are drawn anew, a search over step sizes may or may not overflow."""
    torch.manual_seed(0)


for kind in (SGD, Adam, AdamW):
    setattr(torch.optim, kind.__name__, kind)
