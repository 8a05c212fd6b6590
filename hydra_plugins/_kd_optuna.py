"""kd's Optuna sweeper, `hydra/sweeper=optuna`: a thin adapter of kd.sweep.optuna_study to Hydra."""

from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from hydra_plugins import _kd_grid
from hydra_plugins._kd_grid import without_seed
from hydra_plugins._kd_sweeper import (
    composed,
    each_seed,
    is_default,
    is_dry,
    resolve_sweep_dir,
    seeds_of,
)


@dataclass
class OptunaConf:
    """The configuration of the sweeper."""

    _target_: str = "hydra_plugins._kd_optuna.OptunaSweeper"
    # Number of trials of the whole study, over all processes and restarts.
    n_trials: int = 20
    # Any storage that Optuna accepts; for a journal, a path that ends in .journal.
    storage: str = "sqlite:///${paths.runs}/search.db"
    # Name of the study; null for a hash of the search, so that the same command resumes it.
    study: str | None = None
    # val_accuracy, val_nll, val_brier, val_ece, val_agreement or val_teacher_kl; never of test
    # images.
    objective: str = "val_accuracy"
    # tpe or random.
    sampler: str = "tpe"
    # median, hyperband or none; reads the objective after each epoch.
    pruner: str = "median"
    # Seed of the sampler.
    seed: int | None = 0
    # What is searched, in addition to the command line.
    params: dict[str, str] | None = field(default_factory=dict)


