"""Standard output and error that never end a training: any character, a closed pipe, a full disk, no terminal."""

import codecs
import errno
import functools
import io
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TextIO

P = ParamSpec("P")

ERRORS = "kd.plain"  # the name of the codec error handler below
PLAIN = {
    "±": "+/-",
    "→": "->",
    "←": "<-",
    "−": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "·": "*",
    "×": "x",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
    "²": "^2",
    "³": "^3",
    "✓": "+",
    "✗": "x",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "\xa0": " ",
}
PIPE_CLOSED = 141  # what a shell reports for a program that SIGPIPE ended: 128 + 13


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks by ASCII characters that mean the same, or by an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(
        PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text
    ), error.end


codecs.register_error(ERRORS, _escape)


class Descriptor(io.FileIO):
    """A standard descriptor. Once a write to it fails it becomes /dev/null, for child processes too."""

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
        """Write all of `data`, unless that fails."""
        rest = memoryview(data).cast("B")
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # another program made the terminal non-blocking
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            self._discard(error)
        return len(data)

    def _discard(self, error: OSError) -> None:
        self.failure = self.failure or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.fileno() == 1 and error.errno != errno.EPIPE:
            line = (
                f"kd: cannot write to standard output ({error.strerror}); the rest of it is lost\n"
            )
            with suppress(OSError):
                os.write(2, line.encode())


def protect() -> Descriptor | None:
    """Make this process's standard streams safe to write to. **Returns:** standard output, where it is a file's."""
    _open_closed_descriptors()
    sys.stdout, output = _protected(sys.stdout, sys.__stdout__, 1)
    sys.stderr, _ = _protected(sys.stderr, sys.__stderr__, 2)
    return output


def _open_closed_descriptors() -> None:
    """Connect what the shell closed (`>&-`) with /dev/null, else the next file that is opened takes its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)


def _protected(
    stream: TextIO | None, original: TextIO | None, number: int
) -> tuple[TextIO, Descriptor | None]:
    if stream is None:  # its descriptor was closed when Python started
        return open(os.devnull, "w", encoding="utf-8", errors=ERRORS), None
    buffer = getattr(stream, "buffer", None)
    known = getattr(buffer, "raw", buffer)
    if isinstance(known, Descriptor):
        return stream, known
    if stream is not original or not isinstance(
        stream, io.TextIOWrapper
    ):  # a notebook's, a test's, another program's
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors=ERRORS)  # type: ignore[attr-defined]
        return stream, None
    with suppress(OSError):
        stream.flush()
    descriptor = Descriptor(number)
    unbuffered = isinstance(buffer, io.RawIOBase)  # python -u
    made = io.TextIOWrapper(
        descriptor if unbuffered else io.BufferedWriter(descriptor),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    return made, descriptor


def protected(main: Callable[P, None]) -> Callable[P, None]:
    """Decorate an entry point: its streams are protected, and its exit code is not 0 where standard output was lost.

    The code is then 141 for a closed pipe (`| head`), 1 for anything else, such as a full disk. The work is done.
    """

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        output = protect()
        try:
            main(*args, **kwargs)
        except SystemExit as stop:
            if stop.code:
                raise
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        if output is not None and output.failure is not None:
            sys.exit(PIPE_CLOSED if output.failure.errno == errno.EPIPE else 1)

    return run
