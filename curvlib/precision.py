"""The precision in which statistics and roots are computed, whatever the global switches say; subnormal numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_SWITCHES = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
"""Where torch keeps the precision of float32 products, whichever of its functions set it."""

_KINDS = ("cpu", "cuda")


@contextmanager
def full_precision() -> Iterator[None]:
    """Outside autocast, with float32 products in float32; afterwards the switches are what they were."""
    reduced = [(one, one.fp32_precision) for one in _SWITCHES if one.fp32_precision not in ("ieee", "none")]
    if not reduced and not any(map(torch.is_autocast_enabled, _KINDS)):
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        for switch, _ in reduced:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, precision in reduced:
                switch.fp32_precision = "none"
                if switch.fp32_precision != precision:  # else it was inherited from a switch above, and is again
                    switch.fp32_precision = precision


def flush_subnormals_(tensor: Tensor) -> Tensor:
    """Set subnormal numbers to zero, in place, on a CPU.

    An average forgets what no longer comes by halves, and reaches them after some hundred steps; a product of matrices
    with a tenth of such entries takes thirty times as long. (The switch of the hardware is per thread, and does not
    reach those of the linear algebra.)
    """
    if tensor.device.type == "cpu" and tensor.is_floating_point():
        torch.hardshrink(tensor, torch.finfo(tensor.dtype).tiny, out=tensor)
    return tensor


def copy_flushed_(target: Tensor, source: Tensor) -> Tensor:
    """Copy, with subnormal numbers set to zero on a CPU."""
    if target.device.type == "cpu" and target.dtype == source.dtype and target.is_floating_point():
        return torch.hardshrink(source, torch.finfo(target.dtype).tiny, out=target)
    return flush_subnormals_(target.copy_(source))
