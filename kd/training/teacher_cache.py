"""Teacher outputs, computed once for all runs of a teacher.

A crop after padding by 4 and a flip leave only 162 views of an image, and what a frozen teacher says of (image, view)
depends on nothing else: not on the seed, the epoch, the batch, T, alpha, beta or the student. So its outputs are a
table with a row for each (image, view), in a memory-mapped file that every run of that teacher reads and completes.
Where the views are too many for that, there is a table of each epoch of each seed, whose views are known as well.

A row carries a checksum of its values and its own number. That is all there is of locks and lists: a row that was
never written, was torn by a crash or by another process that is just writing it, or was damaged, does not check, and
is computed again. Values are float16. A teacher in bfloat16 loses nothing by it (but below 6e-5), one in float32 keeps
11 bits.
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

GRAIN = (
    32  # images: what is missing is computed in multiples of it, so that few shapes of batch occur
)


class Table:
    """`rows` rows of `width` float16 values in a file that several processes may read and write at once."""

    def __init__(self, path: Path, rows: int, width: int):
        """Open the file at `path`, or make it, whole and empty. **Raises:** OSError, also when the disk is too full."""
        size = Table.bytes(rows, width)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.hold(
            path.with_suffix(".lock"), f"waiting for the process that makes {path.name}"
        ):
            remove_partial_files(path.parent, path.name)
            if not path.exists() or path.stat().st_size != size:
                _allocate(path, size)
            raw = torch.from_file(str(path), shared=True, size=size // 2, dtype=torch.int16)
        self.path, self.raw = path, raw.view(rows, width + 2)
        self.weights = views.random_floats(0, "checksum", 0, torch.arange(width)) | 1

    @staticmethod
    def bytes(rows: int, width: int) -> int:
        return rows * (width + 2) * 2  # the checksum has 32 bits

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(float16 [n, width], bool [n]: which of them are known) of the int64 `rows` [n]."""
        raw = self.raw[rows]
        bits, kept = raw[:, :-2].contiguous(), raw[:, -2:].contiguous().view(torch.int32)[:, 0]
        return bits.view(torch.float16), kept == self._checksum(rows, bits)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Keep float16 values [n, width] as `rows` [n]."""
        bits = values.contiguous().view(torch.int16)
        self.raw[rows] = torch.cat(
            [bits, self._checksum(rows, bits)[:, None].view(torch.int16)], dim=1
        )

    def values(self) -> Tensor:
        """All of it, float16 [rows, width], unknown rows included."""
        return self.raw[:, :-2].contiguous().view(torch.float16)

    def _checksum(self, rows: Tensor, bits: Tensor) -> Tensor:
        """int32 [n], never 0, which is what an empty row has."""
        return (
            views.hash_integers((bits.long() * self.weights).sum(1) + views.hash_integers(rows + 1))
            | 1
        ).to(torch.int32)


def _allocate(path: Path, size: int) -> None:
    """An empty file of that size whose room on the disk is its own: writing to its memory later cannot fail."""
    if shutil.disk_usage(path.parent).free < 2 * size:
        raise OSError(28, "the disk is too full", str(path))
    with atomic_write(path) as part, open(part, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, 1 << 24):
                file.write(bytes(min(1 << 24, size - start)))


class TeacherCacheSpec(NamedTuple):
    """Where the outputs of one teacher, for one augmentation and precision, are kept, and how much of the disk they
    may take."""

    folder: Path
    max_gb: float
    feature_maps: bool  # feature maps [C, H, W] as well
    eager: bool  # compute all that a run can ask for before it begins (on a GPU: seconds)


def key(
    weights: str,
    model: Settings,
    content: str,
    data: Split,
    augment: Augment,
    device: Device,
    mixed: bool = False,
) -> str:
    """12 hex digits that name all that the outputs depend on.

    **Arguments:** `weights`, `content`: digests of the teacher's file and of the images; `mixed`: the images are blends
    of those that are trained on.
    """
    said = {
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
        said["mixed"] = hashlib.sha256(data.index.cpu().numpy().tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


Values = dict[str, Tensor]  # float16 [B, width] of each output


class TeacherCache:
    """`outputs(batch)` is what the frozen teacher says of a batch: read where it is known, else computed and kept.

    What cannot be kept (no room, no permission) is computed in every step. Either way it is rounded to float16, so a
    run ends with the same bits whatever was known.
    """

    def __init__(
        self,
        live: TeacherForward,
        data: Split,
        augment: Augment,
        seed: int,
        views_each: int,
        place: TeacherCacheSpec,
        mixed: bool = False,
    ):
        """`mixed`: images are blends, which no view names: there is a table of each epoch, completed lazily."""
        self.live, self.data, self.augment, self.spec = live, data, augment, place
        self.seed, self.views_each, self.mixed = seed, views_each, mixed
        shapes = {
            name: torch.Size(shape) for name, shape in live.net.shapes(data.images.shape[1]).items()
        }
        self.shapes = {
            "logits": list(shapes.values())[-1],
            **{tap: shapes[tap.removesuffix(PRE)] for tap in live.taps},
        }
        self.requested = self.computed = 0  # images
        self.epoch = -1
        self.tables: dict[str, Table] = {}
        self.finite: dict[
            str, bool
        ] = {}  # a row for each (image, view), or for each image in this epoch
        self.folder_held: Values | None = None  # the whole tables on the device
        self.trusted = False

    def __call__(self, batch: Batch) -> ModelOutput:
        self._open_epoch_tables(int(batch.epoch))
        self.requested += len(batch.x)
        rows = {name: self._rows(name, batch.index, batch.view) for name in self.tables}
        if self.folder_held is not None:
            return self._to_output(
                {name: held[rows[name]] for name, held in self.folder_held.items()}
            )
        if len(self.tables) < len(self.shapes):  # what is not kept needs a whole pass
            values, self.computed = self._compute(batch.x), self.computed + len(batch.x)
            for name, table in self.tables.items():
                table.write(rows[name], values[name])
            return self._to_output(values)
        values, known = self._read(rows)
        some = torch.nonzero(known)[:GRAIN, 0]
        if not self._verify_cached_rows(
            batch.x[some], {name: value[some] for name, value in values.items()}
        ):
            self._rebuild()
            self.requested -= len(batch.x)
            return self(batch)
        missing = torch.nonzero(~known)[:, 0]
        self.computed += len(missing)
        if len(missing):
            spare = min(-len(missing) % GRAIN, len(known) - len(missing))
            said = self._compute(batch.x[torch.cat([missing, missing[:1].expand(spare)])])
            for name, table in self.tables.items():
                values[name][missing] = new = said[name][: len(missing)]
                table.write(rows[name][missing], new)
        return self._to_output(values)

    @property
    def hit_rate(self) -> float:
        """The part of the images asked for (0..1) for which this run's teacher did not have to run."""
        return max(0.0, 1 - self.computed / self.requested) if self.requested else 1.0

    def discard(self) -> None:
        """Throw away what is kept: the teacher is not to be trusted."""
        for table in self.tables.values():
            table.path.unlink(missing_ok=True)

    def _compute(self, x: Tensor) -> Values:
        """The teacher's pass; what is too large for float16 becomes its largest number."""
        out = self.live.of(x)
        said = {name: out.logits if name == "logits" else out.taps[name] for name in self.shapes}
        # maps as [B, H, W, C], the order in which networks here compute them
        return {
            name: value.movedim(1, -1).flatten(1).clamp(-65504, 65504).half()
            for name, value in said.items()
        }

    def _read(self, rows: dict[str, Tensor]) -> tuple[Values, Tensor]:
        """What the tables hold, and bool [B]: of which images all is known."""
        found = {name: table.read(rows[name]) for name, table in self.tables.items()}
        known = torch.stack([known for _, known in found.values()]).all(dim=0)
        return {name: values for name, (values, _) in found.items()}, known

    def _rows(self, name: str, index: Tensor, view: Tensor) -> Tensor:
        if self.finite[name]:
            return index * self.augment.views + view
        nth = torch.arange(self.views_each, device=index.device)
        return nth.repeat_interleave(len(index) // self.views_each) * len(self.data.images) + index

    def _to_output(self, values: Values) -> ModelOutput:
        said = {}
        for name, value in values.items():
            channels, *size = self.shapes[name]
            said[name] = value.float().view(-1, *size, channels).movedim(-1, 1)
        return ModelOutput(said.pop("logits"), said)

    def _verify_cached_rows(self, x: Tensor, kept: Values) -> bool:
        """Does the teacher still say what is kept of the images `x`? Asked once a run."""
        if self.trusted or not len(x):
            return True
        self.trusted = True
        pairs = (
            (now.float(), kept[name].float())
            for name, now in self._compute(x).items()
            if name in kept
        )
        return all((now - then).abs().max() <= 0.05 * now.abs().max() + 1e-3 for now, then in pairs)

    # ---- the tables of an epoch

    def _open_epoch_tables(self, epoch: int) -> None:
        """Open the tables of this epoch, where they are not open yet."""
        if epoch == self.epoch or (self.epoch >= 0 and all(self.finite.values())):
            return
        self.epoch, self.tables, self.folder_held = epoch, {}, None
        on_cpu = self.data.images.device.type == "cpu"
        if (
            not on_cpu and not self.spec.eager
        ):  # to ask which rows are known would be to wait for the device
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
            self.folder_held = {
                name: table.values().to(self.data.images.device)
                for name, table in self.tables.items()
            }

    def _open(self, name: str, width: int, epoch: int) -> None:
        """One table for all epochs or, where it has no room, one for this. Says so where there is none."""
        limit = self.spec.max_gb * 1e9
        of_epoch = f"-s{self.seed}-e{epoch}", self.views_each
        try:
            for suffix, each in (of_epoch,) if self.mixed else (("", self.augment.views), of_epoch):
                path, rows = (
                    self.spec.folder / f"{name}{suffix}.table",
                    len(self.data.images) * each,
                )
                others = (file for file in self.spec.folder.glob("*.table") if file != path)
                if sum(file.stat().st_size for file in others) + Table.bytes(rows, width) <= limit:
                    self.tables[name], self.finite[name] = Table(path, rows, width), not suffix
                    return
        except (OSError, RuntimeError) as error:
            why, place = getattr(error, "strerror", None) or error, self.spec.folder
            log.warning(
                "the teacher's outputs cannot be kept in %s (%s); it runs in every step", place, why
            )
        else:
            if limit:
                log.info(
                    "the teacher's %s need more than teacher.store.gigabytes: it runs in every step",
                    name,
                )

    def _rebuild(self) -> None:
        why = "has its model's code changed?"
        log.warning(
            "the teacher does not say what is kept in %s (%s); it is asked anew",
            self.spec.folder,
            why,
        )
        self.discard()
        epoch, self.epoch = self.epoch, -1
        self._open_epoch_tables(epoch)

    def _complete(self, epoch: int) -> bool:
        """Compute all that the training images can ask of these tables (until the epoch's end) and is not known.
        **Returns:** whether what is known still holds."""
        index, device, n = self.data.index.cpu(), self.data.images.device, self.augment.views
        if all(self.finite.values()):
            view, index = torch.arange(n).repeat(len(index)), index.repeat_interleave(n)
        else:
            each = [
                views.sample_views(self.seed, epoch, index, self.augment, nth)
                for nth in range(self.views_each)
            ]
            view, index = torch.cat(each), index.repeat(self.views_each)
        places = {name: self._rows(name, index, view) for name in self.tables}
        most = max(1 << 11, (1 << 22) // max(shape.numel() for shape in self.shapes.values()))

        def shown(some: Tensor) -> Tensor:
            pixels = views.apply_view(
                self.data.images, index[some].to(device), view[some].to(device), self.augment
            )
            return views.normalise(pixels, self.data.mean, self.data.std)

        for part in torch.arange(len(index)).split(most):
            values, known = self._read({name: rows[part] for name, rows in places.items()})
            some = torch.nonzero(known)[:GRAIN, 0]
            if not self._verify_cached_rows(
                shown(part[some]).float(), {k: v[some].to(device) for k, v in values.items()}
            ):
                return False
            self.computed += int((~known).sum())
            for some in part[~known].split(1 << 11):
                for name, new in self._compute(shown(some)).items():
                    self.tables[name].write(places[name][some], new.cpu())
        return True
