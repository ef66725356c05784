"""Studies: problems × methods × seeds, with a progress display, that resume where they stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .data import Data
from .methods import METHODS
from .problems import PROBLEMS
from .records import Record, Spec
from .report import write_report
from .runner import execute, results_file, steps_of
from .terminal import show


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        title: of the report.
        problems: their names.
        methods: their names.
        seeds: of the runs.
        epochs: the budget instead of each problem's own.
    """

    title: str
    problems: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    epochs: int | None = None

    def specs(self) -> list[Spec]:
        """All runs: seed by seed, so that methods whose times are compared run close together."""
        return [
            Spec(problem, method, METHODS[method].settings_for(problem), seed, self.epochs or PROBLEMS[problem].epochs)
            for problem in self.problems
            for seed in self.seeds
            for method in self.methods
        ]


MAIN = ("kfac", "mbf", "mbf-samples", "shampoo", "adam", "sgd")
DIGITS = Study("Six optimizers on handwritten digits", ("digits-autoencoder", "digits-cnn"), MAIN, seeds=(0, 1, 2))


def run_study(study: Study, folder: Path, source: Path | None, console: Console) -> list[Record]:
    """Run what is not finished yet, and report everything.

    Args:
        study: what to run.
        folder: for records and the report.
        source: a folder with data, or ``None`` for each problem's default source.
        console: for progress and the tables.

    Raises:
        KeyboardInterrupt: after saving the run in progress.
    """
    specs = study.specs()
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    data: dict[str, Data] = {name: PROBLEMS[name].load(source) for name in study.problems}
    steps = [
        steps_of(PROBLEMS[spec.problem], data[spec.problem], spec.epochs or PROBLEMS[spec.problem].epochs)
        for spec in specs
    ]
    records = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("starting", total=sum(steps))
        done = 0
        for number, (spec, total) in enumerate(zip(specs, steps, strict=True), start=1):
            label = f"{spec.problem} · {METHODS[spec.method].title} · seed {spec.seed}"
            known = results_file(folder, spec).is_file()

            def advance(step: int, _: int, average: float, done: int = done, label: str = label) -> None:
                progress.update(task, completed=done + step, description=f"{label} · loss {average:.4g}")

            record = execute(spec, data[spec.problem], folder, advance)
            done += total
            progress.update(task, completed=done)
            records.append(record)
            outcome = "known already" if known else record.status
            console.print(
                f"[{number}/{len(specs)}] {label}: {outcome}, loss {record.points[-1].train:.4g}",
                highlight=False,
                markup=False,
            )
    show(records, console, study.title)
    page = write_report(records, folder, study.title)
    console.print(f"Report: {page.resolve()}", highlight=False, markup=False, soft_wrap=True)
    return records
