"""A run's checkpoints: the last two, each whole, each named by its position and by a digest of its content."""

import hashlib
import io
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from kd.core.errors import first_line
from kd.core.io import atomic_write, remove_partial_files

log = logging.getLogger(__name__)

KEEP_LAST = 2


class Checkpoints:
    """`checkpoints/` in a run's directory, one written every `epochs` epochs and every `minutes` minutes."""

    def __init__(self, folder: Path, epochs: int | None = None, minutes: float | None = None):
        self.folder, self.epochs, self.minutes = folder / "checkpoints", epochs, minutes
        self.saved = time.monotonic()
        self.failed = False

    def load(self) -> dict[str, Any] | None:
        """The content of the newest that is whole, its tensors on the CPU. No code in it is executed."""
        for path in reversed(self._all()):
            try:
                content = path.read_bytes()
                if _digest(content) == path.stem.rpartition("-")[2]:
                    found: dict[str, Any] = torch.load(
                        io.BytesIO(content), map_location="cpu", weights_only=True
                    )
                    return found
                what = "it is damaged"
            except Exception as error:  # of the disk, of pickle, of zip
                what = first_line(error)
            log.warning(
                "the checkpoint %s cannot be read (%s); an earlier one is taken", path, what
            )
        return None

    def exists(self) -> bool:
        return bool(self._all())

    def epoch(self) -> int | None:
        """The epochs that were done at the newest one; None without any."""
        return max((int(path.name.partition("-")[0]) for path in self._all()), default=None)

    def due(self, epoch: int, step: int) -> bool:
        """Is it time for one, after so many epochs and steps of the next?"""
        after = step == 0 and self.epochs is not None and epoch % self.epochs == 0
        return after or (
            self.minutes is not None and time.monotonic() - self.saved > 60 * self.minutes
        )

    def save(self, epoch: int, step: int, content: dict[str, Any]) -> bool:
        """Write one and remove all but the last two. Where that fails the training goes on; it is said once."""
        self.saved = time.monotonic()
        file = io.BytesIO()
        torch.save(content, file)
        name = f"{epoch:06d}-{step:08d}-{_digest(file.getbuffer())}.pt"
        try:
            self.folder.mkdir(exist_ok=True)
            remove_partial_files(self.folder)
            with atomic_write(self.folder / name) as part:
                part.write_bytes(file.getbuffer())
            for path in self._all()[:-KEEP_LAST]:
                path.unlink()
        except OSError as error:
            if not self.failed:
                log.warning(
                    "no checkpoint can be written to %s (%s); the training goes on",
                    self.folder,
                    error.strerror,
                )
            self.failed = True
            return False
        return True

    def clear(self) -> None:
        """Remove them: the run is over."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.pt"))


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
