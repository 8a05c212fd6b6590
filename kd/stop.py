"""Signals that end a process wait until its training is between two steps, where a checkpoint can be written."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_OURS = ("SIGINT", "SIGTERM", "SIGUSR2")


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, with another exit code."""


class Stop:
    """Stands before the handlers of SIGINT, SIGTERM and, where somebody listens to it (submitit does), SIGUSR2.

    While a loop is `watching`, a signal is noted in `asked`; the loop calls `heed` after each step, which does what
    the signal would have done. At any other time that is done at once. A second SIGINT leaves at once.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.loops = 0  # that watch
        self.interrupted = False
        self.before: dict[int, Any] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, this process's signals come here. What a process ignores it goes on to ignore."""
        if self.before or threading.current_thread() is not threading.main_thread():
            yield
            return
        found = {name: signal.getsignal(getattr(signal, name)) for name in _OURS if hasattr(signal, name)}
        if found.get("SIGUSR2") == signal.SIG_DFL:
            del found["SIGUSR2"]
        silent = signal.SIG_IGN, None
        self.before = {getattr(signal, name): handler for name, handler in found.items() if handler not in silent}
        for number in self.before:
            signal.signal(number, self._hear)
        try:
            yield
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)
            asked, self.asked, self.before = self.asked, None, {}
            if asked is not None:  # it came after the last step
                os.kill(os.getpid(), asked)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a loop that calls `heed` after each step."""
        self.loops += 1
        try:
            yield
        finally:
            self.loops -= 1

    def heed(self) -> None:
        """Do what a signal asked, if one did: mostly raise KeyboardInterrupt."""
        if self.asked is not None:
            number, self.asked = self.asked, None
            self._act(number)

    def _hear(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                os._exit(128 + number)
            self.interrupted = True
        if not self.loops:
            self._act(number)
            return
        self.asked = number
        if number == signal.SIGINT:
            os.write(2, b"kd: stopping after this step (Ctrl-C again: at once)\n")

    def _act(self, number: int) -> None:
        handler = self.before.get(number, signal.SIG_DFL)
        if callable(handler):
            handler(number, None)
        elif number == signal.SIGTERM:
            raise TerminatedError("terminated by SIGTERM")
        else:
            raise KeyboardInterrupt("interrupted by SIGINT")
