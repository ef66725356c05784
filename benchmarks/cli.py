"""The command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from .data import DataError
from .lab import run_lab
from .methods import METHODS
from .problems import PROBLEMS
from .records import Record, RecordError
from .report import write_report
from .speed import SpeedError, add_speed, run_speed
from .study import DIGITS, MAIN, Study, run_study
from .terminal import show

_EXAMPLES = """examples:
  python -m benchmarks study
  python -m benchmarks run mnist-autoencoder --data ~/data/MNIST
  python -m benchmarks run digits-cnn --methods mbf adam --seeds 5
  python -m benchmarks report results/study
  python -m benchmarks lab

A stopped study goes on where it stopped when the same command is given again; finished runs are never repeated.
"""


class UsageError(ValueError):
    """What a user asked for cannot be done; the message is all that is shown."""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare optimizers: same initialisation and data order for every method within a seed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="list problems and methods")
    study = commands.add_parser(
        "study", help="the main study: two problems on bundled digits, six methods, three seeds"
    )
    run = commands.add_parser("run", help="compare methods on one problem")
    run.add_argument("problem", help=f"one of: {', '.join(PROBLEMS)}")
    run.add_argument("--methods", nargs="+", metavar="NAME", default=list(MAIN), help=f"of: {', '.join(METHODS)}")
    run.add_argument("--seeds", type=int, default=3, metavar="N", help="number of seeds, from 0 (default 3)")
    run.add_argument("--epochs", type=int, metavar="N", help="budget (default: the problem's)")
    run.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with the data's official files (default: CURVLIB_DATA, else download)",
    )
    lab = commands.add_parser("lab", help="what block structures lose, on three trained networks: figures and tables")
    lab.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with the IDX files of MNIST, for one of the networks (default: CURVLIB_DATA, else bundled digits)",
    )
    for command in (study, run, lab):
        command.add_argument("--out", type=Path, metavar="DIR", help="folder for results (default: results/NAME)")
        command.add_argument(
            "--threads", type=int, metavar="N", help="threads for torch (default: its own choice, at most 2)"
        )
    add_speed(commands)
    report = commands.add_parser("report", help="write the report of a results folder again")
    report.add_argument("folder", type=Path, metavar="DIR", help="the results folder of a study")
    return top


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what cannot be done, 130 after Ctrl-C."""
    console = console or Console(width=None if os.environ.get("COLUMNS") or os.isatty(1) else 160)
    options = parser().parse_args(arguments)
    try:
        _dispatch(options, console)
    except (UsageError, DataError, RecordError, SpeedError) as error:
        return _fail(str(error), console)
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", console)
    except KeyboardInterrupt:
        console.print("Stopped; nothing is lost. The same command goes on from here.", highlight=False)
        return 130
    return 0


def _fail(message: str, console: Console) -> int:
    console.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 2


def _dispatch(options: argparse.Namespace, console: Console) -> None:
    if options.command == "list":
        _list(console)
    elif options.command == "report":
        _report(options.folder, console)
    elif options.command == "lab":
        _set_threads(options.threads)
        run_lab(options.out or Path("results") / "lab", _source(options), console)
    elif options.command == "speed":
        run_speed(options, console)
    else:
        _set_threads(options.threads)
        study = DIGITS if options.command == "study" else _study(options)
        name = "study" if options.command == "study" else options.problem
        run_study(study, options.out or Path("results") / name, _source(options), console)


def _study(options: argparse.Namespace) -> Study:
    _known("problem", [options.problem], list(PROBLEMS))
    _known("method", options.methods, list(METHODS))
    for name in ("seeds", "epochs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be a whole number from 1, got {value}")
    methods = tuple(dict.fromkeys(options.methods))
    title = f"{PROBLEMS[options.problem].title}: {', '.join(METHODS[name].title for name in methods)}"
    return Study(title, (options.problem,), methods, tuple(range(options.seeds)), options.epochs)


def _known(what: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    wrong = [name for name in names if name not in allowed]
    if wrong:
        raise UsageError(f"unknown {what} {wrong[0]!r}; there are {', '.join(allowed)}")


def _source(options: argparse.Namespace) -> Path | None:
    named = getattr(options, "data", None) or os.environ.get("CURVLIB_DATA")
    if named is None:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise UsageError(f"the data folder {folder} does not exist; leave out --data (and CURVLIB_DATA) to download")
    return folder


def _set_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be a whole number from 1, got {threads}")
    torch.set_num_threads(threads or min(2, torch.get_num_threads()))


def _list(console: Console) -> None:
    for problem in PROBLEMS.values():
        console.print(
            f"{problem.name:20} {problem.title}: {problem.source}", highlight=False, markup=False, soft_wrap=True
        )
    for method in METHODS.values():
        console.print(f"{method.name:20} {method.title}", highlight=False, markup=False)


def _report(folder: Path, console: Console) -> None:
    files = sorted((folder / "runs").glob("*.json"))
    if not files:
        raise UsageError(f"{folder} holds no finished runs (expected {folder}/runs/*.json)")
    records = [Record.load(file) for file in files]
    show(records, console, f"Report of {folder.name}")
    page = write_report(records, folder, f"Report of {folder.name}")
    console.print(f"Report: {page.resolve()}", highlight=False, markup=False, soft_wrap=True)
