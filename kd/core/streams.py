"""Keep standard output and error from ending a training run.

They accept any character and survive a closed pipe, a full disk and a missing terminal.
"""

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

ERRORS = "kd.plain"  # the name of the codec error handler below
ASCII_EQUIVALENTS = {
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
    """Replace characters that an encoding lacks with an ASCII equivalent or an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    replacement = "".join(
        ASCII_EQUIVALENTS.get(character) or character.encode("ascii", "backslashreplace").decode()
        for character in text
    )
    return replacement, error.end


codecs.register_error(ERRORS, _escape)


class Descriptor(io.FileIO):
    """A standard output descriptor that becomes /dev/null once a write to it fails.

    The same then applies to child processes.

    Attributes:
        failure: The first error of a write.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: "bytes | memoryview") -> int:  # type: ignore[override]
        """Write all of `data`, or discard the rest after an error."""
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
        """Redirect the descriptor to /dev/null, and report the loss of standard output."""
        self.failure = self.failure or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.fileno() == 1 and error.errno != errno.EPIPE:
            message = (
                f"kd: cannot write to standard output ({error.strerror}); "
                "the remaining output is lost\n"
            )
            with suppress(OSError):
                os.write(2, message.encode())


def protect() -> Descriptor | None:
    """Make this process's standard streams safe to write to.

    Returns:
        The descriptor of standard output, or None if it was closed or has been replaced, for
        example by a notebook or a test.
    """
    _open_closed_descriptors()
    sys.stdout, output = _protected(sys.stdout, sys.__stdout__, 1)
    sys.stderr, _ = _protected(sys.stderr, sys.__stderr__, 2)
    return output


def _open_closed_descriptors() -> None:
    """Open /dev/null in place of each standard descriptor that the shell closed (`>&-`).

    Otherwise the next file to be opened would get its number.
    """
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
    """Return a safe replacement of a standard stream, and its descriptor if that is protected."""
    if stream is None:  # its descriptor was closed when Python started
        return open(os.devnull, "w", encoding="utf-8", errors=ERRORS), None
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    if isinstance(raw, Descriptor):
        return stream, raw
    if stream is not original or not isinstance(stream, io.TextIOWrapper):
        # It belongs to a notebook, a test or another program
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors=ERRORS)  # type: ignore[attr-defined]
        return stream, None
    with suppress(OSError):
        stream.flush()
    descriptor = Descriptor(number)
    unbuffered = isinstance(buffer, io.RawIOBase)  # python -u
    wrapper = io.TextIOWrapper(
        descriptor if unbuffered else io.BufferedWriter(descriptor),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=ERRORS,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    return wrapper, descriptor


@contextmanager
def protected() -> Iterator[None]:
    """Protect the streams of an entry point; to be used as its decorator.

    If standard output is lost, the work is still completed, but the exit code is 141 for a closed
    pipe (`| head`) and 1 for any other error, such as a full disk.
    """
    output = protect()
    try:
        yield
    except SystemExit as system_exit:
        if system_exit.code:
            raise
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    if output is not None and output.failure is not None:
        sys.exit(PIPE_CLOSED if output.failure.errno == errno.EPIPE else 1)
