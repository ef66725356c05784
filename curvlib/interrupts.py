"""Ctrl-C waits where a matrix is partly old and partly new."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Unbroken:
    """A context in which Ctrl-C waits for the end; several may lie within each other.

    What is in it takes a moment: writing what was computed, or an average that is formed piece by piece. Outside of the main
    thread, where no Ctrl-C arrives, and where it has no handler in Python, nothing is held.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._handler: Any = None
        self._waiting: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        if self._handler is None:
            handler = signal.getsignal(signal.SIGINT)
            if not callable(handler):
                return
            signal.signal(signal.SIGINT, self._hold)  # until here Ctrl-C finds nothing half done
            self._handler = handler
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handler is None or threading.get_ident() != threading.main_thread().ident:
            return
        self._depth -= 1
        if self._depth:
            return
        handler, self._handler = self._handler, None
        signal.signal(signal.SIGINT, handler)
        while self._waiting:
            handler(*self._waiting.pop())

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._waiting.append((number, frame))


unbroken = Unbroken()
"""The one context of the process, as it has one Ctrl-C."""
