"""Sessions: what is left of a study is run, with a progress display, until nothing is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from .display import Display
from .methods import method
from .naming import problem
from .records import Record, Results, Spec, write_whole
from .report import write_report
from .study import Study
from .study_file import written
from .team import Alone, Outcome, Place, RunError, Team, describe, load
from .terminal import show

_PAUSE = 1.0  # seconds between looks at what other processes do


def run_study(
    study: Study,
    folder: Path,
    source: Path | None,
    console: Console,
    *,
    jobs: int = 1,
    part: tuple[int, int] = (1, 1),
    purpose: str = "report",
) -> list[Record]:
    """Run what is not finished yet, and report everything.

    Args:
        study: what to run.
        folder: for records and the report.
        source: a folder with data, or ``None`` for each problem's default source.
        console: for progress and the tables.
        jobs: processes.
        part: (i, n): only the i-th of n slices.
        purpose: ``"tuning"`` stops when settings are chosen.

    Raises:
        KeyboardInterrupt: after saving the runs in progress.
        RunError: at the end, where runs failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    results.records()
    for name in study.problems:
        load(name, source)
    threads = study.threads or (min(2, torch.get_num_threads()) if jobs == 1 else torch.get_num_threads())
    threads = max(1, threads // jobs)
    if jobs > 1:
        console.print(
            f"{jobs} runs at once, each on {threads} of torch's threads: their times share the machine and are no "
            "measurement; steps, losses and memory are.",
            style="yellow",
            highlight=False,
        )
    check(study, source)
    write_whole(folder / "study.toml", written(study).encode())
    failed = _run(study, results, Place(study, folder, source, threads, study.device), console, jobs, part, purpose)
    records = study.records(results)
    if purpose == "tuning":
        tell_choices(study, results, console)
    else:
        report(records, folder, study.title, console)
    if failed:
        raise RunError(
            f"{len(failed)} of the runs failed, all others are done; the first, {describe(failed[0].spec)}: "
            f"{failed[0].reason}"
        )
    return records


def check(study: Study, source: Path | None) -> None:
    """Make every model and optimizer once, so that what cannot work is said before anything runs.

    Raises:
        MethodError: where an optimizer refuses its settings.
    """
    for name in study.problems:
        chosen = problem(name)
        with torch.random.fork_rng(devices=[]):
            model = chosen.build(load(name, source))
        for other in study.methods:
            settings = study.fixed_for(name, other)
            if study.tuning is not None:
                settings |= {key: one.grid(0) for key, one in study.space_for(name, other).items()}
            settings.pop("warm_start", None)
            method(other).optimizer(model, settings)


def _run(
    study: Study,
    results: Results,
    place: Place,
    console: Console,
    jobs: int,
    part: tuple[int, int],
    purpose: str,
) -> list[Outcome]:
    failed: list[Outcome] = []
    running: set[Spec] = set()
    elsewhere: dict[Spec, float] = {}
    with Display(study, results, console, jobs, part, purpose) as display:
        team = Alone(place, display.tell) if jobs == 1 else Team(place, display.tell, jobs)
        try:
            while True:
                ends = {outcome.spec for outcome in failed}
                wanted = [spec for spec in study.wanted(results, purpose, part) if spec not in ends | running]
                if not wanted and not running:
                    return failed
                now = time.monotonic()
                free = [spec for spec in wanted if now - elsewhere.get(spec, 0.0) > _PAUSE]
                for spec in free[: team.size - len(running)]:
                    running.add(spec)
                    display.begin(spec)
                    team.start(spec)
                if not running:
                    display.others(len(wanted))
                    time.sleep(_PAUSE / 2)
                for outcome in team.wait(_PAUSE):
                    running.discard(outcome.spec)
                    if outcome.fatal:
                        raise RunError(outcome.reason)
                    if outcome.status == "elsewhere":
                        elsewhere[outcome.spec] = time.monotonic()
                    elif outcome.status == "failed":
                        failed.append(outcome)
                    display.end(outcome)
        finally:
            team.close()


def tell_choices(study: Study, results: Results, console: Console) -> None:
    """Print what a search chose."""
    warned = {(name, other): ends for name, other, ends in study.edges(results)}
    for place in study.places:
        trials, missing = study.tried(results, place)
        chosen = study.choice(results, place)
        if missing:
            text = f"{len(missing)} runs are missing"
        elif chosen is None:
            text = "no trial finished"
        else:
            text = ", ".join(f"{name} = {value}" for name, value in chosen.items())
            if place in warned:
                text += f" (neighbours in {', '.join(warned[place])} were not tried: give more trials)"
        console.print(f"{place[0]:20} {place[1]:20} {len(trials):3} trials: {text}", highlight=False, markup=False)


def report(records: Sequence[Record], folder: Path, title: str, console: Console) -> None:
    """Print the tables and write the report of what is done."""
    reported = [record for record in records if record.spec.purpose == "report"]
    trials = [record for record in records if record.spec.purpose == "tuning"]
    if not reported:
        console.print("Nothing is done yet of what would be reported.", highlight=False)
        return
    show(reported, console, title)
    page = write_report(reported, folder, title, trials)
    console.print(f"Report: {page.resolve()}", highlight=False, markup=False, soft_wrap=True)
