"""Draws the table of :mod:`curvlib.calibration` anew: at which sizes one way of solving overtakes another on this machine."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from curvlib.calibration import KINDS, Calibration, calibrate
from curvlib.inverses import inverse
from curvlib.planes import lay
from curvlib.solvers import SOLVERS, How

from ..records import write_whole
from .timing import Setting, timed

_ENTRIES = 1 << 20
"""About the entries of a batch that is timed."""


def factors(size: int, count: int, device: torch.device) -> Tensor:
    """Well-conditioned matrices ``[count, size, size]``."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(count, size, 2 * size, device=device, generator=generator)
    matrix = rows @ rows.mT / (2 * size)
    matrix.diagonal(dim1=1, dim2=2).add_(0.1)
    return matrix


def quicker(one: Callable[[], object], other: Callable[[], object], setting: Setting) -> float:
    """How many times as long the other takes, as the median of pairs."""
    one(), other()
    pairs = [(timed(one, setting.device), timed(other, setting.device)) for _ in range(setting.repetitions)]
    return statistics.median(second / first for first, second in pairs)


def crossing(sizes: Sequence[int], ratio: Callable[[int], float], seen: list[dict[str, Any]], name: str) -> int | None:
    """The first size from which on a way is the quicker one at every larger size; ``None`` where it is not at the last."""
    ratios = {size: ratio(size) for size in sizes}
    seen += [{"number": name, "at": size, "ratio": round(value, 3)} for size, value in ratios.items()]
    found = None
    for size in reversed(sizes):
        if ratios[size] <= 1:
            break
        found = size
    return found


def measure(setting: Setting) -> tuple[Calibration, list[dict[str, Any]]]:
    """The numbers of one device, and all ratios that they rest on."""
    device, seen = setting.device, list[dict[str, Any]]()
    now = KINDS.get(device.type, Calibration())
    never = replace(now, planes_rows=None, halves_rows=None, lapack_rows=None, newton_rows=None)

    def using(numbers: Calibration, work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            calibrate({device.type: numbers})
            return work()

        return run

    def count(size: int) -> int:
        return max(1, setting.size(_ENTRIES, 1 << 10) // size**2)

    def inverses(numbers: Calibration, other: Calibration) -> Callable[[int], float]:
        def ratio(size: int) -> float:
            matrix = factors(size, count(size), device)
            return quicker(using(numbers, lambda: inverse(matrix)), using(other, lambda: inverse(matrix)), setting)

        return ratio

    sizes = _upto(setting, (32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024))
    halves = crossing(sizes, inverses(replace(never, halves_rows=49), never), seen, "halves_rows")
    split = replace(never, halves_rows=halves)
    lapack = crossing(sizes, inverses(replace(split, lapack_rows=1), split), seen, "lapack_rows")
    rows, least = None, now.planes_count
    if device.type == "cpu":
        rows, least = _planes(setting, split, using, seen)

    def newton(size: int) -> float:
        matrix = factors(size, count(size), device)
        damping, how = torch.full((count(size),), 0.1, device=device), How(0.25, "newton", torch.float32)
        ways = [lambda name=name: SOLVERS[name].solve(matrix, damping, how) for name in ("newton", "eigh")]
        return quicker(ways[0], ways[1], setting)

    roots = crossing(_upto(setting, (32, 64, 128, 256, 512, 1024)), newton, seen, "newton_rows")
    return Calibration(rows, least, halves, lapack, roots, now.chunk, now.bucket), seen


def _planes(
    setting: Setting, other: Calibration, using: Callable[..., Callable[[], object]], seen: list[dict[str, Any]]
) -> tuple[int | None, int]:
    """Up to how many rows planes are worth it, and from how many matrices of 9 rows."""
    many, rows = setting.size(1 << 16, 64), 0

    def ratio(size: int, matrices: int) -> float:
        plain = factors(size, matrices, setting.device)
        laid, by_planes = lay(plain), replace(other, planes_rows=32, planes_count=1)
        return quicker(using(by_planes, lambda: inverse(laid)), using(other, lambda: inverse(plain)), setting)

    for size in _upto(setting, (4, 9, 12, 16, 20, 25)):
        value = ratio(size, many // 4 if size > 9 else many)
        seen.append({"number": "planes_rows", "at": size, "ratio": round(value, 3)})
        rows = size if value > 1 else rows
    counts = _upto(setting, (64, 256, 1024, 4096))
    least = crossing(counts, lambda matrices: ratio(9, matrices), seen, "planes_count")
    return rows or None, least or 4096


def _upto(setting: Setting, sizes: Iterable[int]) -> list[int]:
    return [size for size in sizes if not setting.quick or size <= 64]


def run_calibration(setting: Setting, about: Mapping[str, Any], out: Path, console: Console) -> None:
    """Measure, show, and write ``calibration.json``."""
    before = dict(KINDS)
    try:
        found, seen = measure(setting)
    finally:
        calibrate(before)
    name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else setting.device.type
    for one in seen:
        console.print(f"{one['number']:13} at {one['at']:5}: {one['ratio']:.2f} × as fast as without", highlight=False)
    console.print(f"{name}: {found}", highlight=False, markup=False, soft_wrap=True)
    file = out / "calibration.json"
    content = {"about": dict(about), "devices": {name: asdict(found)}, "measured": seen}
    write_whole(file, json.dumps(content, indent=1).encode())
    console.print(
        f"{file.resolve()}; to use it: CURVLIB_CALIBRATION={file}, or curvlib.calibrate({str(file)!r})", soft_wrap=True
    )
