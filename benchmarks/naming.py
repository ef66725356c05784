"""Names: of problems and of what lies in other people's modules, with the nearest one where a name is wrong."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .problems import PROBLEMS, Problem


class UnknownName(ValueError):
    """A name that stands for nothing; says what there is."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, where something is close."""
    close = get_close_matches(name, list(allowed), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ";"


def located(error: BaseException) -> str:
    """An error in one line, with where it came from."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(where.filename).name}:{where.lineno})"


def imported(name: str) -> Any:
    """What a name such as ``module:Class`` stands for.

    Raises:
        UnknownName: where there is no such module, it cannot be imported, or nothing of that name is in it.
    """
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise UnknownName(f"{name}: {module!r} is no name of a module; give module:Name, such as torch.optim:AdamW")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnknownName(
            f"{name}: there is no module {error.name or module!r}; install the package that has it, or start where it can "
            "be imported"
        ) from None
    except (Exception, SystemExit) as error:  # other people's modules may do anything
        raise UnknownName(f"{name}: module {module} cannot be imported, {located(error)}") from error
    if not hasattr(found, attribute):
        raise UnknownName(f"{name}: module {module} has no {attribute!r}{nearest(attribute, dir(found)).rstrip(';')}")
    return getattr(found, attribute)


def problem(name: str) -> Problem:
    """A problem by its name, or by ``module:NAME`` of one of your own.

    Raises:
        UnknownName: where there is none.
    """
    if name in PROBLEMS:
        return PROBLEMS[name]
    if ":" not in name:
        raise UnknownName(
            f"unknown problem {name!r}{nearest(name, PROBLEMS)} there are {', '.join(PROBLEMS)}; one of your own is given "
            "as module:NAME"
        )
    found = imported(name)
    if not isinstance(found, Problem):
        raise UnknownName(f"{name} is no Problem, but {type(found).__name__}")
    return found
