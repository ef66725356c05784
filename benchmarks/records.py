"""Records: what a run is, what came of it, and a folder of them that loses none.

A results folder holds ``records.jsonl``, one run a line, to which is only ever appended: under a lock, and flushed to the
disk before a run counts as done. Folders are merged by ``cat a/records.jsonl >> b/records.jsonl``.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from .environment import environment

__all__ = ["PARTS", "Point", "Record", "RecordError", "Results", "Spec", "environment", "write_whole"]

PARTS = ("forward and backward", "statistics", "refresh", "precondition and apply", "rest")
"""What the training time of a run is split into."""

BUDGETS = ("epochs", "steps", "seconds")
_ABANDONED = 3600.0  # seconds after which nobody is still writing a file
_MEASURED = ("step_seconds", "parts", "peak", "environment", "note", "warnings")


class RecordError(ValueError):
    """A file of a results folder that cannot be read or written; says which, and the way out."""


@dataclass(frozen=True, eq=False)
class Spec:
    """Everything that decides the numbers of a run.

    Args:
        problem: its name.
        method: its name.
        settings: of the optimizer: numbers, texts, and lists of them.
        seed: of initialisation, data order and sampled labels.
        epochs: the budget ...
        steps: ... or this ...
        seconds: ... or this, of training.
        schedule: the fields of a :class:`~benchmarks.plan.Schedule`, where step sizes do not fall as the problem has it.
        purpose: ``"tuning"`` for a run that a search made to choose settings; it is judged on validation data where the
            problem has such.

    Raises:
        RecordError: for settings that cannot be written down, and for no budget or several.
    """

    problem: str
    method: str
    settings: Mapping[str, Any]
    seed: int
    epochs: int | None = None
    steps: int | None = None
    seconds: float | None = None
    schedule: Mapping[str, float] | None = None
    purpose: Literal["report", "tuning"] = "report"

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", {name: _plain(name, one) for name, one in sorted(self.settings.items())})
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecordError(f"a run has one budget of {', '.join(BUDGETS)}, got {' and '.join(given) or 'none'}")

    @property
    def key(self) -> str:
        """A hash of the contents: equal runs have equal names, whatever code ran them."""
        return hashlib.sha256(json.dumps(_equal(self.content()), sort_keys=True).encode()).hexdigest()[:16]

    def content(self) -> dict[str, Any]:
        """All that is not left at its default, by name."""
        named = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in named.items() if value is not None and (name, value) != _REPORT}

    @property
    def length(self) -> tuple[float, str]:
        """The budget and its unit, such as ``(20, "epochs")``."""
        return next((value, name) for name in BUDGETS if (value := getattr(self, name)) is not None)

    @property
    def budget(self) -> str:
        """Such as ``"20 epochs"`` or ``"1 epoch"``."""
        return counted(*self.length)

    @property
    def course(self) -> dict[str, Any]:
        """Budget and schedule, by name."""
        return {name: value for name, value in self.content().items() if name in (*BUDGETS, "schedule")}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.content() == other.content()

    def __hash__(self) -> int:
        return hash(self.key)


_REPORT = ("purpose", "report")


@dataclass(frozen=True)
class Point:
    """One evaluation, after ``step`` steps and ``seconds`` of training.

    Args:
        step: steps taken.
        seconds: of training, evaluation excluded.
        train: training loss, a running average over batches.
        test: held-out loss.
        metric: the problem's metric on held-out data.
    """

    step: int
    seconds: float
    train: float
    test: float
    metric: float = math.nan


@dataclass(frozen=True)
class Record:
    """What came of a run.

    Attributes:
        spec: what was run.
        status: ``"finished"``, ``"diverged"`` with the step in the last point, or ``"pruned"`` by a search.
        points: evaluations.
        step_seconds: median time of a training step.
        memory: bytes of optimizer state, at the end.
        environment: versions, hardware, threads, precision.
        parts: training time in seconds by :data:`PARTS`; it adds up to that of the last point.
        peak: most bytes that the process (or GPU) held during the run.
        note: what a reader must know of its data.
        warnings: what was warned of in the run, or is to be known of how it went.
    """

    spec: Spec
    status: str
    points: tuple[Point, ...]
    step_seconds: float
    memory: int
    environment: Mapping[str, Any]
    parts: Mapping[str, float] = field(default_factory=dict)
    peak: int = 0
    note: str = ""
    warnings: Sequence[str] = ()

    def line(self) -> str:
        """The record as one line of JSON, which has no word for what is not finite but texts."""
        columns = {one.name: [_written(getattr(point, one.name)) for point in self.points] for one in fields(Point)}
        content = {one.name: getattr(self, one.name) for one in fields(self)}
        content |= {"spec": self.spec.content(), "points": columns, "parts": dict(self.parts)}
        return json.dumps({"key": self.spec.key, **content}, allow_nan=False, default=dict)

    @staticmethod
    def of(line: str | bytes) -> Record:
        """A record from its line.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: where it is none.
        """
        content = json.loads(line)
        content.pop("key")
        columns = {name: [_read(value) for value in column] for name, column in content.pop("points").items()}
        points = tuple(Point(*row) for row in zip(*(columns[one.name] for one in fields(Point)), strict=True))
        if not points:
            raise ValueError("no points")
        return Record(spec=Spec(**content.pop("spec")), points=points, **content)

    def reproducible(self) -> dict[str, Any]:
        """Everything that a second run, or a resumed one, must have equal: all but times, peaks and where it was."""
        content = json.loads(self.line())
        del content["points"]["seconds"]
        return {name: value for name, value in content.items() if name not in _MEASURED}


class Results:
    """A folder of records; any number of processes may use it at once.

    Args:
        folder: the folder; it is made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "records.jsonl"
        self._records: dict[str, Record] = {}
        self._read, self._lines = 0, 0

    def records(self) -> list[Record]:
        """All records, in the order in which they came; a run that stands there twice is told once.

        Raises:
            RecordError: naming the line that is no record. The last one may be half written, and does not count.
        """
        self._refresh()
        return list(self._records.values())

    def _refresh(self) -> None:
        size = self.file.stat().st_size if self.file.is_file() else 0
        if size < self._read:
            self._records, self._read, self._lines = {}, 0, 0
        if size > self._read:
            with self.file.open("rb") as file:
                file.seek(self._read)
                for line in file:
                    if line.endswith(b"\n"):
                        self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            if line.strip():
                record = Record.of(line)
                self._records.setdefault(record.spec.key, record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise RecordError(
                f"{self.file}:{self._lines + 1} is no record of a run ({type(error).__name__}: {reason[:120]}); remove "
                "that line, and its run is done again"
            ) from None
        self._read += len(line)
        self._lines += 1

    def known(self, spec: Spec) -> Record | None:
        """The record of a run, if it is done."""
        self._refresh()
        return self._records.get(spec.key)

    def add(self, record: Record) -> None:
        """Append a record; when this returns it is on the disk.

        Raises:
            RecordError: where it cannot be written; what was there before is unharmed.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                _append(self.file, record.line().encode() + b"\n")
        except OSError as error:
            raise unwritten(self.file, error) from None

    def checkpoint(self, spec: Spec) -> Path:
        """Where an unfinished run is kept."""
        return self.folder / "checkpoints" / spec.key

    def claim(self, spec: Spec) -> FileLock | None:
        """The lock of a run, for whoever does it, or nothing where another process does; a dead one holds none.

        Look at :meth:`known` once more when it is held, and :meth:`leave` it at the end.
        """
        file = self.checkpoint(spec).with_suffix(".lock")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(file, blocking=False)
            lock.acquire()
        except Timeout:
            return None
        except OSError as error:
            raise unwritten(file, error) from None
        return lock

    def leave(self, spec: Spec, lock: FileLock) -> None:
        """Give the lock of a run back; where that is done, what was kept for it goes too."""
        if spec.key in self._records:
            for file in (self.checkpoint(spec), *_partials(self.checkpoint(spec)), Path(lock.lock_file)):
                file.unlink(missing_ok=True)
        lock.release()


def counted(amount: float, unit: str) -> str:
    """An amount of what is named in the plural, such as ``"1 epoch"``."""
    return f"{amount:g} {unit.removesuffix('s') if amount == 1 else unit}"


def unwritten(file: Path, error: OSError) -> RecordError:
    """What to tell where a file could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RecordError(
            f"{file} could not be written, the disk is full; nothing that was written before is lost: make room and give "
            "the same command again, it goes on from the last checkpoint"
        )
    return RecordError(f"{error.filename or file} could not be written: {error.strerror or error}")


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that it is never seen half written, not even after a power cut.

    Raises:
        RecordError: where the disk is full; what was there before is unharmed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in _partials(file):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise unwritten(file, error) from None


def _partials(file: Path) -> list[Path]:
    """What processes that write a file have begun, or had when they were killed."""
    return list(file.parent.glob(f"{glob.escape(file.name)}.*.partial"))


def _append(file: Path, line: bytes) -> None:
    """Add a whole line at the end, or nothing."""
    with file.open("a+b") as opened:
        end = opened.seek(0, os.SEEK_END)
        start = _whole(opened, end)
        if start < end:
            opened.truncate(start)
        try:
            _write(opened.fileno(), line)
            os.fsync(opened.fileno())
        except OSError:
            os.ftruncate(opened.fileno(), start)
            raise


def _write(descriptor: int, content: bytes) -> None:
    """All of it, since a disk that fills up takes a part first."""
    while content:
        content = content[os.write(descriptor, content) :]


def _whole(opened: Any, end: int) -> int:
    """Where the last whole line ends; what comes after it was cut off by a crash."""
    opened.seek(max(0, end - 1))
    if not end or opened.read(1) == b"\n":
        return end
    opened.seek(0)
    return int(opened.read().rfind(b"\n")) + 1


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(name, one) for one in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise RecordError(
        f"setting {name} must be a finite number, a text, a truth value, none, or a list of them, got {value!r}; what is "
        "more belongs into a function or class of your own, named as module:name"
    )


def _equal(value: Any) -> Any:
    """Equal numbers as one text: 1.0 is 1."""
    if isinstance(value, Mapping):
        return {name: _equal(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_equal(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _written(value: float) -> float | str:
    return value if math.isfinite(value) else str(float(value))


def _read(value: float | str) -> float:
    return float(value) if isinstance(value, str) else value
