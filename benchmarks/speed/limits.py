"""Cases against what the machine can do: even steps, rates of refreshes, bytes."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import curvlib
from curvlib.roots import RootJob, refresh
from curvlib.solvers import How

from .case import Case, at_most, faster
from .kronecker import small
from .peers import NEVER
from .timing import Contest, Setting, timed
from .workloads import Shape, displacement, fill, gpt, parameters, relative, steps, vgg16

ROUNDING = 1e-3
"""Of roots in float32 with condition numbers up to some thousands."""

FLOPS: Mapping[str, float] = {"cholesky": 1.0, "eigh": 28 / 3}
"""n³ floating-point operations of a refresh: n³/3 and 2n³/3 for a Cholesky factor and its inverse; 4n³/3 for the tridiagonal
form, 4n³ for its eigenvectors, 2n³ to turn these back, and 2n³ for the root."""


def _staggered(setting: Setting, stagger: bool) -> Contest:
    """The slowest step of a period, as the median of several periods, against the median step."""
    period, damping = 10, dict(damping=1.0, relative_damping=False)

    def build(these: list[nn.Parameter], staggered: bool = stagger) -> torch.optim.Optimizer:
        return curvlib.Shampoo(these, refresh_every=period, stagger=staggered, **damping)  # type: ignore[arg-type]

    step = steps(build, small(setting), setting)
    groups: list[list[float]] = []
    read = {"worst": 0, "median": 0}

    def phases(side: str) -> list[float]:
        """Medians over some periods, of which both sides read the same, whoever is asked first."""
        if read[side] == len(groups):
            periods = [[step() for _ in range(period)] for _ in range(setting.size(5, 1))]
            groups.append([statistics.median(column) for column in zip(*periods, strict=True)])
        read[side] += 1
        return groups[read[side] - 1]

    def difference() -> float:
        """Of the first step, at which all roots are solved either way."""
        pair = (displacement(partial(build, staggered=one), small(setting), setting, [0]) for one in (True, False))
        return relative(*pair)

    return Contest(
        lambda: max(phases("worst")), lambda: statistics.median(phases("median")), difference, 0.0, warm_up=1
    )


def _slab(setting: Setting, solver: str, size: int, count: int) -> Contest:
    """A refresh against batched products, scaled to as many operations."""
    n, batch, device = setting.size(size, 12), setting.size(count, 3), setting.device
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(batch, n, 2 * n, device=device, generator=generator)
    factor = rows @ rows.mT / (2 * n)
    power, damping = (1.0, 0.1) if solver == "cholesky" else (0.25, 0.1)
    root, product = torch.empty_like(factor), torch.empty_like(factor)
    diagnostics = torch.zeros(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    job = RootJob(factor, 1.0, damping, How(power, solver, torch.float32), root, *diagnostics)
    share = FLOPS[solver] / 2

    def difference() -> float:
        refresh([job])
        values, vectors = torch.linalg.eigh(factor.double())
        return relative([root], [(vectors * (values + damping)[:, None, :] ** -power) @ vectors.mT])

    return Contest(
        lambda: timed(lambda: refresh([job]), device),
        lambda: share * timed(lambda: torch.bmm(factor, factor, out=product), device),
        difference,
        ROUNDING,
        turns=3,
    )


class Allocations(TorchDispatchMode):
    """The bytes of what operators allocate while it is entered, how many live, and the most that did at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def know(self, tensors: Any) -> None:
        """Do not count these."""
        for one in tensors:
            self._known.add(one.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in pytree.tree_leaves(result):
            if isinstance(one, Tensor):
                self._count(one.untyped_storage(), given)
        return result

    def _count(self, storage: Any, given: set[int]) -> None:
        if storage in self._known or storage._cdata in given:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.live -= size


def _memory(
    setting: Setting,
    build: Callable[[list[nn.Parameter]], Any],
    shapes: Callable[[Setting], list[Shape]],
    formula: Callable[[Shape], int],
) -> Contest:
    """Most bytes that live in steps without a refresh, gradients and parameters aside, against a formula's."""
    mine = parameters(shapes(setting), setting)
    tracker = Allocations()
    with tracker:
        optimizer = build(mine)
        optimizer.step()

    def peak() -> float:
        fill(mine, 0)
        tracker.peak = tracker.live
        with tracker:
            optimizer.step()
        return float(tracker.peak)

    wanted = float(sum(formula(shape) for shape in shapes(setting)))

    def difference() -> float:
        """Of the formula and of what the optimizer says that it holds, but for its workspace."""
        told = optimizer.memory()
        held = sum(size for role, size in told.items() if role not in ("workspace", "diagnostics"))
        return abs(held - wanted) / wanted

    return Contest(peak, lambda: wanted, difference, 1e-2, warm_up=1, unit="MB")


def _shampoo_bytes(shape: Shape) -> int:
    """Two factors and two roots, in blocks of equal cuts, momentum and the grafted diagonal."""
    blocks = [-(-side // 1024) for side in shape]
    factors = sum((side / cuts) ** 2 for side, cuts in zip(shape, blocks, strict=True)) * blocks[0] * blocks[1]
    return int(4 * (2 * factors + 2 * shape[0] * shape[1]))


def _adam_bytes(shape: Shape) -> int:
    entries = 1
    for side in shape:
        entries *= side
    return 4 * 2 * entries


def _kernel_bytes(shape: Shape) -> int:
    """A matrix 9×9 and its inverse for every kernel, and momentum; published, without grafting."""
    outputs, inputs, *kernel = shape
    entries = 1
    for side in kernel:
        entries *= side
    return 4 * outputs * inputs * (2 * entries**2 + entries)


def _published(these: list[nn.Parameter]) -> Any:
    return curvlib.MBF(these, **{**curvlib.optimizers.mbf.PUBLISHED, "dense_start": False})


_MEMORY: tuple[tuple[str, str, Any, Any, Any], ...] = (
    ("adam", "Adam, matrices of a GPT", curvlib.Adam, gpt, _adam_bytes),
    (
        "shampoo",
        "Shampoo, matrices of a GPT, blocks ≤ 1024",
        partial(curvlib.Shampoo, refresh_every=NEVER),
        gpt,
        _shampoo_bytes,
    ),
    ("mbf", "MBF as published, convolutions of VGG16", _published, vgg16, _kernel_bytes),
)
CASES = (
    Case(
        "staggered",
        "Shampoo, 100 matrices of 64², T 10, staggered: worst step",
        "its median step",
        at_most(1.3),
        at_most(1.3),
        partial(_staggered, stagger=True),
    ),
    Case(
        "at-once",
        "the same, all roots at once: worst step",
        "its median step",
        at_most(None),
        at_most(None),
        partial(_staggered, stagger=False),
    ),
    *(
        Case(
            f"slab-{solver}-{size}",
            f"refresh of {count} {'inverses' if solver == 'cholesky' else 'fourth roots'} of {size}²",
            "batched products, as many operations",
            faster(0.6),
            faster(0.4),
            partial(_slab, solver=solver, size=size, count=count),
        )
        for solver in ("cholesky", "eigh")
        for size, count in ((256, 16), (512, 4), (1024, 1))
    ),
    *(
        Case(
            f"memory-{name}",
            f"{what}: most bytes in a step without refresh",
            "the bytes of its formula",
            at_most(1.1),
            at_most(1.1),
            partial(_memory, build=build, shapes=shapes, formula=formula),
        )
        for name, what, build, shapes, formula in _MEMORY
    ),
)
