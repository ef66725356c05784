"""The precision in which statistics and roots are computed, whatever the global switches say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Outside autocast, with float32 products in float32."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if before != "highest":
                torch.set_float32_matmul_precision(before)
