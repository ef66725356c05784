"""The command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from .compare import compare
from .data import DataError
from .lab import run_lab
from .methods import METHODS, MethodError, label, title_of
from .naming import UnknownName, problem
from .problems import PROBLEMS
from .records import Record, RecordError, Results
from .search import SEARCHES, SearchError
from .sections import mixed
from .session import report, run_study
from .speed import SpeedError, add_speed, run_speed
from .study import DIGITS, MAIN, Budget, Study, StudyError, Tuning
from .study_file import read_study
from .team import RunError

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
  python -m benchmarks run study.toml --slice 2/8               on the second of eight machines, with a folder in common
"""
_TUNE = """Every method gets the same number of trials on every problem; seeds of tuning are never seeds of a report. What is
chosen is printed; `run` with a study file that has a table [tuning] does this first, and then the runs of the report.

examples:
  python -m benchmarks tune digits-cnn --methods mbf adam --trials 8
  python -m benchmarks tune study.toml --jobs 4
"""


class UsageError(ValueError):
    """What a user asked for cannot be done; the message is all that is shown."""


ERRORS = (UsageError, StudyError, UnknownName, MethodError, DataError, RecordError, SearchError, RunError, SpeedError)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compare optimizers: same initialisation and data order for every method within a seed.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    top.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="list problems and methods, with their spaces")
    study = commands.add_parser("study", help="a first study: two problems on bundled digits, six methods, three seeds")
    run = commands.add_parser(
        "run", help="run a study file, or compare methods on one problem", epilog=_RUN, formatter_class=raw
    )
    tune = commands.add_parser("tune", help="choose settings by a search", epilog=_TUNE, formatter_class=raw)
    for command in (run, tune):
        command.add_argument("study", metavar="STUDY", help="a study.toml, or a problem's name from `list`")
        command.add_argument("--methods", nargs="+", metavar="NAME", help=f"default: {' '.join(MAIN)}")
        command.add_argument("--seeds", type=int, metavar="N", help="seeds of the report, from 0 (default 3)")
        for name, kind in (("epochs", int), ("steps", int), ("seconds", float)):
            command.add_argument(f"--{name}", type=kind, metavar="N", help="budget of a run (default: the problem's)")
        command.add_argument("--slice", metavar="I/N", help="only the I-th of N parts of the work, such as 2/8")
    tune.add_argument("--search", choices=list(SEARCHES), help="how to search (default grid)")
    tune.add_argument("--trials", type=int, metavar="N", help="settings to try, of every method (default 12)")
    tune.add_argument("--tuning-seeds", type=int, nargs="+", metavar="SEED", help="seeds of the trials (default 100)")
    lab = commands.add_parser("lab", help="what block structures lose, on three trained networks: figures and tables")
    for command in (study, run, tune, lab):
        command.add_argument(
            "--data",
            type=Path,
            metavar="DIR",
            help="folder with data sets in their official files (default: CURVLIB_DATA, else download)",
        )
        command.add_argument("--out", type=Path, metavar="DIR", help="folder for results (default: results/NAME)")
        command.add_argument("--threads", type=int, metavar="N", help="threads for torch (default: at most 2)")
    for command in (study, run, tune):
        command.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, in processes (default 1)")
        command.add_argument("--device", metavar="NAME", help="where to train: cpu, cuda, cuda:1 (default cpu)")
    add_speed(commands)
    again = commands.add_parser("report", help="write the report of results folders again")
    again.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="results folders; several are read as one")
    again.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (default: the first)")
    both = commands.add_parser("compare", help="the same runs in two folders, such as of two versions")
    both.add_argument("before", type=Path, metavar="DIR", help="a results folder")
    both.add_argument("after", type=Path, metavar="DIR", help="another one")
    return top


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what cannot be done, 130 after Ctrl-C."""
    console = console or Console(width=None if os.environ.get("COLUMNS") or os.isatty(1) else 160)
    options = parser().parse_args(arguments)
    try:
        _dispatch(options, console)
    except ERRORS as error:
        return _fail(str(error), options, console)
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", options, console)
    except KeyboardInterrupt:
        console.print("Stopped; nothing is lost. The same command goes on from here.", highlight=False)
        return 130
    return 0


def _fail(message: str, options: argparse.Namespace, console: Console) -> int:
    if options.traceback:
        console.print_exception()
    console.print(f"error: {' '.join(message.split())}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 2


def _dispatch(options: argparse.Namespace, console: Console) -> None:
    if options.command == "list":
        _list(console)
    elif options.command == "report":
        _report(options, console)
    elif options.command == "compare":
        compare(options.before, options.after, console)
    elif options.command == "speed":
        run_speed(options, console)
    elif options.command == "lab":
        _at_least_one("threads", options.threads)
        torch.set_num_threads(options.threads or min(2, torch.get_num_threads()))
        run_lab(options.out or Path("results") / "lab", _source(options), console)
    else:
        study, name = _study(options)
        run_study(
            study,
            options.out or Path("results") / name,
            _source(options),
            console,
            jobs=options.jobs,
            part=_slice(getattr(options, "slice", None)),
            purpose="tuning" if options.command == "tune" else "report",
        )


def _study(options: argparse.Namespace) -> tuple[Study, str]:
    """The study that is asked for, and the name of its results."""
    for name in ("seeds", "epochs", "steps", "threads", "jobs", "trials"):
        _at_least_one(name, getattr(options, name, None))
    changes = {name: value for name in ("threads", "device") if (value := getattr(options, name)) is not None}
    if options.command == "study":
        return replace(DIGITS, **changes), "study"
    budget = {name: value for name in ("epochs", "steps", "seconds") if (value := getattr(options, name)) is not None}
    if len(budget) > 1:
        raise UsageError(f"--{' and --'.join(budget)} are two budgets; give one")
    changes |= {"budget": Budget(**budget), "budgets": {}} if budget else {}
    if options.methods:
        changes["methods"] = tuple(dict.fromkeys(options.methods))
    if options.seeds:
        changes["seeds"] = tuple(range(options.seeds))
    if options.study.endswith(".toml") or Path(options.study).is_file():
        file = Path(options.study)
        study = read_study(file)
        name = file.stem if file.stem != "study" else file.absolute().parent.name
        if options.methods and (lost := [one for one in study.methods if one not in options.methods]):
            gone = [label(one) for one in lost]
            changes |= {key: _without(getattr(study, key), gone) for key in ("settings", "spaces")}
    else:
        methods = changes.get("methods", MAIN)
        title = f"{problem(options.study).title}: {', '.join(map(title_of, methods))}"
        study, name = Study(title, (options.study,), MAIN), options.study.replace(":", "-")
    return replace(study, **changes, tuning=_tuning(options, study)), name


def _without(tables: object, methods: Sequence[str]) -> dict[str, object]:
    return {name: one for name, one in dict(tables).items() if name not in methods}  # type: ignore[call-overload]


def _tuning(options: argparse.Namespace, study: Study) -> Tuning | None:
    if options.command != "tune":
        return study.tuning
    asked = {"search": options.search, "trials": options.trials, "seeds": options.tuning_seeds}
    given = {name: value for name, value in asked.items() if value is not None}
    if "seeds" in given:
        given["seeds"] = tuple(given["seeds"])
    return replace(study.tuning or Tuning(), **given)


def _slice(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--slice must be I/N with I from 1 to N, such as 2/8, got {text!r}")
    return int(number), int(count)


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UsageError(f"--{name} must be a whole number from 1, got {value}")


def _source(options: argparse.Namespace) -> Path | None:
    named = options.data or os.environ.get("CURVLIB_DATA")
    if named is None:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise UsageError(f"the data folder {folder} does not exist; leave out --data (and CURVLIB_DATA) to download")
    return folder


def _list(console: Console) -> None:
    console.print("Problems", style="bold")
    for one in PROBLEMS.values():
        console.print(f"  {one.name:20} {one.title}: {one.source}", highlight=False, markup=False, soft_wrap=True)
    console.print("Methods, and where `tune` looks for their settings", style="bold")
    for method in METHODS.values():
        space = "; ".join(f"{name} {values}" for name, values in method.space.items())
        console.print(f"  {method.name:20} {method.title:24} {space}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        "  module:Class         any torch optimizer, such as torch.optim:AdamW", highlight=False, markup=False
    )


def _report(options: argparse.Namespace, console: Console) -> None:
    records: dict[str, Record] = {}
    for folder in options.folders:
        found = Results(folder).records()
        if not found:
            raise UsageError(f"{folder} holds no finished runs (expected {folder}/records.jsonl)")
        records |= {record.spec.key: record for record in found if record.spec.key not in records}
    first = options.folders[0]
    described = first / "study.toml"
    title = f"Report of {first.absolute().name}"
    chosen = list(records.values())
    if described.is_file():
        title = read_study(described).title
    if place := mixed(record for record in chosen if record.spec.purpose == "report"):
        if not described.is_file() or len(options.folders) > 1:
            raise UsageError(
                f"{first} holds runs of {place[1]} on {place[0]} that differ in settings or budget, and no study.toml that "
                "says which of them belong together; give the command of the study again: its finished runs are only read"
            )
        chosen = read_study(described).records(Results(first))
    report(chosen, options.out or first, title, console)
