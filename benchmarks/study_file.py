"""Study files: a study as TOML, read with every key and value checked, and written."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from .methods import MethodError, label
from .naming import UnknownName, problem
from .plan import Budget, Schedule, Scope, StudyError, check_table, known_keys
from .records import RecordError
from .space import Range, Space, dimension
from .study import Study, Tuning

T = TypeVar("T")
_KEYS = {"space": "spaces"}
_NONE = "none"
_PLACED: Mapping[str, tuple[str, type]] = {"budget": ("budgets", Budget), "schedule": ("schedules", Schedule)}
_TABLES = {
    "budget": "{ epochs = 10 }",
    "schedule": "{ factor = 0.1, every = 60 }",
    "settings": "{ adam = { lr = 0.1 } }",
    "space": "{ adam = { lr = { low = 1e-4, high = 1e-1 } } }",
    "tuning": "{ trials = 12 }",
}


def read_study(file: Path) -> Study:
    """A study from its TOML file; modules that lie beside it can be named in it.

    Raises:
        StudyError: naming the file and the key, its value, and what is allowed.
    """
    try:
        content = tomllib.loads(file.read_text())
        if (folder := str(file.absolute().parent)) not in sys.path:
            sys.path.append(folder)  # where methods and problems of one's own lie beside it
        return study_of(content)
    except FileNotFoundError:
        raise StudyError(f"the study file {file} does not exist") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValueError, MethodError, UnknownName, RecordError) as error:
        raise StudyError(f"{file}: {error}") from None


def study_of(content: Mapping[str, Any]) -> Study:
    """A study from what its file holds."""
    names = [next((key for key, name in _KEYS.items() if name == one.name), one.name) for one in fields(Study)]
    known_keys("", content, [name for name in names if name not in {several for several, _ in _PLACED.values()}])
    for name in ("title", "problems", "methods"):
        if name not in content:
            raise StudyError(f"{name} is missing; a study has title, problems and methods")
    given = dict(content)
    for name, kind in (("problems", str), ("methods", str), ("seeds", object)):
        if name in given:
            given[name] = tuple(_list(name, given[name], kind))
    for name, example in _TABLES.items():
        check_table(name, given.get(name, {}), example)
    if not isinstance(given["title"], str):
        raise StudyError(f"title must be a text, got {given['title']!r}")
    for name in given["problems"]:
        problem(name)  # before what is said of it
    labels = [label(name) for name in given["methods"]]
    for name, (several, placed) in _PLACED.items():
        given[name], given[several] = _placed(name, placed, given.get(name, {}), given["problems"], labels)
    if "tuning" in given:
        known_keys("tuning", given["tuning"], [one.name for one in fields(Tuning)])
        seeds = {"seeds": tuple(_list("tuning.seeds", given["tuning"]["seeds"]))} if "seeds" in given["tuning"] else {}
        given["tuning"] = Tuning(**{**given["tuning"], **seeds})
    given["settings"] = _with_none(given.get("settings", {}))
    spaces = {name: _space(name, space) for name, space in given.pop("space", {}).items()}
    return Study(spaces=spaces, **given)


def _placed(
    name: str, kind: type[T], table: Mapping[str, Any], problems: Sequence[str], labels: Sequence[str]
) -> tuple[T | None, dict[Scope, T]]:
    """What a table says of everything, and what tables in it say of a problem, of a method, or of a method on a problem."""
    own = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    example = _TABLES[name]
    known_keys(name, table, [*own, *problems, *labels])
    found: dict[Scope, Mapping[str, Any]] = {}
    for place in [place for place in table if place not in own]:
        inner = check_table(f"{name}.{place}", table[place], example)
        known_keys(f"{name}.{place}", inner, [*own, *(labels if place in problems else [])])
        for method in [method for method in inner if method not in own]:
            found[place, method] = check_table(f"{name}.{place}.{method}", inner[method], example)
            known_keys(f"{name}.{place}.{method}", inner[method], own)
        if here := {key: value for key, value in inner.items() if key in own}:
            found[place] = here
    everywhere = {key: value for key, value in table.items() if key in own}
    made = {place: _made(f"{name}.{_dotted(place)}", kind, one) for place, one in found.items()}
    return (_made(name, kind, everywhere) if everywhere else None), made


def _made(where: str, kind: type[T], given: Mapping[str, Any]) -> T:
    missing = [one.name for one in fields(kind) if one.default is MISSING and one.name not in given]  # type: ignore[arg-type]
    if missing:
        raise StudyError(f"{where} has no {missing[0]}; it must be a table such as {_TABLES[where.partition('.')[0]]}")
    return kind(**given)


def _dotted(place: Scope) -> str:
    return ".".join(map(_key, [place] if isinstance(place, str) else place))


def _with_none(value: Any) -> Any:
    """TOML has no None; the text ``"none"`` stands for it."""
    if isinstance(value, Mapping):
        return {key: _with_none(one) for key, one in value.items()}
    return None if value == _NONE else value


def _space(name: str, table: Any) -> Space:
    found = {}
    for setting, value in check_table(f"space.{name}", table, "{ lr = { low = 1e-4, high = 1e-1 } }").items():
        try:
            found[setting] = dimension(value)
        except ValueError as error:
            raise StudyError(f"space.{name}.{setting}: {error}") from None
    return found


def _list(name: str, value: Any, kind: type = object) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not all(isinstance(one, kind) for one in value):
        raise StudyError(f"{name} must be a list{' of names' * (kind is str)}, got {value!r}")
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
    for name, (several, _) in _PLACED.items():
        everywhere = getattr(study, name)
        lines += [] if everywhere is None else _table(name, everywhere)
        for place, one in getattr(study, several).items():
            lines += _table(f"{name}.{_dotted(place)}", one)
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
