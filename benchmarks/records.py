"""Records: what a run is, where its results lie, and how they get there whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


class RecordError(ValueError):
    """A file of a results folder that cannot be read; says which, and the way out."""


@dataclass(frozen=True)
class Spec:
    """Everything that decides the numbers of a run.

    Args:
        problem: its name.
        method: its name.
        settings: of the optimizer.
        seed: of initialisation, data order and sampled labels.
        epochs: the budget; or
        steps: the budget; or
        seconds: the budget.
    """

    problem: str
    method: str
    settings: Mapping[str, Any]
    seed: int
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None

    @property
    def key(self) -> str:
        """A hash of the contents: equal runs have equal names."""
        text = json.dumps(asdict(self), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Point:
    """One evaluation: losses after ``step`` steps and ``seconds`` of training (evaluation excluded)."""

    step: int
    seconds: float
    train: float
    test: float
    metric: float = math.nan


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        spec: what was run.
        status: ``"finished"``, or ``"diverged"`` with the step in the last point.
        points: evaluations.
        step_seconds: median time of a training step.
        memory: bytes of optimizer state, at the end.
        environment: versions, hardware, threads.
        parts: seconds in all of each part of a step.
        peak: bytes of the process or the GPU at most.
        note: on the data.
    """

    spec: Spec
    status: str
    points: tuple[Point, ...]
    step_seconds: float
    memory: int
    environment: Mapping[str, Any]
    parts: Mapping[str, float] = field(default_factory=dict)
    peak: int = 0
    note: str = ""

    @staticmethod
    def load(file: Path) -> Record:
        """Read a record.

        Raises:
            RecordError: where the file holds none.
        """
        try:
            content = json.loads(file.read_text())
            points = tuple(Point(**point) for point in content.pop("points"))
            return Record(spec=Spec(**content.pop("spec")), points=points, **content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecordError(
                f"{file} is no record of a run ({error}); remove it, and that run is done again"
            ) from None

    def save(self, file: Path) -> None:
        """Write it whole or not at all."""
        write_whole(file, json.dumps(asdict(self), indent=1, default=str).encode())


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that it is never seen half written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, file)


@cache
def environment() -> dict[str, Any]:
    """Versions, hardware and threads of this process."""
    import curvlib

    packages = {"curvlib": curvlib.__version__, "torch": torch.__version__, "numpy": metadata.version("numpy")}
    return {
        "python": platform.python_version(),
        "packages": packages,
        "commit": _commit(),
        "system": platform.platform(),
        "processor": _processor(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "precision": "float32",
    }


def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")
