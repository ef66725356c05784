"""Studies: problems × methods × settings × seeds, and what is left to run of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .methods import check_titles, label, method
from .naming import nearest, problem
from .plan import (
    Budget,
    Schedule,
    Scope,
    StudyError,
    check_number,
    check_seeds,
    check_table,
    closest,
    known_keys,
    known_places,
)
from .records import Point, Record, Results, Spec
from .search import ENDS, SEARCHES, Trial, Watch, best, optuna_watch, score_of, trial_of
from .space import Space

__all__ = ["DIGITS", "MAIN", "Budget", "Chosen", "Schedule", "Study", "StudyError", "Tuning"]


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen, with the same number of trials for every method on every problem.

    Args:
        search: ``"grid"`` (1 and 3 of every power of ten, from the middle towards the best, until that is interior and the
            trials are spent), ``"random"`` (quasi-random) or ``"optuna"``.
        trials: settings that are tried.
        seeds: of the trials; the median over them counts. None of them may be a seed of the report.
    """

    search: str = "grid"
    trials: int = 12
    seeds: tuple[int, ...] = (100,)

    def __post_init__(self) -> None:
        if not isinstance(self.search, str) or self.search not in SEARCHES:
            raise StudyError(
                f"tuning.search is {self.search!r}{nearest(str(self.search), SEARCHES)} there are {', '.join(SEARCHES)}"
            )
        check_number("tuning.trials", self.trials)
        check_seeds("tuning.seeds", self.seeds)


