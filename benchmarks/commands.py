"""What the commands of the command line do."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from .compare import compare
from .data import DataError
from .folders import gathered
from .lab import run_lab
from .methods import METHODS, MethodError, label, title_of
from .naming import UnknownName, problem
from .plan import Budget, Scope, StudyError
from .problems import PROBLEMS
from .records import BUDGETS, RecordError
from .search import SearchError
from .session import report, run_study
from .speed import SpeedError, run_speed
from .study import DIGITS, MAIN, Study, Tuning
from .study_file import read_study
from .team import RunError
from .terminal import Strip, say, show_table

_TABLES = ("settings", "spaces", "budgets", "schedules")


class UsageError(ValueError):
    """What a user asked for cannot be done; the message is all that is shown."""


ERRORS = (UsageError, StudyError, UnknownName, MethodError, DataError, RecordError, SearchError, RunError, SpeedError)


def attempt(options: argparse.Namespace, console: Console) -> int:
    """Do what was asked for; returns the exit status: 0, or 2 for what cannot be done, after saying why."""
    try:
        _dispatch(options, console)
    except ERRORS as error:
        return _fail(str(error), options, console)
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", options, console)
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
        found = gathered(options.folders)
        report(found, options.out or options.folders[0], console)
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
    if options.seeds:
        changes["seeds"] = tuple(range(options.seeds))
    if options.study.endswith(".toml") or Path(options.study).is_file():
        file = Path(options.study)
        study = read_study(file)
        _same_unit(study, budget)
        name = file.stem if file.stem != "study" else file.absolute().parent.name
        if options.methods:
            known = {label(one): one for one in study.methods}
            kept = tuple(dict.fromkeys(known.get(one, one) for one in options.methods))
            gone = {*known} - {label(one) for one in kept}
            tables = {key: _without(getattr(study, key), gone) for key in _TABLES}
            changes = {"methods": kept, **tables, **changes}
    else:
        methods = tuple(dict.fromkeys(options.methods or MAIN))
        title = f"{problem(options.study).title}: {', '.join(map(title_of, methods))}"
        study, name = Study(title, (options.study,), methods), options.study.replace(":", "-")
    return replace(study, **changes, tuning=_tuning(options, study)), name


def _same_unit(study: Study, budget: Mapping[str, float]) -> None:
    """Refuse a budget in whose unit a schedule of the file would mean something else."""
    courses = [study.course(*place) for place in study.places] if budget else []
    units = {name for course in courses if "schedule" in course for name in BUDGETS if name in course}
    if other := sorted(units - {*budget}):
        raise UsageError(
            f"--{next(iter(budget))}: step sizes of this study fall by {other[0]}; give --{other[0]}, or change the file"
        )


def _without(table: Mapping[Scope, object], gone: Set[str]) -> dict[Scope, object]:
    """What a table says of methods that are left."""
    return {place: one for place, one in table.items() if not gone & {*([place] if isinstance(place, str) else place)}}


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
    say("Problems", console, "bold")
    problems = PROBLEMS.values()
    show_table(
        [
            Strip("Name", [one.name for one in problems], left=True),
            Strip("Title", [one.title for one in problems], words=True, left=True),
            Strip("Source", [one.source for one in problems], words=True, left=True),
        ],
        console,
    )
    say("Methods, and where `tune` looks for their settings", console, "bold")
    methods = METHODS.values()
    spaces = ["; ".join(f"{name} {values}" for name, values in one.space.items()) for one in methods]
    show_table(
        [
            Strip("Name", [*(one.name for one in methods), "module:Class"], left=True),
            Strip("Title", [*(one.title for one in methods), "any torch optimizer"], words=True, left=True),
            Strip("Space", [*spaces, "such as torch.optim:AdamW; lr 0.0001 to 0.1, log"], words=True, left=True),
        ],
        console,
    )
