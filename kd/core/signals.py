"""Defer terminating signals to the end of a training step, where a checkpoint can be written."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_HANDLED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2")


class TerminatedError(KeyboardInterrupt):
    """SIGTERM was received: handled like Ctrl-C, but with another exit code."""

    code = 143


class HangupError(TerminatedError):
    """SIGHUP was received: the terminal was closed, or its connection was lost."""

    code = 129


class SignalHandler:
    """A handler of SIGINT, SIGTERM, SIGHUP and, if already handled (as by submitit), SIGUSR2.

    While a loop is `deferring`, a signal is only recorded in `pending`. The loop calls
    `raise_if_requested` after each step, which then has the signal's usual effect. At any other
    time the signal takes effect immediately. A second SIGINT ends the process immediately. A second
    SIGTERM or SIGHUP has no effect: when a connection is lost, the kernel and the shell send one
    each.

    Attributes:
        pending: The number of the deferred signal, if any.
        loops: How many loops are deferring signals.
        interrupted: Whether a SIGINT was received.
        terminated: Whether a SIGTERM or SIGHUP has taken effect.
        previous_handlers: The handlers to restore, by signal number.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self.loops = 0
        self.interrupted = False
        self.terminated = False
        self.previous_handlers: dict[int, Any] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Intercept this process's signals for the duration of the context.

        Signals that the process ignores remain ignored. Nothing is installed outside the main
        thread, or twice.
        """
        if self.previous_handlers or threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {
            name: signal.getsignal(getattr(signal, name))
            for name in _HANDLED
            if hasattr(signal, name)
        }
        if handlers.get("SIGUSR2") == signal.SIG_DFL:
            del handlers["SIGUSR2"]
        ignored = signal.SIG_IGN, None
        self.previous_handlers = {
            getattr(signal, name): handler
            for name, handler in handlers.items()
            if handler not in ignored
        }
        for number in self.previous_handlers:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in self.previous_handlers.items():
                signal.signal(number, handler)
            pending = self.pending
            self.pending = None
            self.previous_handlers = {}
            if pending is not None:  # it was received after the last step
                os.kill(os.getpid(), pending)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Defer signals during a loop that calls `raise_if_requested` after each step."""
        self.loops += 1
        try:
            yield
        finally:
            self.loops -= 1

    def raise_if_requested(self) -> None:
        """Let a deferred signal take effect, which usually raises KeyboardInterrupt."""
        if self.pending is not None:
            number = self.pending
            self.pending = None
            self._interrupt(number)

    def _handle(self, number: int, _: Any) -> None:
        """Defer a signal, or let it take effect immediately."""
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
                os.write(2, b"kd: stopping after this step; press Ctrl-C again to stop now\n")

    def _interrupt(self, number: int) -> None:
        """Call the previous handler of a signal, or raise the exception that stands for it."""
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
    """Show the cursor, which a progress table or bar hides and has no time to restore."""
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")
