"""Signals that end a process wait until its training is between two steps, where a checkpoint can be written."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_HANDLED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2")


class TerminatedError(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, with another exit code."""

    code = 143


class HangupError(TerminatedError):
    """SIGHUP: the terminal was closed, or its connection lost."""

    code = 129


class SignalHandler:
    """Stands before the handlers of SIGINT, SIGTERM, SIGHUP and, where somebody listens to it (submitit does), SIGUSR2.

    While a loop is `watching`, a signal is noted in `asked`; the loop calls `heed` after each step, which does what
    the signal would have done. At any other time that is done at once. A second SIGINT leaves at once. A second SIGTERM
    or SIGHUP changes nothing: when a connection is lost, the kernel and the shell send one each.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.loops = 0  # that watch
        self.interrupted = self.terminated = False
        self.previous_handlers: dict[int, Any] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, this process's signals come here. What a process ignores it goes on to ignore."""
        if self.previous_handlers or threading.current_thread() is not threading.main_thread():
            yield
            return
        found = {
            name: signal.getsignal(getattr(signal, name))
            for name in _HANDLED
            if hasattr(signal, name)
        }
        if found.get("SIGUSR2") == signal.SIG_DFL:
            del found["SIGUSR2"]
        silent = signal.SIG_IGN, None
        self.previous_handlers = {
            getattr(signal, name): handler
            for name, handler in found.items()
            if handler not in silent
        }
        for number in self.previous_handlers:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in self.previous_handlers.items():
                signal.signal(number, handler)
            asked, self.pending, self.previous_handlers = self.pending, None, {}
            if asked is not None:  # it came after the last step
                os.kill(os.getpid(), asked)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Around a loop that calls `heed` after each step."""
        self.loops += 1
        try:
            yield
        finally:
            self.loops -= 1

    def raise_if_requested(self) -> None:
        """Do what a signal asked, if one did: mostly raise KeyboardInterrupt."""
        if self.pending is not None:
            number, self.pending = self.pending, None
            self._interrupt(number)

    def _handle(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                _show_cursor()
                os._exit(128 + number)
            self.interrupted = True
        if not self.loops:
            self._interrupt(number)
            return
        self.pending = number
        if number == signal.SIGINT:
            with suppress(OSError):
                os.write(2, b"kd: stopping after this step (Ctrl-C again: at once)\n")

    def _interrupt(self, number: int) -> None:
        handler = self.previous_handlers.get(number, signal.SIG_DFL)
        if callable(handler):
            handler(number, None)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt("interrupted by SIGINT")
        elif not self.terminated:
            self.terminated = True
            error = TerminatedError if number == signal.SIGTERM else HangupError
            raise error(f"terminated by {signal.Signals(number).name}")


def _show_cursor() -> None:
    """What draws a table or a bar has hidden it, and is not given the time to show it again."""
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")
