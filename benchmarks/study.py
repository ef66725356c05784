"""Studies: problems × methods × settings × seeds, and what is left to run of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .methods import label, method
from .naming import nearest, problem
from .records import BUDGETS, Point, Record, Results, Spec
from .search import SEARCHES, Trial, Watch, best, open_ends, optuna_watch, score_of, trial_of
from .space import Space


class StudyError(ValueError):
    """A study that cannot be made; names the key, its value, and what is allowed."""


@dataclass(frozen=True)
class Budget:
    """How long a run trains: one of these."""

    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}
        if len(given) != 1:
            raise StudyError(f"budget must have one of {', '.join(BUDGETS)}, got {', '.join(given) or 'none'}")
        for name, value in given.items():
            check_number(f"budget.{name}", value, whole=name != "seconds")


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
        if self.search not in SEARCHES:
            raise StudyError(
                f"tuning.search is {self.search!r}{nearest(str(self.search), SEARCHES)} there are {', '.join(SEARCHES)}"
            )
        check_number("tuning.trials", self.trials)
        check_seeds("tuning.seeds", self.seeds)


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        title: of the report.
        problems: names, or ``module:NAME`` of one's own.
        methods: names, ``module:Class``, or ``Label=`` and one of these; see :func:`benchmarks.methods.method`.
        seeds: of the runs that are reported.
        budget: of every run, instead of each problem's own epochs.
        budgets: problem -> its budget.
        settings: method -> settings, or problem -> settings there; what is not said is as the method has it.
        spaces: method -> setting -> the values that a search tries.
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
    budgets: Mapping[str, Budget] = field(default_factory=dict)
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
        check_seeds("seeds", self.seeds)
        if self.tuning is not None and (both := sorted({*self.seeds} & {*self.tuning.seeds})):
            raise StudyError(
                f"seeds {', '.join(map(str, both))} are of tuning and of the report; settings must be chosen on other seeds "
                "than they are reported on"
            )
        known_keys("budget", self.budgets, self.problems)
        for name, given in (("settings", self.settings), ("space", self.spaces)):
            known_keys(name, given, [label(one) for one in self.methods])
        if self.spaces and self.tuning is None:
            raise StudyError("space is given, but nothing is tuned: add a table [tuning], or leave it out")
        if self.threads is not None:
            check_number("threads", self.threads)
        if not (self.device == "cpu" or self.device.partition(":")[0] in ("cuda", "mps", "xpu")):
            raise StudyError(f"device must be cpu, cuda, cuda:N, mps or xpu, got {self.device!r}")

    # -- what is run --------------------------------------------------------------------------------------------------

    def budget_for(self, problem_name: str) -> dict[str, Any]:
        """The budget on a problem, by name."""
        chosen = self.budgets.get(problem_name) or self.budget or Budget(epochs=problem(problem_name).epochs)
        return {name: value for name, value in vars(chosen).items() if value is not None}

    def fixed_for(self, problem_name: str, method_name: str) -> dict[str, Any]:
        """Settings that are not searched. Where others are, what a method is known with on a problem does not count."""
        known = method(method_name)
        base = known.everywhere if self.tuning is not None else known.settings_for(problem_name)
        mine = self.settings.get(label(method_name), {})
        everywhere = {name: value for name, value in mine.items() if name not in self.problems}
        return {**base, **everywhere, **mine.get(problem_name, {})}

    def space_for(self, problem_name: str, method_name: str) -> Space:
        """Where settings are searched: as the study says, else the method's own space but for what is fixed."""
        given = self.spaces.get(label(method_name))
        if given is not None:
            return given
        mine = self.settings.get(label(method_name), {})
        fixed = {*mine, *mine.get(problem_name, {})}
        return {name: one for name, one in method(method_name).space.items() if name not in fixed}

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
        return [Spec(*place, settings, seed, **self.budget_for(place[0])) for seed in self.seeds]

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
                    Spec(*place, {**fixed, **settings}, seed, purpose="tuning", **self.budget_for(place[0]))
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
            if (one.spec.problem, one.spec.method, one.spec.budget) == (*place, spec.budget)
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
            left[place] = max(len(missing), (self.tuning.trials - len(trials)) * seeds if missing else 0)
            if purpose == "report":
                known = [results.known(spec) for spec in self.reported(results, place)]
                left[place] += len(self.seeds) - sum(record is not None for record in known)
        return left

    def records(self, results: Results) -> list[Record]:
        """What is done of this study, of all that a folder holds: trials, and the runs of the report."""
        specs = [spec for place in self.places for spec in self.reported(results, place)]
        found = [record for spec in specs if (record := results.known(spec)) is not None]
        if self.tuning is None:
            return found
        budgets = {name: self.budget_for(name) for name in self.problems}
        trials = [
            one for one in results.records() if one.spec.purpose == "tuning" and one.spec.seed in self.tuning.seeds
        ]
        return found + [
            one
            for one in trials
            if (one.spec.problem, one.spec.method) in self.places
            and budgets[one.spec.problem].items() <= one.spec.content().items()
        ]

    def edges(self, results: Results) -> Iterator[tuple[str, str, list[str]]]:
        """(problem, method, settings) whose best value on the grid has an untried neighbour."""
        if self.tuning is None or self.tuning.search != "grid":
            return
        for place in self.places:
            trials, missing = self.tried(results, place)
            if not missing and (ends := open_ends(self.space_for(*place), trials)):
                yield *place, ends


def known_keys(where: str, given: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Refuse what nobody asked for, with the nearest key."""
    for name in given:
        if name not in allowed:
            place = f"in {where}" if where else "of a study"
            raise StudyError(f"unknown key {name!r} {place}{nearest(name, allowed)} there are {', '.join(allowed)}")


def check_number(name: str, value: Any, whole: bool = True) -> None:
    """Refuse what is no number above zero."""
    is_number = isinstance(value, int) if whole else isinstance(value, int | float)
    if isinstance(value, bool) or not is_number or not value > 0:
        raise StudyError(f"{name} must be a {'whole ' * whole}number {'from 1' if whole else 'above 0'}, got {value!r}")


def check_seeds(name: str, seeds: Sequence[Any]) -> None:
    """Refuse what are no different seeds."""
    whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise StudyError(f"{name} must be different whole numbers from 0, got {list(seeds)!r}")


MAIN = ("kfac", "mbf", "mbf-samples", "shampoo", "adam", "sgd")
DIGITS = Study("Six optimizers on handwritten digits", ("digits-autoencoder", "digits-cnn"), MAIN, seeds=(0, 1, 2))
