"""Who does the runs of a study: this process alone, or several."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal

import torch

from .data import Data, DataError
from .methods import MethodError, title_of
from .naming import UnknownName, located, problem
from .records import Record, RecordError, Results, Spec
from .runner import execute
from .search import SearchError
from .study import Study

Tell = Callable[[Spec, float, float], None]
_PATIENCE = 60.0  # seconds in which a process saves its checkpoint after Ctrl-C


class RunError(RuntimeError):
    """A run that could not be done; says which, and why."""


@dataclass
class Outcome:
    """What came of a run that was given to somebody.

    Attributes:
        spec: the run.
        status: of its record; ``"elsewhere"`` where another process is busy with it; ``"failed"``.
        loss: the last training loss.
        reason: why it failed.
        fatal: whether others must fail as well.
    """

    spec: Spec
    status: Literal["finished", "diverged", "pruned", "elsewhere", "failed"]
    loss: float = float("nan")
    reason: str = ""
    fatal: bool = False


@dataclass(frozen=True)
class Place:
    """Where runs take their data from, and put what comes of them."""

    study: Study
    folder: Path
    source: Path | None
    threads: int
    device: str = "cpu"
    jobs: int = 1

    def settle(self) -> None:
        """Set up this process."""
        torch.set_num_threads(self.threads)

    def attempt(self, spec: Spec, results: Results, tell: Tell) -> Outcome:
        """Do a run; what goes wrong with it is an outcome, too."""
        try:
            record = execute(
                spec,
                load(spec.problem, self.source),
                results,
                lambda share, average: tell(spec, share, average),
                device=self.device,
                watch=self.study.watch(results, spec),
                jobs=self.jobs,
            )
        except (DataError, RecordError, SearchError, UnknownName) as error:
            return Outcome(spec, "failed", reason=str(error), fatal=True)
        except MethodError as error:
            return Outcome(spec, "failed", reason=str(error))
        except Exception as error:  # another package's optimizer may raise anything
            return Outcome(spec, "failed", reason=located(error))
        return Outcome(spec, "elsewhere") if record is None else _outcome(record)


def _outcome(record: Record) -> Outcome:
    return Outcome(record.spec, record.status, record.points[-1].train)  # type: ignore[arg-type]


@cache
def load(name: str, source: Path | None) -> Data:
    """The data of a problem, once in a process.

    Raises:
        DataError: where they cannot be had, or are fewer than a batch.
    """
    chosen = problem(name)
    try:
        data = chosen.load(source)
    except (DataError, OSError):
        raise
    except Exception as error:  # other people's problems may raise anything
        raise DataError(f"the data of {name} cannot be loaded, {located(error)}") from error
    if len(data.train) < chosen.batch_size:
        raise DataError(
            f"{name} has batches of {chosen.batch_size} examples, and {len(data.train)} to train on; its batch_size must "
            "be at most that"
        )
    return data


class Alone:
    """This process does one run at a time."""

    size = 1

    def __init__(self, place: Place, tell: Tell) -> None:
        self._place, self._tell, self._done = place, tell, list[Outcome]()
        self._results = Results(place.folder)
        place.settle()

    def start(self, spec: Spec) -> None:
        """Do a run."""
        self._done.append(self._place.attempt(spec, self._results, self._tell))

    def wait(self, seconds: float) -> list[Outcome]:
        """What was done since the last call."""
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        """Nothing is left to be stopped."""


@dataclass
class _Member:
    process: SpawnProcess
    line: Connection
    spec: Spec | None = None


@dataclass
class Team:
    """Several processes, each of which does one run at a time.

    Ctrl-C is heard by this process alone; the others are told to stop at the end of their step, and save. They do so as
    well when this process is gone.
    """

    place: Place
    tell: Tell
    size: int
    _members: list[_Member] = field(default_factory=list)
    _stop: Any = None

    def __post_init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which is inherited
        try:
            for number in range(self.size):
                mine, theirs = context.Pipe()
                place = self.place
                if place.device == "cuda":  # each to a GPU of its own, as far as they go
                    place = replace(place, device=f"cuda:{number % max(1, torch.cuda.device_count())}")
                process = context.Process(target=_work, args=(theirs, self._stop, place))
                process.start()
                theirs.close()
                self._members.append(_Member(process, mine))
        finally:
            signal.signal(signal.SIGINT, before)

    def start(self, spec: Spec) -> None:
        """Give a run to somebody who is free."""
        member = next(one for one in self._members if one.spec is None)
        member.spec = spec
        member.line.send(spec)

    def wait(self, seconds: float) -> list[Outcome]:
        """What was done since the last call, after at most some seconds."""
        done = []
        for line in wait([one.line for one in self._members], seconds):
            member = next(one for one in self._members if one.line is line)
            try:
                message = member.line.recv()
            except (EOFError, ConnectionError):
                member.process.join()
                doing = f"while {describe(member.spec)} ran" if member.spec else "at its start"
                raise RunError(
                    f"a process died {doing} (exit status {member.process.exitcode}); was the memory full? The same "
                    "command goes on, with a smaller --jobs"
                ) from None
            if isinstance(message, Outcome):
                member.spec = None
                done.append(message)
            elif member.spec is not None:
                self.tell(member.spec, *message)
        return done

    def close(self) -> None:
        """Let everybody save and go; a second Ctrl-C does not wait for them."""
        self._stop.set()
        try:
            for member in self._members:
                with suppress(OSError):
                    member.line.send(None)
            for member in self._members:
                member.process.join(_PATIENCE)
        finally:
            for member in self._members:
                if member.process.is_alive():
                    member.process.kill()


def _work(line: Connection, stop: Any, place: Place) -> None:
    parent = os.getppid()
    results, seen = Results(place.folder), [0.0]

    def tell(spec: Spec, share: float, average: float) -> None:
        if stop.is_set() or os.getppid() != parent:
            raise KeyboardInterrupt
        if share - seen[0] > 0.005 or share < seen[0]:
            seen[0] = share
            try:
                line.send((share, average))
            except ConnectionError:
                raise KeyboardInterrupt from None

    with suppress(KeyboardInterrupt, EOFError, ConnectionError):
        place.settle()
        while (spec := line.recv()) is not None:
            line.send(place.attempt(spec, results, tell))


def describe(spec: Spec) -> str:
    """A run in a line."""
    return f"{spec.problem} · {title_of(spec.method)} · seed {spec.seed}"
