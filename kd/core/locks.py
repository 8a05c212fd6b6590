"""Locks between processes, on any file system.

Where the file system can, a lock is the kernel's (flock) and ends with its process. Elsewhere it is a lease: a file
that names its owner, who touches it every few seconds. It is taken over as soon as its owner is known to be dead, on
this machine, and after a long silence of an owner on another one. No lock file is left when a lock is released.
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

LEASE_SECONDS, HEARTBEAT_SECONDS = (
    180.0,
    15.0,
)  # seconds of silence after which a lease is taken over; between two signs of life
PATIENCE = 2.0  # seconds of waiting after which that is told
LONGEST_PAUSE = 0.5  # seconds between two attempts


@contextmanager
def hold(
    path: Path, waiting: str, patience: float = PATIENCE, pause: Callable[[], object] = lambda: None
) -> Iterator[None]:
    """Inside, no other process holds the lock file `path`; wait for that. A process must not hold it twice.

    **Arguments:** `waiting`: what to tell, once, of a wait of more than `patience` seconds; `pause()` is called between
    two attempts, and may raise to end the wait. **Raises:** OSError where `path` cannot be made.
    """
    lock = _Lock(path)
    start = time.monotonic()
    announced = False
    seconds = 0.01
    try:
        while not lock.attempt():
            if not announced and time.monotonic() - start >= patience:
                announced = True
                log.info("%s%s", waiting, lock.owner(), extra={"notice": True})
            pause()
            time.sleep(seconds)
            seconds = min(2 * seconds, LONGEST_PAUSE)
        yield
    finally:
        lock.release()


class _Lock:
    """One attempt after the other to get a lock. `descriptor`: of the kernel's lock, once it is held; `lease`: what
    stands in for it, where the kernel has none or a process holds a lease from a time when it had none."""

    def __init__(self, path: Path):
        self.path = path
        self.descriptor: int | None = None
        self.lease: SoftFileLease | None = None
        self.lease_path = path.with_name(f"{path.name}.lease")
        self.found_empty_at: float | None = (
            None  # since when the lease's file is known to be without an owner
        )

    def attempt(self) -> bool:
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
        # each looks for the other's file after making its own, so that never both go on
        if self.descriptor is None and _is_alive(_read_owner(self.path)):
            self.lease.release()
            return False
        return True

    def _remove_empty_lease(self) -> None:
        """A process that died between making the file and writing its name into it left one that nobody owns."""
        with suppress(OSError):
            if self.lease_path.stat().st_size:
                self.found_empty_at = None
            elif self.found_empty_at is None:
                self.found_empty_at = time.monotonic()
            elif time.monotonic() - self.found_empty_at > HEARTBEAT_SECONDS:
                self.lease_path.unlink()

    def owner(self) -> str:
        """Who holds it, in words to follow others."""
        owner = _read_owner(self.path)
        with suppress(OSError):
            marker = self.lease_path.read_text("utf-8", "replace")
            owner = dict(re.findall(r"^(pid|host)=(.*)$", marker, re.M)) or owner
        if "pid" not in owner:
            return ""
        host = str(owner.get("host")).partition("?")[
            0
        ]  # a lease has the name of a container's PIDs behind it
        elsewhere = f" on {host}" if host != platform.node() else ""
        return f" (process {owner['pid']}{elsewhere})"

    def release(self) -> None:
        """Remove what is held. Others may have opened the file: `_flock` has them look whether it is still there."""
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
    """The file system has no locks, or has none now."""


def _flock(path: Path) -> int | None:
    """A descriptor that holds the lock, or None while another process has it. **Raises:** OSError, _NoLocksError."""
    while True:
        descriptor = _open(path)
        try:
            if not _try_flock(descriptor):
                os.close(descriptor)
                return None
            # its last holder may have removed the file since it was opened
            with suppress(OSError):
                if os.path.samestat(path.stat(), os.fstat(descriptor)):
                    _write_owner(descriptor)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _open(path: Path) -> int:
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | flags)  # another user's: it can be locked all the same


def _try_flock(descriptor: int) -> bool:
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
    """Write who has the lock, for those who wait. Where that cannot be written, they wait without knowing."""
    owner = {"host": platform.node(), "pid": os.getpid(), "born": process_start_time(os.getpid())}
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _read_owner(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        owner = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(owner, dict):
            return owner
    return {}


def _is_alive(owner: dict[str, Any]) -> bool:
    """Is it surely a living process of this machine?"""
    if owner.get("host") != platform.node():
        return False
    start = process_start_time(owner.get("pid"))
    return start is not None and start == owner.get("born")


def _mount(path: Path) -> Path:
    return next((one for one in (path, *path.parents) if os.path.ismount(one)), path)


@cache
def _warn_fallback(mount: Path, reason: str) -> None:
    """Once a process."""
    instead = "files that name their owner are used instead"
    log.warning("the file system at %s has no locks (%s): %s", mount, reason, instead)


def process_start_time(pid: Any) -> float | None:
    """When a living process of this machine started, in ticks since the machine did (0 where that cannot be known);
    None when there is no such process. A pid alone may have been given to another since."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        pass
    except (OSError, TypeError, ValueError, OverflowError):
        return None
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        )
        return None if state in "ZX" else float(fields[18])
    except (OSError, IndexError):
        return 0.0
