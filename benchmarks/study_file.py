"""Study files: a study as TOML, read with every key and value checked, and written."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .methods import MethodError
from .naming import UnknownName, problem
from .records import BUDGETS, RecordError
from .space import Range, Space, dimension
from .study import Budget, Study, StudyError, Tuning, known_keys

_KEYS = {"space": "spaces"}
_NONE = "none"
_TABLES = ("budget", "settings", "space", "tuning")


def read_study(file: Path) -> Study:
    """A study from its TOML file.

    Raises:
        StudyError: naming the file and the key, its value, and what is allowed.
    """
    try:
        content = tomllib.loads(file.read_text())
        return study_of(content)
    except FileNotFoundError:
        raise StudyError(f"the study file {file} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, MethodError, UnknownName, RecordError) as error:
        raise StudyError(f"{file}: {error}") from None


def study_of(content: Mapping[str, Any]) -> Study:
    """A study from what its file holds."""
    names = [next((key for key, name in _KEYS.items() if name == one.name), one.name) for one in fields(Study)]
    known_keys("", content, [name for name in names if name != "budgets"])
    for name in ("title", "problems", "methods"):
        if name not in content:
            raise StudyError(f"{name} is missing; a study has title, problems and methods")
    given = dict(content)
    for name in ("problems", "methods", "seeds"):
        if name in given:
            given[name] = tuple(_list(name, given[name]))
    for name in _TABLES:
        if not isinstance(given.get(name, {}), Mapping):
            raise StudyError(f"{name} must be a table, got {given[name]!r}")
    if not isinstance(given["title"], str):
        raise StudyError(f"title must be a text, got {given['title']!r}")
    for name in given["problems"]:
        problem(name)  # before what is said of it
    budget, given["budgets"] = _budgets(given.pop("budget", {}), given["problems"])
    if "tuning" in given:
        known_keys("tuning", given["tuning"], [one.name for one in fields(Tuning)])
        seeds = {"seeds": tuple(_list("tuning.seeds", given["tuning"]["seeds"]))} if "seeds" in given["tuning"] else {}
        given["tuning"] = Tuning(**{**given["tuning"], **seeds})
    given["settings"] = _with_none(given.get("settings", {}))
    spaces = {name: _space(name, space) for name, space in given.pop("space", {}).items()}
    return Study(budget=budget, spaces=spaces, **given)


def _budgets(table: Mapping[str, Any], problems: Sequence[str]) -> tuple[Budget | None, dict[str, Budget]]:
    known_keys("budget", table, [*BUDGETS, *problems])
    own = {name: value for name, value in table.items() if name in BUDGETS}
    others = {}
    for name, value in table.items():
        if name not in BUDGETS:
            if not isinstance(value, Mapping):
                raise StudyError(f"budget.{name} must be a table such as {{ epochs = 10 }}, got {value!r}")
            known_keys(f"budget.{name}", value, BUDGETS)
            others[name] = Budget(**value)
    return (Budget(**own) if own else None), others


def _with_none(value: Any) -> Any:
    """TOML has no None; the text ``"none"`` stands for it."""
    if isinstance(value, Mapping):
        return {key: _with_none(one) for key, one in value.items()}
    return None if value == _NONE else value


def _space(name: str, table: Any) -> Space:
    if not isinstance(table, Mapping):
        raise StudyError(f"space.{name} must be a table of settings, got {table!r}")
    found = {}
    for setting, value in table.items():
        try:
            found[setting] = dimension(value)
        except ValueError as error:
            raise StudyError(f"space.{name}.{setting}: {error}") from None
    return found


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise StudyError(f"{name} must be a list, got {value!r}")
    return value


def written(study: Study) -> str:
    """The study as a TOML file."""
    lines = [
        f"title = {_toml(study.title)}",
        f"problems = {_toml(study.problems)}",
        f"methods = {_toml(study.methods)}",
    ]
    lines += [f"seeds = {_toml(study.seeds)}", f"device = {_toml(study.device)}"]
    lines += [] if study.threads is None else [f"threads = {study.threads}"]
    if study.budget is not None:
        lines += _table("budget", study.budget)
    for name, budget in study.budgets.items():
        lines += _table(f"budget.{_key(name)}", budget)
    if study.tuning is not None:
        lines += _table("tuning", study.tuning)
    for name, settings in study.settings.items():
        nested = {key: value for key, value in settings.items() if key in study.problems}
        lines += _table(f"settings.{_key(name)}", {key: one for key, one in settings.items() if key not in nested})
        for key, value in nested.items():
            lines += _table(f"settings.{_key(name)}.{_key(key)}", value)
    for name, space in study.spaces.items():
        lines += _table(f"space.{_key(name)}", space)
    return "\n".join(lines) + "\n"


def _table(name: str, content: Any) -> list[str]:
    if not isinstance(content, Mapping):
        content = {key: value for key, value in vars(content).items() if value is not None}
    return ["", f"[{name}]", *(f"{_key(key)} = {_toml(value)}" for key, value in content.items())]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _toml(value: Any) -> str:
    value = _NONE if value is None else value
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Range):
        return f'{{ low = {value.low!r}, high = {value.high!r}, scale = "{value.scale}" }}'
    values = getattr(value, "values", value)
    if isinstance(values, Sequence):
        return f"[{', '.join(map(_toml, values))}]"
    return repr(value)
