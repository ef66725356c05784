"""``python -m benchmarks speed``."""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..records import environment
from .calibrate import run_calibration
from .cases import CASES
from .peers import Missing, versions
from .table import Row, on_screen, write
from .timing import Differs, Setting, measure


class SpeedError(ValueError):
    """What a user asked for cannot be done; the message is all that is shown."""


def add_speed(commands: Any) -> None:
    """Add the subcommand to the parser of all commands."""
    speed = commands.add_parser("speed", help="paired times against other libraries, hand-written code and the machine")
    speed.add_argument("--case", nargs="+", metavar="NAME", default=list(CASES), help=f"of: {', '.join(CASES)}")
    speed.add_argument("--device", default="cpu", help="where to compute (default: cpu)")
    speed.add_argument("--threads", type=int, default=2, metavar="N", help="threads for torch (default: 2)")
    speed.add_argument("--repetitions", type=int, default=5, metavar="N", help="pairs of each case (default: 5)")
    speed.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything works")
    speed.add_argument(
        "--calibrate", action="store_true", help="instead: draw the table of solvers anew, a file to use"
    )
    speed.add_argument("--peers", type=Path, metavar="DIR", help="folder with other libraries that are not installed")
    speed.add_argument("--out", type=Path, metavar="DIR", default=Path("results/speed"), help="folder for the table")


def run_speed(options: argparse.Namespace, console: Console) -> None:
    """Measure the chosen cases, show the table, and write it.

    Raises:
        SpeedError: for options that cannot be, naming them.
    """
    device = _check(options)
    torch.set_num_threads(options.threads)
    setting = Setting(device, options.quick, options.repetitions, options.peers)
    if options.calibrate:
        run_calibration(setting, _about(options, device), options.out, console)
        return
    rows = []
    for name in dict.fromkeys(options.case):
        began = time.perf_counter()
        rows.append(run_case(name, setting))
        verdict = rows[-1].note or f"{rows[-1].cells()[4]} (asked {rows[-1].target})"
        console.print(f"{name}: {verdict}, {time.perf_counter() - began:.0f} s", highlight=False, markup=False)
        gc.collect()
    console.print(on_screen(rows, "Speed, tiny shapes" if options.quick else "Speed"))
    for file in write(rows, _about(options, device), options.out):
        console.print(str(file.resolve()), highlight=False, markup=False, soft_wrap=True)


def run_case(name: str, setting: Setting) -> Row:
    """One case; where a peer is missing, or differs, a row that says so."""
    case = CASES[name]
    target = case.target(setting.device)
    try:
        return Row(case, target, measure(case.build(setting), target, setting.repetitions))
    except Missing as reason:
        return Row(case, target, None, f"skipped: {reason}")
    except Differs as reason:
        return Row(case, target, None, f"not timed: {reason}")


def _check(options: argparse.Namespace) -> torch.device:
    unknown = [name for name in options.case if name not in CASES]
    if unknown:
        raise SpeedError(f"unknown case {unknown[0]!r}; there are {', '.join(CASES)}")
    for name in ("threads", "repetitions"):
        if getattr(options, name) < 1:
            raise SpeedError(f"--{name} must be a whole number from 1, got {getattr(options, name)}")
    if options.peers is not None and not options.peers.is_dir():
        raise SpeedError(f"--peers: the folder {options.peers} does not exist")
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SpeedError(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    return device


def _about(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    about = environment()
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else about["processor"]
    return {
        "hardware": hardware,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "repetitions": options.repetitions,
        "versions": {**about["packages"], **versions()},
        "python": about["python"],
        "system": about["system"],
        "commit": about["commit"],
        "quick": options.quick,
    }