@dataclass(frozen=True)
class Chosen:
    """What a search came to, of a method on a problem.

    Args:
        problem: its name.
        method: its name.
        settings: the best of the trials; none where no trial finished, or some are missing.
        trials: how many there were.
        missing: runs that are.
        open: settings whose best value lies at an end of what was tried, so that a better one may lie beyond.
    """

    problem: str
    method: str
    settings: Mapping[str, Any] | None
    trials: int
    missing: int
    open: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        title: of the report.
        problems: names, or ``module:NAME`` of one's own.
        methods: names, ``module:Class``, or ``Label=`` and one of these; see :func:`benchmarks.methods.method`.
        seeds: of the runs that are reported.
        budget: of every run, instead of each problem's own epochs.
        budgets: problem, label of a method, or (problem, label) -> its own; the closest counts.
        schedule: of the step sizes of every run, instead of the problem's own.
        schedules: as ``budgets``.
        settings: method -> settings, or problem -> settings there; what is not said is as the method has it.
        spaces: method -> setting -> the values that a search tries, where they are not fixed on a problem.
        tuning: how settings are chosen; without it methods have those that they are known with.
        threads: of torch, for a whole study; without it torch's choice, at most 2.
        device: where to train.

    Raises:
        StudyError: naming what is wrong.
        UnknownName, MethodError: where a problem or method is none.
    """

    title: str
    problems: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget | None = None
    budgets: Mapping[Scope, Budget] = field(default_factory=dict)
    schedule: Schedule | None = None
    schedules: Mapping[Scope, Schedule] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    spaces: Mapping[str, Space] = field(default_factory=dict)
    tuning: Tuning | None = None
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, names in (("problems", self.problems), ("methods", self.methods)):
            if not names or not all(isinstance(one, str) for one in names):
                raise StudyError(f"{name} must be a list of names, got {list(names)!r}")
            if len(set(map(label, names))) < len(names):
                raise StudyError(f"{name} must be different ones, got {', '.join(names)}")
        for one in self.problems:
            problem(one)
        for one in self.methods:
            method(one)
        check_titles(self.methods)
        check_seeds("seeds", self.seeds)
        if self.tuning is not None and (both := sorted({*self.seeds} & {*self.tuning.seeds})):
            raise StudyError(
                f"seeds {', '.join(map(str, both))} are of tuning and of the report; settings must be chosen on other seeds "
                "than they are reported on"
            )
        labels = [label(one) for one in self.methods]
        if both_named := sorted({*labels} & {*self.problems}):
            raise StudyError(f"{both_named[0]} is a problem and the label of a method; give the method another label")
        known_places("budget", self.budgets, self.problems, labels)
        known_places("schedule", self.schedules, self.problems, labels)
        known_keys("settings", self.settings, labels)
        known_keys("space", self.spaces, labels)
        for one, given in self.settings.items():
            check_table(f"settings.{one}", given, "{ lr = 0.1 }")
            known_keys(
                f"settings.{one}",
                {name: value for name, value in given.items() if isinstance(value, Mapping)},
                self.problems,
            )
            for name in {*given} & {*self.problems}:
                check_table(f"settings.{one}.{name}", given[name], "{ lr = 0.1 }")
            if twice := sorted({*given} & {*self.spaces.get(one, ())}):
                raise StudyError(f"settings.{one} and space.{one} both name {twice[0]}; fix it or search it")
        if self.spaces and self.tuning is None:
            raise StudyError("space is given, but nothing is tuned: add a table [tuning], or leave it out")
        if self.threads is not None:
            check_number("threads", self.threads)
        device = str(self.device).partition(":")[0]
        if self.device != "cpu" and device not in ("cuda", "mps", "xpu"):
            raise StudyError(f"device must be cpu, cuda, cuda:N, mps or xpu, got {self.device!r}")

    # -- what is run --------------------------------------------------------------------------------------------------

    def course(self, problem_name: str, method_name: str) -> dict[str, Any]:
        """Budget and schedule of a method on a problem, by name."""
        place = (problem_name, label(method_name))
        budget = closest(self.budget, self.budgets, *place) or Budget(epochs=problem(problem_name).epochs)
        schedule = closest(self.schedule, self.schedules, *place)
        named = {**vars(budget), "schedule": None if schedule is None else dict(vars(schedule))}
        return {name: value for name, value in named.items() if value is not None}

    def fixed_for(self, problem_name: str, method_name: str) -> dict[str, Any]:
        """Settings that are not searched. Where others are, what a method is known with on a problem does not count."""
        known = method(method_name)
        base = known.everywhere if self.tuning is not None else known.settings_for(problem_name)
        mine = self.settings.get(label(method_name), {})
        everywhere = {name: value for name, value in mine.items() if name not in self.problems}
        return {**base, **everywhere, **mine.get(problem_name, {})}

    def space_for(self, problem_name: str, method_name: str) -> Space:
        """Where settings are searched: as the study says, else in the method's own space, but for what is fixed."""
        mine = self.settings.get(label(method_name), {})
        fixed = {*mine, *mine.get(problem_name, {})}
        space = self.spaces.get(label(method_name), method(method_name).space)
        return {name: one for name, one in space.items() if name not in fixed}

    @property
    def places(self) -> list[tuple[str, str]]:
        """Every method on every problem."""
        return [(one, other) for one in self.problems for other in self.methods]

    def reported(self, results: Results, place: tuple[str, str]) -> list[Spec]:
        """The runs whose numbers are reported; none while their settings are not chosen."""
        if self.tuning is None:
            settings: dict[str, Any] = self.fixed_for(*place)
        else:
            choice = self.choice(results, place)
            if choice is None:
                return []
            settings = {**self.fixed_for(*place), **choice}
        return [Spec(*place, settings, seed, **self.course(*place)) for seed in self.seeds]

    def choice(self, results: Results, place: tuple[str, str]) -> Mapping[str, Any] | None:
        """What a search chose; none where it is not over, or no trial finished."""
        trials, missing = self.tried(results, place)
        leader = best(trials)
        return None if missing or leader is None else leader.settings

    def tried(self, results: Results, place: tuple[str, str]) -> tuple[list[Trial], list[Spec]]:
        """The trials of a method on a problem that are done, and the runs that the next ones miss."""
        assert self.tuning is not None
        space, fixed, score = self.space_for(*place), self.fixed_for(*place), self.score(place[0])
        propose, trials, missing = SEARCHES[self.tuning.search], list[Trial](), list[Spec]()
        while not missing and (proposed := propose(space, trials, self.tuning.trials)):
            for settings in proposed:
                specs = [
                    Spec(*place, {**fixed, **settings}, seed, purpose="tuning", **self.course(*place))
                    for seed in self.tuning.seeds
                ]
                records = [results.known(spec) for spec in specs]
                done = [record for record in records if record is not None]
                if len(done) == len(specs):
                    trials.append(trial_of(settings, done, score))
                else:
                    missing += [spec for spec, record in zip(specs, records, strict=True) if record is None]
        return trials, missing

    def watch(self, results: Results, spec: Spec) -> Watch | None:
        """Who gives up a hopeless trial, where the search does so: by the curves of earlier trials with the same seed."""
        if self.tuning is None or self.tuning.search != "optuna" or spec.purpose != "tuning":
            return None
        place = (spec.problem, spec.method)
        space, score = self.space_for(*place), self.score(spec.problem)
        earlier = [
            one
            for one in results.records()
            if (one.spec.problem, one.spec.method, one.spec.course) == (*place, spec.course)
        ]
        trials = [
            trial_of({name: one.spec.settings[name] for name in space}, [one], score)
            for one in earlier
            if one.spec.purpose == "tuning" and one.spec.seed == spec.seed and {*space} <= {*one.spec.settings}
        ]
        return optuna_watch(space, trials, score)

    def score(self, problem_name: str) -> Callable[[Point], float]:
        """What tuning minimises on a problem, of an evaluation."""
        judged = problem(problem_name)
        return score_of(judged.tunable, "lower" if judged.metric is None else judged.metric.better)

    def wanted(self, results: Results, purpose: str = "report", part: tuple[int, int] = (1, 1)) -> list[Spec]:
        """The runs that can be done now; none when nothing is left to do.

        They come seed by seed, so that methods whose times are compared run close together.

        Args:
            results: what is done.
            purpose: ``"tuning"`` leaves out the runs of the report.
            part: (i, n): the i-th of n slices: of all runs, or, where settings are searched, of methods on problems.
        """
        number, count = part
        mine = self.places if self.tuning is None else self.places[number - 1 :: count]
        searched, reported = list[Spec](), list[Spec]()
        for place in mine:
            if self.tuning is not None:
                searched += self.tried(results, place)[1]
            reported += self.reported(results, place) if purpose == "report" else []
        order = {place: at for at, place in enumerate(self.places)}
        reported.sort(key=lambda spec: (self.problems.index(spec.problem), spec.seed, order[spec.problem, spec.method]))
        if self.tuning is None:
            reported = reported[number - 1 :: count]
        return searched + [spec for spec in reported if results.known(spec) is None]

    def left(
        self, results: Results, purpose: str = "report", part: tuple[int, int] = (1, 1)
    ) -> dict[tuple[str, str], int]:
        """How many runs are left of every method on every problem, at most; see :meth:`wanted`."""
        if self.tuning is None:
            wanted = [(spec.problem, spec.method) for spec in self.wanted(results, purpose, part)]
            return {place: wanted.count(place) for place in self.places}
        left = {}
        for place in self.places[part[0] - 1 :: part[1]]:
            trials, missing = self.tried(results, place)
            seeds = len(self.tuning.seeds)
            most = self.tuning.trials if self.space_for(*place) else 1
            left[place] = max(len(missing), (most - len(trials)) * seeds if missing else 0)
            if purpose == "report" and (missing or best(trials) is not None):
                known = [results.known(spec) for spec in self.reported(results, place)]
                left[place] += len(self.seeds) - sum(record is not None for record in known)
        return left

    def records(self, results: Results) -> list[Record]:
        """What is done of this study, of all that a folder holds: trials, and the runs of the report."""
        specs = [spec for place in self.places for spec in self.reported(results, place)]
        found = [record for spec in specs if (record := results.known(spec)) is not None]
        if self.tuning is None:
            return found
        courses = {place: self.course(*place) for place in self.places}
        trials = [
            one for one in results.records() if one.spec.purpose == "tuning" and one.spec.seed in self.tuning.seeds
        ]
        return found + [one for one in trials if courses.get((one.spec.problem, one.spec.method)) == one.spec.course]

    def chosen(self, results: Results) -> list[Chosen]:
        """What the search came to, place by place; nothing where nothing is searched."""
        if self.tuning is None:
            return []
        found = []
        for place in self.places:
            trials, missing = self.tried(results, place)
            leader = None if missing else best(trials)
            ends = ENDS[self.tuning.search](self.space_for(*place), trials) if leader is not None else []
            settings = None if leader is None else leader.settings
            found.append(Chosen(*place, settings, len(trials), len(missing), tuple(ends)))
        return found


MAIN = ("kfac", "mbf", "mbf-samples", "shampoo", "adam", "sgd")
DIGITS = Study("Six optimizers on handwritten digits", ("digits-autoencoder", "digits-cnn"), MAIN, seeds=(0, 1, 2))
