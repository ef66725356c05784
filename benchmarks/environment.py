"""Where a run was measured: code, packages, hardware, threads, precision."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "numpy", "einops", "opt_einsum")


def environment(device: str = "cpu", module: str = "", jobs: int = 1) -> dict[str, Any]:
    """Code version, packages, hardware, threads and precision of this process, and how many share the machine.

    Args:
        device: on which a run is.
        module: of an optimizer from another package, whose version is told too.
        jobs: processes of the study that run at once.
    """
    import curvlib

    package = module.partition(".")[0]
    packages = {"curvlib": curvlib.__version__} | {name: _version(name) for name in _PACKAGES}
    if package not in ("", "curvlib", "benchmarks", "torch"):
        packages[package] = _version(package)
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "packages": packages,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "jobs": jobs,
        "precision": _precision(device),
    }


@cache
def commit() -> str:
    """The version of this code in git, with ``+`` where files differ from it; ``"unknown"`` outside of a clone."""
    try:
        version = _git("rev-parse", "--short", "HEAD")
        return version + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


@cache
def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    distributions = metadata.packages_distributions().get(package)  # slow, for who is not called as its module
    return metadata.version(distributions[0]) if distributions else "unknown"


def _precision(device: str) -> str:
    reduced = torch.backends.cuda.matmul.allow_tf32 if device.startswith("cuda") else False
    return f"{str(torch.get_default_dtype()).removeprefix('torch.')}{', products in TF32' if reduced else ''}"


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")
