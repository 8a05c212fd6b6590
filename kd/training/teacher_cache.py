"""A cache of teacher outputs, which are computed once for all runs of a teacher.

A crop after padding by 4 pixels and a flip leave only 162 views of an image, and the output of a
frozen teacher depends on (image, view) only: not on the seed, the epoch, the batch, T, alpha, beta
or the student. The outputs therefore form a table with one row per (image, view), in a
memory-mapped file that every run of that teacher reads and completes. If there are too many views
for such a table, each epoch of each seed has its own, because its views are known as well.

Each row has a checksum of its values and its row number, which makes locks and lists of valid rows
unnecessary. The checksum does not match if a row was never written, was torn by a crash or by
another process that is still writing it, or was damaged; such a row is recomputed.

Values are float16. This is lossless for a teacher in bfloat16 (except for values below 6e-5), and
keeps 11 bits of one in float32.
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kd.core import locks
from kd.core.io import atomic_write, remove_partial_files
from kd.core.settings import Settings
from kd.data import augment as views
from kd.data.augment import Augment
from kd.data.batch import Batch
from kd.data.loader import Split
from kd.models.base import PRE, ModelOutput
from kd.training.device import Device
from kd.training.teacher import TeacherForward

log = logging.getLogger(__name__)

# missing outputs are computed in multiples of this many images, for fewer different batch shapes
GRAIN = 32


class Table:
    """A file of float16 rows that several processes may read and write at the same time.

    Args:
        path: The file. It is created, at its full size and empty, if it does not exist.
        rows: Number of rows.
        width: Number of values per row.

    Raises:
        OSError: The file cannot be opened or created, for example because the disk is too full.
    """

    def __init__(self, path: Path, rows: int, width: int):
        size = Table.bytes(rows, width)
        path.parent.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for the process that creates {path.name}"
        with locks.hold(path.with_suffix(".lock"), waiting):
            remove_partial_files(path.parent, path.name)
            if not path.exists() or path.stat().st_size != size:
                _allocate(path, size)
            raw = torch.from_file(str(path), shared=True, size=size // 2, dtype=torch.int16)
        self.path = path
        self.raw = raw.view(rows, width + 2)
        self.checksum_weights = views.sample_hashes(0, "checksum", 0, torch.arange(width)) | 1

    @staticmethod
    def bytes(rows: int, width: int) -> int:
        """Return the size of a table's file in bytes."""
        return rows * (width + 2) * 2  # the checksum has 32 bits

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Read rows.

        Args:
            rows: Int64 tensor [n] of row numbers.

        Returns:
            Float16 values [n, width], and a bool tensor [n] that is true for the valid rows.
        """
        raw = self.raw[rows]
        bits = raw[:, :-2].contiguous()
        checksums = raw[:, -2:].contiguous().view(torch.int32)[:, 0]
        return bits.view(torch.float16), checksums == self._checksum(rows, bits)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Write float16 values [n, width] to the rows with the numbers `rows` [n]."""
        bits = values.contiguous().view(torch.int16)
        checksums = self._checksum(rows, bits)[:, None].view(torch.int16)
        self.raw[rows] = torch.cat([bits, checksums], dim=1)

    def values(self) -> Tensor:
        """Return all rows, valid or not: float16 [rows, width]."""
        return self.raw[:, :-2].contiguous().view(torch.float16)

    def _checksum(self, rows: Tensor, bits: Tensor) -> Tensor:
        """Return int32 checksums [n] that are never 0, the value in an empty row."""
        content = (bits.long() * self.checksum_weights).sum(1)
        hashes = views.hash_integers(content + views.hash_integers(rows + 1))
        return (hashes | 1).to(torch.int32)


def _allocate(path: Path, size: int) -> None:
    """Create an empty file with reserved disk space, so that writes to its memory cannot fail."""
    if shutil.disk_usage(path.parent).free < 2 * size:
        raise OSError(28, "the disk is too full", str(path))
    with atomic_write(path) as partial, open(partial, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, 1 << 24):
                file.write(bytes(min(1 << 24, size - start)))


