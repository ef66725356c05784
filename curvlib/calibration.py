"""Which way of solving is the fastest where: a small table for every kind of device.

The numbers for CPUs were measured (``python -m benchmarks speed --calibrate`` draws them anew, and says on which machine);
those for GPUs follow published measurements (DASH, 2026: products win from blocks of some hundred rows on), until somebody
draws them. A user's own come first: :func:`calibrate`, or a file named by ``CURVLIB_CALIBRATION``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .checks import check_count


@dataclass(frozen=True)
class Calibration:
    """The sizes from which on one way of solving replaces another; ``None`` is never.

    Args:
        planes_rows: rows up to which small matrices lie by planes, see :mod:`curvlib.planes`.
        planes_count: how many of them there must be.
        halves_rows: rows from which an inverse is computed in halves, see :mod:`curvlib.inverses`.
        lapack_rows: rows from which it is LAPACK's.
        newton_rows: rows from which inverse roots below one are computed by products, see :mod:`curvlib.newton`, and not by
            an eigendecomposition, where ``solver="auto"``.
        chunk: entries of matrices that are solved in one call.
        bucket: entries of operands that take a step in one call; on a CPU their temporaries stay in its caches, and small
            enough for the allocator to keep.

    Raises:
        ValueError: naming the number, its value and what is allowed.
    """

    planes_rows: int | None = None
    planes_count: int = 1024
    halves_rows: int | None = None
    lapack_rows: int | None = None
    newton_rows: int | None = None
    chunk: int = 1 << 20
    bucket: int | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None or one.name in ("planes_count", "chunk"):
                check_count(one.name, value)


KINDS: dict[str, Calibration] = {
    "cpu": Calibration(planes_rows=16, planes_count=1024, halves_rows=49, lapack_rows=640, bucket=1 << 20),
    "cuda": Calibration(newton_rows=256, chunk=1 << 24),
}
"""By the name of a device, such as ``"NVIDIA H200"``, or by its type."""


def calibration(device: torch.device) -> Calibration:
    """The numbers for a device: by its name, else by its type, else those of a GPU."""
    return _known(device.type, device.index)


@lru_cache
def _known(kind: str, index: int | None) -> Calibration:
    file = os.environ.get("CURVLIB_CALIBRATION")
    table = {**KINDS, **(read(Path(file)) if file else {})}
    name = torch.cuda.get_device_name(index) if kind == "cuda" else kind
    return table.get(name) or table.get(kind) or table["cuda"]


def calibrate(table: Mapping[str, Calibration] | str | Path) -> None:
    """Use other numbers from now on, in this process; before optimizers are made, whose state may depend on them.

    Args:
        table: by device, or the file that ``python -m benchmarks speed --calibrate`` wrote.

    Raises:
        ValueError: for a file that is no such table, naming what is wrong.
    """
    KINDS.update(read(Path(table)) if isinstance(table, (str, Path)) else table)
    _known.cache_clear()


def read(file: Path) -> dict[str, Calibration]:
    """The table of a file.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    try:
        content: dict[str, dict[str, Any]] = json.loads(file.read_text())["devices"]
        return {name: replace(KINDS.get(name, Calibration()), **numbers) for name, numbers in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no calibration: {error}") from error
