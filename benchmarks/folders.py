"""Results folders as they are reported: the records of a folder's own study, of several folders together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .plan import StudyError
from .records import Record, RecordError, Results
from .sections import mixed
from .study import Chosen
from .study_file import read_study


@dataclass(frozen=True)
class Gathered:
    """What a report is made of.

    Args:
        title: of the report.
        records: of the runs, and of the trials.
        chosen: what tuning came to.
    """

    title: str
    records: Sequence[Record]
    chosen: Sequence[Chosen]


def gathered(folders: Sequence[Path]) -> Gathered:
    """What some folders hold; a run that several of them hold counts once.

    Raises:
        RecordError: where one holds nothing, or runs of several studies and not a word on which belong together.
    """
    parts = [_gathered(folder) for folder in dict.fromkeys(folders)]
    records: dict[str, Record] = {}
    for record in (record for part in parts for record in part.records):
        records.setdefault(record.spec.key, record)
    title = " and ".join(dict.fromkeys(part.title for part in parts))
    return Gathered(title, list(records.values()), _united([one for part in parts for one in part.chosen]))


def _united(chosen: Sequence[Chosen]) -> Sequence[Chosen]:
    """A slice of a study has not done the searches of the others: one that is over somewhere is over."""
    over = {(one.problem, one.method) for one in chosen if not one.missing}
    return [one for one in chosen if not one.missing or (one.problem, one.method) not in over]


def held(folder: Path) -> list[Record]:
    """The records of a folder.

    Raises:
        RecordError: where it has none.
    """
    found = Results(folder).records()
    if not found:
        raise RecordError(f"{folder} holds no finished runs (expected {folder}/records.jsonl)")
    return found


def _gathered(folder: Path) -> Gathered:
    records, described = held(folder), folder / "study.toml"
    several = mixed(record for record in records if record.spec.purpose == "report")
    title, reason = f"Report of {folder.absolute().name}", "it has no study.toml"
    if described.is_file():
        try:
            study, results = read_study(described), Results(folder)
            return Gathered(study.title, study.records(results) if several else records, study.chosen(results))
        except StudyError as error:  # such as one that names a module which is not here
            reason = str(error)
    if several:
        raise RecordError(
            f"{folder} holds runs of {several[1]} on {several[0]} that differ in settings or budget, and nothing says which "
            f"of them belong together ({reason}); give the command of the study again: its finished runs are only read"
        )
    return Gathered(title, records, ())
