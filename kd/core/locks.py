"""Locks between processes, on any file system.

Where the file system supports it, a lock is the kernel's (flock) and is released when its process
ends. Elsewhere it is a lease: a file that names its owner, who updates its modification time every
few seconds. A lease is taken over as soon as its owner is known to be dead, if that was a process
of this machine, or after a long silence, if the owner is on another machine. No lock file is left
behind when a lock is released.
"""

import json
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import SoftFileLease, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

LEASE_SECONDS = 180.0  # without a heartbeat until a lease is taken over
HEARTBEAT_SECONDS = 15.0  # between two heartbeats of a lease's owner
PATIENCE = 2.0  # seconds of waiting before a message is logged
LONGEST_PAUSE = 0.5  # seconds between two attempts


@contextmanager
def hold(
    path: Path,
    waiting_message: str,
    patience: float = PATIENCE,
    pause: Callable[[], object] = lambda: None,
) -> Iterator[None]:
    """Hold the lock file `path` for the duration of the context, waiting until it is free.

    A process must not hold the same lock twice.

    Args:
        path: The lock file.
        waiting_message: Logged once, followed by the owner, if the wait exceeds `patience`.
        patience: Seconds of waiting before the message.
        pause: Called between two attempts; may raise to end the wait.

    Raises:
        OSError: `path` cannot be created.
    """
    lock = _Lock(path)
    start = time.monotonic()
    announced = False
    seconds = 0.01
    try:
        while not lock.attempt():
            if not announced and time.monotonic() - start >= patience:
                announced = True
                log.info("%s%s", waiting_message, lock.owner(), extra={"notice": True})
            pause()
            time.sleep(seconds)
            seconds = min(2 * seconds, LONGEST_PAUSE)
        yield
    finally:
        lock.release()


class _Lock:
    """A lock and the attempts to acquire it.

    Attributes:
        descriptor: Of the file that holds the kernel's lock, once that is acquired.
        lease: The replacement where the kernel has no locks, or where a process still holds a
            lease from a time when it had none.
        empty_since: When the lease's file was first seen without an owner (monotonic seconds).
    """

    def __init__(self, path: Path):
        self.path = path
        self.descriptor: int | None = None
        self.lease: SoftFileLease | None = None
        self.lease_path = path.with_name(f"{path.name}.lease")
        self.empty_since: float | None = None

    def attempt(self) -> bool:
        """Try once to acquire the lock, and return whether it is held now."""
        if self.lease is None:
            try:
                self.descriptor = _flock(self.path)
            except _NoLocksError as error:
                _warn_fallback(_mount(self.path.parent.absolute()), str(error))
            else:
                if self.descriptor is None:
                    return False
                if not self.lease_path.exists():
                    return True
            self.lease = SoftFileLease(
                self.lease_path,
                lease_duration=LEASE_SECONDS,
                heartbeat_interval=HEARTBEAT_SECONDS,
                thread_local=False,
                on_compromise=lambda lost: log.warning(
                    "the lock %s was lost (%s)", lost.lock_file, lost.reason
                ),
            )
        try:
            self.lease.acquire(timeout=0)
        except Timeout:
            self._remove_empty_lease()
            return False
        # Each process checks for the other kind of lock after creating its own, so that a holder
        # of the kernel's lock and a holder of a lease never both proceed
        if self.descriptor is None and _is_alive(_read_owner(self.path)):
            self.lease.release()
            return False
        return True

    def _remove_empty_lease(self) -> None:
        """Remove a lease whose creator died before writing its name into it."""
        with suppress(OSError):
            if self.lease_path.stat().st_size:
                self.empty_since = None
            elif self.empty_since is None:
                self.empty_since = time.monotonic()
            elif time.monotonic() - self.empty_since > HEARTBEAT_SECONDS:
                self.lease_path.unlink()

    def owner(self) -> str:
        """Return the owner as text to append to a message, or an empty text if unknown."""
        owner = _read_owner(self.path)
        with suppress(OSError):
            marker = self.lease_path.read_text("utf-8", "replace")
            owner = dict(re.findall(r"^(pid|host)=(.*)$", marker, re.M)) or owner
        if "pid" not in owner:
            return ""
        # In a lease, the host is followed by "?" and the name of its container's PID namespace
        host = str(owner.get("host")).partition("?")[0]
        elsewhere = f" on {host}" if host != platform.node() else ""
        return f" (process {owner['pid']}{elsewhere})"

    def release(self) -> None:
        """Release the lock and remove its files.

        Other processes may have opened the file already: `_flock` checks that it still exists.
        """
        if self.lease is not None and self.lease.is_locked:
            with suppress(OSError):
                self.lease.release()
            if self.descriptor is None and not _is_alive(_read_owner(self.path)):
                with suppress(OSError):
                    self.path.unlink()
        if self.descriptor is not None:
            with suppress(OSError):
                if os.path.samestat(self.path.stat(), os.fstat(self.descriptor)):
                    self.path.unlink()
            os.close(self.descriptor)
            self.descriptor = None


class _NoLocksError(Exception):
    """The file system does not support locks, or not at the moment."""


def _flock(path: Path) -> int | None:
    """Return a descriptor that holds the lock, or None while another process holds it.

    Raises:
        OSError: The file cannot be opened.
        _NoLocksError: The file system does not support locks.
    """
    while True:
        descriptor = _open(path)
        try:
            if not _try_flock(descriptor):
                os.close(descriptor)
                return None
            # The last holder may have removed the file since it was opened
            with suppress(OSError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    _write_owner(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open the lock file, creating it if necessary, and return its descriptor."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        # Another user's file can be locked although it cannot be written
        return os.open(path, os.O_RDONLY | flags)


def _try_flock(descriptor: int) -> bool:
    """Try once to lock an open file, and return whether that succeeded."""
    if fcntl is None:
        raise _NoLocksError("no flock on this system")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise _NoLocksError(error.strerror or str(error)) from error
    return True


def _write_owner(descriptor: int) -> None:
    """Write the owner into the lock file for waiting processes to display; errors are ignored."""
    owner = {"host": platform.node(), "pid": os.getpid(), "born": process_start_time(os.getpid())}
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _read_owner(path: Path) -> dict[str, Any]:
    """Return the host, pid and start time in a lock file, or an empty dict if there is none."""
    with suppress(OSError, ValueError):
        owner = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(owner, dict):
            return owner
    return {}


def _is_alive(owner: dict[str, Any]) -> bool:
    """Return whether the owner is certainly a running process of this machine."""
    if owner.get("host") != platform.node():
        return False
    start = process_start_time(owner.get("pid"))
    return start is not None and start == owner.get("born")


def _mount(path: Path) -> Path:
    """Return the mount point of the file system that holds `path`."""
    return next((parent for parent in (path, *path.parents) if os.path.ismount(parent)), path)


@cache
def _warn_fallback(mount: Path, reason: str) -> None:
    """Warn, once per process, that leases replace the kernel's locks."""
    log.warning(
        "the file system at %s does not support locks (%s); using lease files instead",
        mount,
        reason,
    )


def process_start_time(pid: Any) -> float | None:
    """Return when a running process of this machine was started.

    A PID may have been reused since it was recorded, so it identifies a process only together with
    the start time.

    Returns:
        Clock ticks since the machine was booted, 0 where that cannot be determined, or None if
        there is no such process.
    """
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        pass
    except (OSError, TypeError, ValueError, OverflowError):
        return None
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        # The process name, in parentheses, may itself contain spaces and parentheses
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else float(fields[18])
    except (OSError, IndexError):
        return 0.0
