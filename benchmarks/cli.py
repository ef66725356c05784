"""The command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

_EXAMPLES = """examples:
  python -m benchmarks list                                     what can be compared
  python -m benchmarks study                                    a first study, on data that need no download
  python -m benchmarks run study.toml --jobs 4                  a study from its file, four runs at once
  python -m benchmarks run digits-cnn --methods mbf adam torch.optim:NAdam --seeds 5
  python -m benchmarks run mnist-autoencoder --seconds 300 --data ~/data
  python -m benchmarks tune digits-cnn --methods mbf adam --trials 8
  python -m benchmarks report results/digits-cnn                the tables, figures and page of a folder again
  python -m benchmarks compare results/old results/new          the same runs by two versions

A stopped study goes on where it stopped when the same command is given again; finished runs are never repeated. How to
write a study file: docs/studies.md.
"""
_RUN = """A study is a TOML file, or one problem and what is compared on it. Methods are names from `list`, module:Class of
any torch optimizer, or Label= and one of these.

examples:
  python -m benchmarks run study.toml --out results/mine
  python -m benchmarks run digits-cnn --methods mbf adam pytorch_optimizer:SOAP --epochs 10
  python -m benchmarks run study.toml --slice 2/8               on the second of eight machines without a folder in common
"""
_TUNE = """Every method gets the same number of trials on every problem; seeds of tuning are never seeds of a report. What is
chosen is printed; `run` with a study file that has a table [tuning] does this first, and then the runs of the report.

examples:
  python -m benchmarks tune digits-cnn --methods mbf adam --trials 8
  python -m benchmarks tune study.toml --jobs 4
"""
_TRACEBACK = "show where an error came from"


def parser(speed: bool = False) -> argparse.ArgumentParser:
    """The parser of all commands.

    Args:
        speed: whether the options of ``speed`` are asked for, which are known once its cases are imported.
    """
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare optimizers: same initialisation and data order for every method within a seed.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="list problems and methods, with their spaces")
    first = commands.add_parser("study", help="a first study: two problems on bundled digits, six methods, three seeds")
    run = commands.add_parser(
        "run", help="run a study file, or compare methods on one problem", epilog=_RUN, formatter_class=raw
    )
    tune = commands.add_parser("tune", help="choose settings by a search", epilog=_TUNE, formatter_class=raw)
    for command in (run, tune):
        command.add_argument("study", metavar="STUDY", help="a study.toml, or a problem's name from `list`")
        command.add_argument("--methods", nargs="+", metavar="NAME", action="extend", help="default: those of `study`")
        command.add_argument("--seeds", type=int, metavar="N", help="seeds of the report, from 0 (default 3)")
        for name, kind in (("epochs", int), ("steps", int), ("seconds", float)):
            command.add_argument(f"--{name}", type=kind, metavar="N", help="budget of a run (default: the problem's)")
        command.add_argument("--slice", metavar="I/N", help="only the I-th of N parts of the work, such as 2/8")
    tune.add_argument("--search", metavar="NAME", help="how to search: grid, random or optuna (default grid)")
    tune.add_argument("--trials", type=int, metavar="N", help="settings to try, of every method (default 12)")
    tune.add_argument(
        "--tuning-seeds", type=int, nargs="+", action="extend", metavar="SEED", help="seeds of the trials (default 100)"
    )
    lab = commands.add_parser("lab", help="what block structures lose, on three trained networks: figures and tables")
    for command in (first, run, tune, lab):
        command.add_argument(
            "--data",
            type=Path,
            metavar="DIR",
            help="folder with data sets in their official files (default: CURVLIB_DATA, else download)",
        )
        command.add_argument("--out", type=Path, metavar="DIR", help="folder for results (default: results/NAME)")
        command.add_argument("--threads", type=int, metavar="N", help="threads for torch (default: at most 2)")
    for command in (first, run, tune):
        command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, in processes (default 1)")
        command.add_argument("--device", metavar="NAME", help="where to train: cpu, cuda, cuda:1 (default cpu)")
    if speed:
        from .speed import add_speed

        add_speed(commands)
    else:
        commands.add_parser("speed", help="paired times against other libraries, hand-written code and the machine")
    again = commands.add_parser("report", help="write the report of results folders again")
    again.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="results folders; several are read as one")
    again.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default: the first)")
    both = commands.add_parser("compare", help="the same runs in two folders, such as of two versions")
    both.add_argument("before", type=Path, metavar="DIR", help="a results folder")
    both.add_argument("after", type=Path, metavar="DIR", help="another one")
    top.add_argument("--traceback", action="store_true", help=_TRACEBACK)
    for command in commands.choices.values():  # where it is not given, it must not undo what stands before the command
        command.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=_TRACEBACK)
    return top


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what cannot be done, 130 after Ctrl-C."""
    width = None if os.environ.get("COLUMNS") or os.isatty(1) else 160
    console = console or Console(width=width, emoji=False)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser("speed" in given).parse_args(given)
    try:
        from .commands import attempt  # here, since help need not wait for torch

        return attempt(options, console)
    except KeyboardInterrupt:
        console.print("Stopped; nothing is lost. The same command goes on from here.", highlight=False)
        return 130
