"""Sessions: what is left of a study is run, with a progress display, until nothing is."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from .display import Display
from .folders import Gathered
from .methods import method, title_of
from .naming import located, problem
from .records import Record, Results, Spec, write_whole
from .report import write_report
from .runner import gathered_warnings
from .sections import settings_text
from .study import Study
from .study_file import written
from .summary import how_chosen
from .team import Alone, Outcome, Place, RunError, Team, describe, load
from .terminal import Strip, say, show, show_table

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
    results.records()  # what is damaged is said before anything runs
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
    failed = _run(
        study, results, Place(study, folder, source, threads, study.device, jobs), console, jobs, part, purpose
    )
    records = study.records(results)
    if purpose == "tuning":
        show_choices(study, results, console)
    else:
        report(Gathered(study.title, records, study.chosen(results)), folder, console)
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
        RunError: where a model cannot be built, or the device is not here.
    """
    try:
        torch.empty(0, device=study.device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        raise RunError(f"nothing can run on the device {study.device!r}: {str(error).splitlines()[0]}") from error
    for name in study.problems:
        chosen = problem(name)
        with torch.random.fork_rng(devices=[]), gathered_warnings([]):  # runs record what is warned of
            data = load(name, source)
            try:
                model = chosen.build(data)
            except Exception as error:  # other people's models may raise anything
                raise RunError(f"the model of {name} cannot be built, {located(error)}") from error
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


def show_choices(study: Study, results: Results, console: Console) -> None:
    """Print what a search chose."""
    for name in study.problems:
        mine = [one for one in study.chosen(results) if one.problem == name]
        say(problem(name).title, console, "table.title")
        strips = [Strip("Method", [title_of(one.method) for one in mine], words=True, left=True)]
        strips.append(Strip("Settings", [settings_text(one.settings or {}) for one in mine], words=True, left=True))
        show_table([*strips, Strip("Chosen", list(map(how_chosen, mine)), words=True, left=True)], console)


def report(gathered: Gathered, folder: Path, console: Console) -> None:
    """Print the tables and write the report of what is done."""
    reported = [record for record in gathered.records if record.spec.purpose == "report"]
    trials = [record for record in gathered.records if record.spec.purpose == "tuning"]
    if not reported and not trials:
        say("Nothing is done yet of what would be reported.", console)
        return
    show(reported, console, gathered.title, gathered.chosen)
    page = write_report(reported, folder, gathered.title, trials, gathered.chosen)
    console.print(f"Report: {page.resolve()}", highlight=False, markup=False, soft_wrap=True)