class OptunaSweeper(Sweeper):
    """Starts a trial whenever a slot is free, until the study has all its trials."""

    hydra_context: Any
    launcher: Any

    def __init__(self, **settings: Any) -> None:
        self.settings = OptunaConf(**settings)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Create the launcher, with the settings of experiments that are selected."""
        from kd.core.errors import UserError

        self.hydra_context = hydra_context
        self.config = config
        choices = _kd_grid.choices(hydra_context.config_loader, config)
        if any(choice.params != dict(config.hydra.sweeper.params or {}) for choice in choices):
            groups = ", ".join(choices[0].overrides)
            raise UserError(
                f"{groups}: each choice has its own swept keys; search one choice at a time"
            )
        _kd_grid.apply_shared_config(config, choices)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the search that the arguments describe, or resume it, and report on its trials."""
        from kd.core.errors import UserError
        from kd.core.io import write_json
        from kd.runs.optuna_storage import absolute
        from kd.sweep.optuna_study import Study, name_of
        from kd.sweep.scheduler import check_plan, report_on_exit, worker_environments
        from kd.training import tracking

        _kd_grid.announce_seeds(self.settings.params or {}, arguments)
        params = without_seed(self.settings.params, arguments)
        overrides = [*(f"{key}={value}" for key, value in params.items()), *arguments]
        parsed = OverridesParser.create(
            config_loader=self.hydra_context.config_loader
        ).parse_overrides(overrides)
        # The last override of a key takes precedence.
        by_key = {override.get_key_element(): override for override in parsed}
        space = {key: override for key, override in by_key.items() if override.is_sweep_override()}
        fixed = [
            f"{key}={override.get_value_element_as_str()}"
            for key, override in by_key.items()
            if key not in space
        ]
        settings = self.settings
        if is_dry(self):
            return self.describe(fixed, space)
        with report_on_exit(resolve_sweep_dir(self), is_default(self)) as directory:
            search = self._described(fixed, space)
            name = settings.study or name_of(search)
            study_record = {"storage": absolute(settings.storage), "study": name}
            directory.claim(study_record)
            study = Study(
                settings.storage,
                name,
                settings.n_trials,
                search,
                settings.sampler,
                settings.pruner,
                settings.seed,
            )
            jobs = study.jobs()
            write_json(
                directory.path / "study.json",
                {**study_record, "objective": settings.objective},
            )
            directory.write(jobs)
            tracking.name_group(directory.path, jobs)
            overrides_by_number: dict[int, list[str]] = {}

            def begin(trial: Any) -> None:
                setting = [*fixed, *(f"{key}={suggest(trial, key, space[key])}" for key in space)]
                seeds = each_seed(self, setting, len(jobs))
                added = [job for job, _ in check_plan((job for _, job in seeds), len(jobs))]
                study.begin_trial(trial, added)
                jobs.extend(added)
                directory.write(jobs)
                for job, (job_overrides, _) in zip(added, seeds, strict=True):
                    overrides_by_number[job["number"]] = job_overrides

            def source() -> Any:
                while (job := study.next_job()) is None:
                    if (trial := study.ask_trial()) is None:
                        return None
                    try:
                        begin(trial)
                    except UserError as error:
                        study.refuse(trial, str(error))
                return [(job, overrides_by_number[job["number"]])]

            if self.launcher.jobs_per_worker > 1:
                getLogger("kd").info(
                    "hydra.launcher.jobs_per_worker is ignored: a search runs each job separately"
                )
            try:
                assert self.config is not None
                total = settings.n_trials * len(search["seeds"])
                workers = worker_environments(
                    self.launcher.slots, total, self.config.device, each_core=False
                )
                self.launcher.stream(
                    source,
                    total,
                    workers,
                    on_job_end=study.finish_trial,
                    on_epoch=study.report_epoch,
                )
            finally:
                study.close()
                # The report covers the whole study, including the trials of other processes.
                directory.write(study.jobs())

    def describe(self, fixed: list[str], space: dict[str, Override]) -> None:
        """Print what is searched and how many trials remain, without running any.

        Args:
            fixed: The overrides that all trials share.
            space: The swept override of each searched key.
        """
        from kd.sweep.dry_run import describe_search
        from kd.sweep.optuna_study import name_of, trials

        name = self.settings.study or name_of(self._described(fixed, space))
        searched = [str(override.input_line) for override in space.values()]
        shown = {
            key: getattr(self.settings, key)
            for key in ("objective", "sampler", "pruner", "storage")
        }
        counts = trials(self.settings.storage, name)
        describe_search(searched, shown | {"study": name}, counts, self.settings.n_trials)

    def _described(self, fixed: list[str], space: dict[str, Override]) -> dict[str, Any]:
        """Check the search, and return its description.

        Each bound of each searched key must be a valid value by itself.

        Raises:
            UserError: The search is invalid. No work has been done then.
        """
        from kd.config.validate import validate_config
        from kd.core.errors import UserError
        from kd.sweep.optuna_study import description

        self._check_settings(space)
        search_integers(space, composed(self, fixed)[1])
        corners: dict[str, dict[str, Any]] = {}
        seeds: list[int] = []
        searched = [key for key in space if not self._is_group(key)]
        for key, override in sorted(space.items()):
            ends = bounds(override)
            log = "log" in getattr(override.value(), "tags", ())
            if isinstance(override.value(), IntervalSweep) and (
                ends[0] > ends[1] or (log and ends[0] <= 0)
            ):
                raise UserError(
                    f"{key}: interval(a,b) needs a <= b, and a > 0 with tag(log,...), got {ends}"
                )
            for end in ends:
                overrides = [*fixed, f"{key}={end}"]
                node = composed(self, overrides)[1]
                given_seeds = seeds_of(overrides, node)
                config = validate_config(node)
                if not config.description.val:
                    raise UserError("data.val_size: a search needs validation images, got 0")
                seeds = seeds or given_seeds or [config.seed]
                if seeds != (given_seeds or [config.seed]):
                    raise UserError(
                        f"seeds: all trials need the same seeds, but {key}={end} changes them"
                    )
                corners[f"{key}={end}"] = {
                    name: value
                    for name, value in config.determinants().items()
                    if not _nested(name, searched)
                }
        domains = {key: domain(override) for key, override in space.items()}
        return description(self.settings.objective, seeds, domains, corners)

    def _check_settings(self, space: dict[str, Override]) -> None:
        """Raise UserError for invalid settings, or an invalid set of searched keys."""
        from kd.core.errors import UserError
        from kd.sweep.optuna_study import BEST, PRUNERS, SAMPLERS

        for name, allowed in (("sampler", SAMPLERS), ("pruner", PRUNERS), ("objective", BEST)):
            if (value := getattr(self.settings, name)) not in allowed:
                raise UserError(
                    f"hydra.sweeper.{name}: {value!r} is not known; allowed: {', '.join(allowed)}"
                )
        if self.settings.n_trials < 1:
            raise UserError(
                f"hydra.sweeper.n_trials: should be 1 or more, got {self.settings.n_trials}"
            )
        if not hasattr(self.launcher, "stream"):
            raise UserError(
                "hydra/launcher: hydra/sweeper=optuna requires hydra/launcher=local; to search on "
                "several machines, run the same command on each with one hydra.sweeper.storage"
            )
        if not space:
            raise UserError(
                "hydra.sweeper.params: nothing to search; give a key a range of values, such as "
                "method.T=interval(1,16)"
            )
        for key in space:
            if key.lstrip("+") in ("seed", "seeds"):
                raise UserError(
                    f"{key}: seeds are not searched, since the best seed is best by chance; use "
                    "seeds=[0,1,2] to run each trial once per seed and optimize the mean"
                )

    def _is_group(self, key: str) -> bool:
        group = key.lstrip("+").partition("@")[0]
        return bool(self.hydra_context.config_loader.get_group_options(group))


