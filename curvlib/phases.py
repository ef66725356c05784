"""Phases: what a step is busy with, told to whoever measures it.

An optimizer of this library is in one of three phases where it works: ``"statistics"`` (what layers say, passes that are
made for moments, and the moments themselves), ``"refresh"`` (roots) and ``"precondition and apply"`` (directions, rules and
the step). They may lie within each other, and within a phase of the loop's own; the innermost counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Listener = Callable[[str | None], None]
"""Is called with the name of a phase that begins, and with ``None`` when the innermost ends."""

_listeners: list[Listener] = []
_UNHEARD = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """A context that is a phase of the step; it costs next to nothing while nobody listens."""
    return _told(name) if _listeners else _UNHEARD


@contextmanager
def _told(name: str) -> Iterator[None]:
    heard_by = tuple(_listeners)  # whoever hears the beginning hears the end
    for listener in heard_by:
        listener(name)
    try:
        yield
    finally:
        for listener in heard_by:
            listener(None)


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Tell a listener the phases of all steps within this context."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
