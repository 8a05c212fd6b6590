"""One run, from a checked configuration to its directory."""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kd import data, models
from kd.config.schema import Config, absolute, run_dir
from kd.core import console, locks
from kd.core.errors import DivergedError, PrunedError, UserError, first_line
from kd.core.execution import ExecutionSettings
from kd.core.interleave import RunCache, run_to_completion
from kd.core.rng import seeded
from kd.core.settings import Effect, flatten, keys_with
from kd.core.signals import SignalHandler
from kd.data import Data
from kd.data.batch import Batch
from kd.data.loader import misalign_batch
from kd.methods import MethodContext
from kd.models import ModelOutput
from kd.runs import directory, schema
from kd.runs.status import RunState
from kd.training import metrics, tracking
from kd.training.callbacks import Callback, CheckpointWriter, ProgressLog, Pruner, on_epoch
from kd.training.checkpoint import Checkpoints
from kd.training.device import Device, resolve
from kd.training.environment import numerics
from kd.training.finalize import RunComponents, measure, save_result
from kd.training.loop import EpochMetrics, Recipe, TrainingState, train
from kd.training.teacher_source import get_teacher, open_teacher_cache

log = logging.getLogger(__name__)


class TrainingRun:
    """One training of a student, or of a teacher, with its evaluation and its files.

    Args:
        config: The checked configuration.
        title: "student", "teacher" or "teacher 2", for the log.
        report: Called as `report("epoch", metrics)`; returns True to end the run.
        cache: Shares data set and teacher with other runs of this process.
        packed: The number of runs that are interleaved with this one, itself included.
        single: The command is for this run alone; see `kd.training.tracking.open`.
    """

    def __init__(
        self,
        config: Config,
        title: str = "student",
        report: Callable[..., bool] | None = None,
        cache: RunCache | None = None,
        packed: int = 1,
        single: bool = False,
    ) -> None:
        self.config = config
        self.title = title
        self.report = report
        self.cache = cache or RunCache()
        self.packed = packed
        self.single = single
        self.folder = run_dir(config)
        self.result: dict[str, Any] = {}

    def execute(self) -> dict[str, Any]:
        """Train, evaluate and record the run, unless it is done. Return the content of result.json.

        An interrupted run is resumed from its last checkpoint. A signal that ends the process takes
        effect after the current step, when a checkpoint has been written.

        Raises:
            UserError: A mistake that the user can mend.
            DivergedError: The loss or a weight is not finite.
            PrunedError: `report` ended the run.
        """
        try:
            with self.signals.installed():
                for _ in self.steps():
                    pass
        finally:
            self.cache.forget("step/")
        return self.result

    def steps(self) -> Generator[None, None, dict[str, Any]]:
        """Do the work of `execute`, yielding after each step so that runs can be interleaved."""
        check_single_seed(self.config)
        with self._lock():
            if self._load_existing_result():
                return self.result
            self.device = self._resolve_device()
            with self._recording():
                self.build()
                self.restore()
                with self._tracking() as tracker:
                    callbacks = self._callbacks(tracker)
                    for trained in self._training():
                        metrics = self._with_validation(trained)
                        for callback in callbacks:
                            callback(metrics)
                        self.signals.raise_if_requested()
                        self.pruner.raise_if_pruned()
                        if metrics is None:
                            with self.checkpoint_writer.saving_on_interrupt():
                                yield
                        self.stopwatch.start()
                    self.progress.stop()
                    self.result = self.finalize(tracker)
            self.checkpoints.clear()
            return self.result

    def build(self) -> None:
        """Load the data, get the teacher, and build student, method and optimizers."""
        config = self.config
        source = config.data, config.description, absolute(config.paths.cache), self.device.torch
        dataset = self.cache.get_or_create(
            "images", source, lambda: data.load(*source), "teacher", "step/"
        )
        self.components = build_components(config, dataset, self.device, self.cache)
        self.recipe = Recipe(
            config.student.epochs,
            config.batch_size,
            config.seed,
            config.data.augment,
            config.schedule,
        )
        self.state = TrainingState(
            self.components.student, self.components.method, config.optimizer
        )
        self.checkpoints = Checkpoints(self.folder, **config.checkpoint.model_dump())
        self.checkpoint_writer = CheckpointWriter(
            self.checkpoints, self.state, self.run_dir, self.device, self.signals, self.title
        )
        self.stopwatch = self.checkpoint_writer.stopwatch
        self.pruner = Pruner(self.report)

    def restore(self) -> None:
        """Restore the last checkpoint, if there is one.

        Raises:
            UserError: The checkpoint was written on another device, in another precision, with
                other kernels, or by another version of the code.
        """
        checkpoint = self.checkpoints.load()
        if checkpoint is not None:
            self._check_numerics(checkpoint["numerics"])
            where = console.display_path(self.folder)
            try:
                self.state.load(checkpoint)
            except (RuntimeError, ValueError, KeyError, IndexError) as error:
                raise UserError(
                    f"rerun: the checkpoint in {where} does not fit this version of kd "
                    f"({first_line(error)}); set rerun=true to start over"
                ) from error
            self.run_dir.write_history(checkpoint["rows"])
            log.info(
                "%s: resuming after epoch %d and %d steps, from %s",
                self.title,
                self.state.epoch,
                self.state.step,
                where,
                extra={"notice": True},
            )
        self.checkpoint_writer.start(checkpoint)
        self.progress = ProgressLog(self.title, self.config.student.epochs, self.run_dir.rows)

    def finalize(self, tracker: tracking.WandbRun) -> dict[str, Any]:
        """Check that the teacher stayed frozen, read the test images once, and write the result.

        Raises:
            RuntimeError: The teacher's weights changed during training.
        """
        parts = self.components
        if parts.teacher and parts.teacher_cache:
            try:
                parts.teacher.guard.check()
            except RuntimeError:
                parts.teacher_cache.discard()
                raise
        times = {
            "train_seconds": self.checkpoint_writer.train_seconds,
            "packed": self.packed,
            "resumed": self.checkpoint_writer.times_resumed,
        }
        result, logits = measure(self.config, self.run_dir.rows, parts, times)
        tracker.finish(result, parts.dataset, logits)
        save_result(self.config, self.run_dir, parts, result, logits)
        tracker.log_weights(self.config, self.folder, result)
        return result

    @property
    def signals(self) -> SignalHandler:
        """The signal handler that interleaved runs share."""
        return self.cache.signals

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Let one process at a time train this run; the others wait and then find its result."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        path = self.folder.with_name(f".{self.folder.name}.lock")
        waiting = f"{self.title}: waiting for the process that trains it"
        # Signals of interleaved runs, which may be between two steps, are answered while waiting
        with locks.hold(path, waiting, patience=0, pause=self.signals.raise_if_requested):
            yield

    def _load_existing_result(self) -> bool:
        """Load the result of an earlier process, if there is one and `rerun` is false."""
        existing = directory.load_result(self.folder)
        if existing is None or self.config.rerun:
            if self.config.rerun:
                directory.archive_previous_run(self.folder)
            check_resume_compatible(self.config)
            return False
        Checkpoints(self.folder).clear()  # left by a process that was killed at its very end
        log.info(
            "%s: found in %s (rerun=true trains it again)",
            self.title,
            console.display_path(self.folder),
            extra={"notice": self.title == "student"},
        )
        if self.single:
            tracking.republish(self.config, self.folder, existing)
        self.result = existing
        return True

    def _resolve_device(self) -> Device:
        config = self.config
        cache = absolute(config.paths.cache)
        return resolve(
            config.device, config.precision, cache, config.cpu_kernels == "auto", config.compile
        )

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Create the run's directory and record how the run ends."""
        self.run_dir = directory.RunDirectory(self.folder, self.config.to_dict())
        try:
            with self.run_dir.running():
                yield
        except (Exception, KeyboardInterrupt) as error:
            self.cache.forget("teacher")  # do not reuse it for the next run
            states = {
                DivergedError: RunState.DIVERGED,
                PrunedError: RunState.PRUNED,
                KeyboardInterrupt: RunState.KILLED,
            }
            matching = (state for kind, state in states.items() if isinstance(error, kind))
            self.run_dir.mark_ended(next(matching, RunState.FAILED), error)
            raise

    @contextmanager
    def _tracking(self) -> Iterator[tracking.WandbRun]:
        """Open W&B's run and the progress bar; report the epochs before an interruption again.

        Inside, signals wait until `raise_if_requested` is called.
        """
        with (
            tracking.open(self.config, self.folder, self.title, self.single) as tracker,
            self.progress,
            self.signals.deferring(),
        ):
            for row in self.run_dir.rows:
                tracker.log_epoch(row)
                self.pruner(row)
            yield tracker

    def _callbacks(self, tracker: tracking.WandbRun) -> list[Callback]:
        """Return what is called after each step, in this order."""
        return [
            on_epoch(self.progress.log_epoch),
            on_epoch(self.run_dir.append_epoch),
            self.checkpoint_writer,
            on_epoch(tracker.log_epoch),
            self.pruner,
        ]

    def _training(self) -> Iterator[EpochMetrics | None]:
        """Start the stopwatch and the training loop."""
        self.stopwatch.start()
        return train(
            self.state,
            self._teacher_outputs if self.components.teacher_cache else None,
            self.components.dataset.train,
            self.recipe,
            self.device,
            self.cache,
        )

    def _teacher_outputs(self, batch: Batch) -> ModelOutput:
        """Return the teacher's outputs for a batch, computed once for all interleaved runs."""
        config, seed = self.config, self.config.seed
        dataset = self.components.dataset
        method = self.components.method
        outputs = self.components.teacher_cache
        assert outputs is not None
        if config.misaligned:
            batch = misalign_batch(batch, dataset.train, seed, config.data.augment, method.views)
        # The folder's name depends on everything else that the outputs depend on
        cache_key = (
            dataset,
            outputs.spec.folder,
            method.teacher_taps,
            (seed, method.views, method.mixed, len(batch.x), batch.epoch, config.misaligned),
        )
        shared: ModelOutput = self.cache.get_or_create(
            f"step/teacher/{seed}", cache_key, lambda: outputs(batch)
        )
        return shared

    def _with_validation(self, trained: EpochMetrics | None) -> EpochMetrics | None:
        """Add validation metrics, seconds and images per second to an epoch's metrics."""
        seconds = self.stopwatch.stop()
        if trained is None:
            return None
        images = self.components.dataset.train.batches(self.recipe.batch_size)
        images *= self.recipe.batch_size
        speed = images / max(seconds, 1e-9)
        self.stopwatch.start()
        validation = self._validate()
        seconds = self.stopwatch.stop()
        self.stopwatch.reset()
        return {**trained, **validation, "seconds": seconds, "images_per_second": speed}

    def _validate(self) -> dict[str, float]:
        parts = self.components
        if parts.dataset.val is None:
            return {}
        logits = metrics.predict(
            parts.method.deploy(parts.student), parts.dataset.val, parts.device
        )
        teacher_logits = parts.teacher.val_logits if parts.teacher else None
        values = metrics.metrics(logits, parts.dataset.val.targets, teacher_logits)
        return {f"val_{name}": value for name, value in values.items()}

    def _check_numerics(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint of another device, precision or kernels; warn about versions."""
        current = numerics(self.device)
        where = console.display_path(self.folder)
        for key in ("device", "precision", "kernels"):
            if saved[key] != current[key]:
                raise UserError(
                    f"{key}: cannot resume {where}: {key} was {saved[key]} and is now "
                    f"{current[key]}; resume with {key} as it was, or set rerun=true to start over"
                )
        changes = [
            f"{key} {value} (now {current.get(key)})"
            for key, value in saved.items()
            if value != current.get(key)
        ]
        if changes:
            log.warning(
                "%s was interrupted with %s: the result may not be bit-identical to that of an "
                "uninterrupted run",
                where,
                ", ".join(changes),
            )


def build_components(
    config: Config, dataset: Data, device: Device, cache: RunCache
) -> RunComponents:
    """Get the teacher and build student and method, each from its own random stream."""
    seed = config.seed

    def train_teacher(teacher_config: Config, title: str) -> dict[str, Any]:
        result = run_to_completion(TrainingRun(teacher_config, title, cache=cache).steps())
        return dict(result)

    teacher = None
    if config.needs_teacher:
        teacher = get_teacher(config, dataset, device, cache, train_teacher)
    with seeded(seed, "student"):
        network = models.build(config.student.network, len(dataset.classes), dataset.size)
        student = device.prepare_module(network)
    if config.student.label_fraction < 1:
        full = dataset
        dataset = cache.get_or_create(
            f"step/labels/{seed}",
            (full, config.student.label_fraction, config.needs_teacher),
            lambda: data.keep_label_fraction(
                full, config.student.label_fraction, seed, config.needs_teacher
            ),
        )
    labels = torch.full((dataset.samples,), -1)
    labels[dataset.train.index.cpu()] = dataset.train.targets.cpu()
    context = MethodContext(
        student=student.shapes(dataset.size),
        teacher=teacher.net.shapes(dataset.size) if teacher else {},
        classes=len(dataset.classes),
        samples=dataset.samples,
        student_net=student,
        teacher_net=teacher.net if teacher else None,
        epochs=config.student.epochs,
        labels=labels,
    )
    with seeded(seed, "method"):
        method = device.prepare_module(config.method_class(config.method, context))
    outputs = open_teacher_cache(config, teacher, dataset, method, device) if teacher else None
    if config.misaligned:
        log.warning(
            "teacher.outputs=misaligned: every image is taught, on purpose, with the teacher's "
            "outputs for another image"
        )
    return RunComponents(dataset, device, teacher, student, method, outputs)


def check_single_seed(config: Config) -> None:
    """Refuse a configuration that stands for several runs.

    Raises:
        UserError: `seeds` is set.
    """
    if config.seeds is not None:
        raise UserError(
            "seeds: several seeds need a multirun; add -m, without hydra.mode=RUN, and use "
            "hydra/sweeper=grid or optuna"
        )


def check_resume_compatible(config: Config) -> None:
    """Refuse to resume an interrupted run with settings that would change its numbers.

    Most settings name another run, with a directory of its own. Those checked here do not.

    Raises:
        UserError: A setting differs from that of the interrupted run.
    """
    check_single_seed(config)
    folder = run_dir(config)
    if config.rerun or not Checkpoints(folder).exists() or directory.load_result(folder):
        return
    saved_config, _ = schema.read_record(schema.Config, folder / "config.yaml")
    if saved_config is None:
        return
    saved = flatten(saved_config)
    current = flatten(config.to_dict())
    keys = keys_with(ExecutionSettings, Effect.ROUNDING)
    changed = [key for key in keys if saved.get(key) != current[key]]
    if changed:
        changes = [f"{key} was {saved.get(key)} and is now {current[key]}" for key in changed]
        raise UserError(
            f"{changed[0]}: cannot resume {console.display_path(folder)}: {', '.join(changes)}; "
            "change it back, or set rerun=true to start over"
        )