class TeacherCacheSpec(NamedTuple):
    """Location and limits of the cache of one teacher, for one augmentation and precision."""

    folder: Path
    max_gb: float  # limit of the disk space, in gigabytes
    feature_maps: bool  # also cache feature maps [C, H, W]
    eager: bool  # compute all outputs that a run may need before it starts (on a GPU: seconds)


def key(
    weights: str,
    model: Settings,
    content: str,
    data: Split,
    augment: Augment,
    device: Device,
    mixed: bool = False,
) -> str:
    """Return a cache key of 12 hex digits that depends on everything that affects the outputs.

    Args:
        weights: Digest of the teacher's weight file.
        model: Settings of the teacher's network.
        content: Digest of the images.
        data: The training images.
        augment: Their augmentation.
        device: Where the teacher runs, and in which precision.
        mixed: Whether the inputs are blends of training images.
    """
    dependencies = {
        "format": 1,
        "weights": weights,
        "model": model.model_dump(),
        "content": content,
        "images": list(data.images.shape),
        "moments": [data.mean.tolist(), data.std.tolist()],
        "augment": augment.model_dump(),
        "precision": str(device.dtype),
        "device": device.torch.type,
    }
    if mixed:
        dependencies["mixed"] = hashlib.sha256(data.index.cpu().numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()[:12]


Values = dict[str, Tensor]  # name of an output -> float16 [B, width]


class TeacherCache:
    """The outputs of a frozen teacher, read from its cache where known, else computed and cached.

    Outputs that cannot be cached (no space, no permission) are computed in every step. All outputs
    are rounded to float16, so a run's result is bit-identical whatever was cached.

    Args:
        teacher: The teacher's forward pass.
        data: The training images.
        augment: Their augmentation.
        seed: Seed of the views.
        views_per_sample: Number of views of each image in a batch.
        spec: Location and limits of the cache.
        mixed: Whether the inputs are blends of images, which a view does not identify. There is
            then one table per epoch, which is filled lazily.
    """

    def __init__(
        self,
        teacher: TeacherForward,
        data: Split,
        augment: Augment,
        seed: int,
        views_per_sample: int,
        spec: TeacherCacheSpec,
        mixed: bool = False,
    ):
        self.teacher = teacher
        self.data = data
        self.augment = augment
        self.spec = spec
        self.seed = seed
        self.views_per_sample = views_per_sample
        self.mixed = mixed
        tap_shapes = teacher.net.shapes(data.images.shape[1])
        shapes = {name: torch.Size(shape) for name, shape in tap_shapes.items()}
        self.shapes = {
            "logits": list(shapes.values())[-1],
            **{tap: shapes[tap.removesuffix(PRE)] for tap in teacher.taps},
        }
        self.requested = 0  # images
        self.computed = 0  # images
        self.epoch = -1
        self.tables: dict[str, Table] = {}
        # true: the output's table has a row per (image, view); false: a row per image of this epoch
        self.covers_all_epochs: dict[str, bool] = {}
        self.values_on_device: Values | None = None  # all rows of all tables, if computed eagerly
        self.verified = False

    def __call__(self, batch: Batch) -> ModelOutput:
        """Return the outputs for a batch, in float32."""
        self._open_epoch_tables(int(batch.epoch))
        self.requested += len(batch.x)
        rows = {name: self._rows(name, batch.index, batch.view) for name in self.tables}
        if self.values_on_device is not None:
            return self._to_output(
                {name: values[rows[name]] for name, values in self.values_on_device.items()}
            )
        if len(self.tables) < len(self.shapes):  # an output without a table needs a full pass
            values = self._compute(batch.x)
            self.computed += len(batch.x)
            for name, table in self.tables.items():
                table.write(rows[name], values[name])
            return self._to_output(values)
        values, known = self._read(rows)
        probe = torch.nonzero(known)[:GRAIN, 0]
        cached = {name: value[probe] for name, value in values.items()}
        if not self._verify_cached_rows(batch.x[probe], cached):
            self._rebuild()
            self.requested -= len(batch.x)
            return self(batch)
        missing = torch.nonzero(~known)[:, 0]
        self.computed += len(missing)
        if len(missing):
            padding = min(-len(missing) % GRAIN, len(known) - len(missing))
            computed = self._compute(batch.x[torch.cat([missing, missing[:1].expand(padding)])])
            for name, table in self.tables.items():
                new_values = computed[name][: len(missing)]
                values[name][missing] = new_values
                table.write(rows[name][missing], new_values)
        return self._to_output(values)

    @property
    def hit_rate(self) -> float:
        """Fraction of the requested images (0..1) for which the teacher did not have to run."""
        return max(0.0, 1 - self.computed / self.requested) if self.requested else 1.0

    def discard(self) -> None:
        """Delete the open tables, because their content cannot be trusted."""
        for table in self.tables.values():
            table.path.unlink(missing_ok=True)

    def _compute(self, x: Tensor) -> Values:
        """Run the teacher; values too large for float16 become its largest number."""
        output = self.teacher.of(x)
        values = {
            name: output.logits if name == "logits" else output.taps[name] for name in self.shapes
        }
        # feature maps as [B, H, W, C], the memory order in which the networks compute them
        return {
            name: value.movedim(1, -1).flatten(1).clamp(-65504, 65504).half()
            for name, value in values.items()
        }

    def _read(self, rows: dict[str, Tensor]) -> tuple[Values, Tensor]:
        """Return the cached values, and a bool tensor [B]: the images with all outputs cached."""
        tables = {name: table.read(rows[name]) for name, table in self.tables.items()}
        known = torch.stack([known for _, known in tables.values()]).all(dim=0)
        return {name: values for name, (values, _) in tables.items()}, known

    def _rows(self, name: str, index: Tensor, view: Tensor) -> Tensor:
        """Return the row numbers in an output's table: int64 [B]."""
        if self.covers_all_epochs[name]:
            return index * self.augment.views + view
        nth = torch.arange(self.views_per_sample, device=index.device)
        nth_of_row = nth.repeat_interleave(len(index) // self.views_per_sample)
        return nth_of_row * len(self.data.images) + index

    def _to_output(self, values: Values) -> ModelOutput:
        """Convert table values to float32 tensors of the outputs' shapes."""
        outputs = {}
        for name, value in values.items():
            channels, *size = self.shapes[name]
            outputs[name] = value.float().view(-1, *size, channels).movedim(-1, 1)
        return ModelOutput(outputs.pop("logits"), outputs)

    def _verify_cached_rows(self, x: Tensor, cached: Values) -> bool:
        """Return whether the teacher still reproduces the cached outputs; done once per run.

        Args:
            x: Normalised images [B, 3, H, W].
            cached: Their cached outputs.
        """
        if self.verified or not len(x):
            return True
        self.verified = True
        pairs = (
            (new.float(), cached[name].float())
            for name, new in self._compute(x).items()
            if name in cached
        )
        return all((new - old).abs().max() <= 0.05 * new.abs().max() + 1e-3 for new, old in pairs)

    # ---- the tables of an epoch

    def _open_epoch_tables(self, epoch: int) -> None:
        """Open the tables of an epoch unless they are open already."""
        if epoch == self.epoch or (self.epoch >= 0 and all(self.covers_all_epochs.values())):
            return
        self.epoch = epoch
        self.tables = {}
        self.values_on_device = None
        on_cpu = self.data.images.device.type == "cpu"
        if not on_cpu and not self.spec.eager:  # finding the missing rows would stall the device
            return
        for name, shape in self.shapes.items():
            if len(shape) == 1 or self.spec.feature_maps:
                self._open(name, shape.numel(), epoch)
        if len(self.tables) < len(self.shapes):
            self.tables = self.tables if on_cpu else {}
        elif self.spec.eager:
            waiting = "waiting for the process that computes the teacher's outputs"
            with locks.hold(self.spec.folder / "whole.lock", waiting):
                intact = self._complete(epoch)
            if not intact:
                self._rebuild()
                return
            self.values_on_device = {
                name: table.values().to(self.data.images.device)
                for name, table in self.tables.items()
            }

    def _open(self, name: str, width: int, epoch: int) -> None:
        """Open an output's table for all epochs or, if it is too large, for this epoch only.

        If neither is possible, log it and leave the output without a table.
        """
        limit = self.spec.max_gb * 1e9
        # (suffix of the file's name, rows per image)
        epoch_table = (f"-s{self.seed}-e{epoch}", self.views_per_sample)
        full_table = ("", self.augment.views)
        candidates = [epoch_table] if self.mixed else [full_table, epoch_table]
        try:
            for suffix, rows_per_image in candidates:
                path = self.spec.folder / f"{name}{suffix}.table"
                rows = len(self.data.images) * rows_per_image
                others = (file for file in self.spec.folder.glob("*.table") if file != path)
                if sum(file.stat().st_size for file in others) + Table.bytes(rows, width) <= limit:
                    self.tables[name] = Table(path, rows, width)
                    self.covers_all_epochs[name] = not suffix
                    return
        except (OSError, RuntimeError) as error:
            log.warning(
                "the teacher's outputs cannot be cached in %s (%s); the teacher runs in every step",
                self.spec.folder,
                getattr(error, "strerror", None) or error,
            )
        else:
            if limit:
                log.info(
                    "teacher.cache.max_gb is too small for the teacher's %s; "
                    "the teacher runs in every step",
                    name,
                )

    def _rebuild(self) -> None:
        """Replace tables whose content no longer matches the teacher by empty ones."""
        log.warning(
            "the teacher's outputs cached in %s no longer match the teacher "
            "(did the code of its model change?); recomputing them",
            self.spec.folder,
        )
        self.discard()
        epoch = self.epoch
        self.epoch = -1
        self._open_epoch_tables(epoch)

    def _complete(self, epoch: int) -> bool:
        """Compute all missing rows that the training images can need until the end of the epoch.

        Returns:
            Whether the cached rows still match the teacher; if not, nothing more is computed.
        """
        index = self.data.index.cpu()
        device = self.data.images.device
        n_views = self.augment.views
        if all(self.covers_all_epochs.values()):
            view = torch.arange(n_views).repeat(len(index))
            index = index.repeat_interleave(n_views)
        else:
            views_of_epoch = [
                views.sample_views(self.seed, epoch, index, self.augment, nth)
                for nth in range(self.views_per_sample)
            ]
            view = torch.cat(views_of_epoch)
            index = index.repeat(self.views_per_sample)
        rows = {name: self._rows(name, index, view) for name in self.tables}
        largest = max(shape.numel() for shape in self.shapes.values())
        chunk_size = max(1 << 11, (1 << 22) // largest)

        def load_images(positions: Tensor) -> Tensor:
            pixels = views.apply_view(
                self.data.images,
                index[positions].to(device),
                view[positions].to(device),
                self.augment,
            )
            return views.normalise(pixels, self.data.mean, self.data.std)

        for chunk in torch.arange(len(index)).split(chunk_size):
            values, known = self._read({name: numbers[chunk] for name, numbers in rows.items()})
            probe = torch.nonzero(known)[:GRAIN, 0]
            cached = {name: value[probe].to(device) for name, value in values.items()}
            if not self._verify_cached_rows(load_images(chunk[probe]).float(), cached):
                return False
            self.computed += int((~known).sum())
            for positions in chunk[~known].split(1 << 11):
                for name, new_values in self._compute(load_images(positions)).items():
                    self.tables[name].write(rows[name][positions], new_values.cpu())
        return True