def _nested(key: str, searched: list[str]) -> bool:
    """Return whether a key is searched, by itself or with its node, or is the seed.

    The seed is described separately.
    """
    nodes = [each.lstrip("+") for each in searched]
    return key == "seed" or any(key == node or key.startswith(f"{node}.") for node in nodes)


def search_integers(space: dict[str, Override], plain: dict[str, Any]) -> None:
    """Convert intervals to integers in place for keys that accept only integers.

    Hydra parses the ends of an interval as floats.

    Args:
        space: The swept override of each searched key.
        plain: The composed configuration.

    Raises:
        UserError: An end of such an interval is not an integer.
    """
    from kd.config.validate import takes_integers
    from kd.core.errors import UserError

    for key, override in space.items():
        interval = override.value()
        if isinstance(interval, IntervalSweep) and takes_integers(plain, key.lstrip("+")):
            ends = bounds(override)
            if not all(float(end).is_integer() for end in ends):
                raise UserError(
                    f"{key}: takes integers, so both ends of its interval must be integers, "
                    f"got {ends}"
                )
            interval.start, interval.end = (int(end) for end in ends)


def bounds(override: Override) -> list[Any]:
    """Return the two ends of an interval, or all choices.

    Choices to be shuffled are sorted instead, so that the order is always the same.
    """
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    start = len(override.get_key_element()) + 1
    choices = [assignment[start:] for assignment in _kd_grid.values(override)]
    return sorted(choices) if getattr(value, "shuffle", False) else choices


def domain(override: Override) -> dict[str, Any]:
    """Return the domain of a searched key, as JSON values.

    It is of kind "int" or "float" for interval(a,b) and tag(log,interval(a,b)), according to the
    type of both ends, and of kind "choice" for range, choice and so on.
    """
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return {"kind": "choice", "choices": bounds(override)}
    low, high = bounds(override)
    if isinstance(low, int) and isinstance(high, int):
        return {"kind": "int", "low": low, "high": high, "log": "log" in value.tags}
    return {"kind": "float", "low": float(low), "high": float(high), "log": "log" in value.tags}


def suggest(trial: Any, key: str, override: Override) -> Any:
    """Let an Optuna trial choose a value of a key from its domain."""
    key_domain = domain(override)
    if key_domain["kind"] == "choice":
        return trial.suggest_categorical(key, key_domain["choices"])
    draw = trial.suggest_int if key_domain["kind"] == "int" else trial.suggest_float
    return draw(key, key_domain["low"], key_domain["high"], log=key_domain["log"])
