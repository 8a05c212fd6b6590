"""Checkpoints of a run: the last two, each named after its position and its checksum."""

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
    """The directory `checkpoints/` of one run.

    Args:
        folder: The run's directory.
        every_n_epochs: Write a checkpoint every so many epochs; None disables this trigger.
        every_n_minutes: Write a checkpoint every so many minutes; None disables this trigger.
    """

    def __init__(
        self,
        folder: Path,
        every_n_epochs: int | None = None,
        every_n_minutes: float | None = None,
    ):
        self.folder = folder / "checkpoints"
        self.every_n_epochs = every_n_epochs
        self.every_n_minutes = every_n_minutes
        self.last_save_time = time.monotonic()
        self.write_failed = False

    def load(self) -> dict[str, Any] | None:
        """Return the content of the newest intact checkpoint, or None if there is none.

        Its tensors are on the CPU. No code from the file is executed.
        """
        for path in reversed(self._all()):
            try:
                content = path.read_bytes()
                if _digest(content) == path.stem.rpartition("-")[2]:
                    state: dict[str, Any] = torch.load(
                        io.BytesIO(content), map_location="cpu", weights_only=True
                    )
                    return state
                reason = "checksum mismatch"
            except Exception as error:  # from the disk, the pickle or the zip archive
                reason = first_line(error)
            log.warning(
                "the checkpoint %s cannot be read (%s); trying an earlier one", path, reason
            )
        return None

    def exists(self) -> bool:
        """Return whether there is any checkpoint, intact or not."""
        return bool(self._all())

    def epoch(self) -> int | None:
        """Return the number of epochs completed at the newest checkpoint; None without any."""
        return max((int(path.name.partition("-")[0]) for path in self._all()), default=None)

    def due(self, epoch: int, step: int) -> bool:
        """Return whether to write a checkpoint now.

        Args:
            epoch: Completed epochs.
            step: Completed steps of the next epoch.
        """
        every = self.every_n_epochs
        if step == 0 and every is not None and epoch % every == 0:
            return True
        minutes = self.every_n_minutes
        return minutes is not None and time.monotonic() - self.last_save_time > 60 * minutes

    def save(self, epoch: int, step: int, content: dict[str, Any]) -> bool:
        """Write a checkpoint and remove all but the last two.

        Training continues if writing fails; only the first failure is logged.

        Args:
            epoch: Completed epochs.
            step: Completed steps of the next epoch.
            content: Plain values and tensors.

        Returns:
            Whether the checkpoint was written.
        """
        self.last_save_time = time.monotonic()
        buffer = io.BytesIO()
        torch.save(content, buffer)
        name = f"{epoch:06d}-{step:08d}-{_digest(buffer.getbuffer())}.pt"
        try:
            self.folder.mkdir(exist_ok=True)
            remove_partial_files(self.folder)
            with atomic_write(self.folder / name) as partial:
                partial.write_bytes(buffer.getbuffer())
            for path in self._all()[:-KEEP_LAST]:
                path.unlink()
        except OSError as error:
            if not self.write_failed:
                log.warning(
                    "cannot write checkpoints to %s (%s); training continues",
                    self.folder,
                    error.strerror,
                )
            self.write_failed = True
            return False
        return True

    def clear(self) -> None:
        """Remove all checkpoints of a run that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Return the checkpoint files from oldest to newest."""
        return sorted(self.folder.glob("[0-9]*.pt"))


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
