"""A thin adapter of Optuna to Hydra: `hydra/sweeper=optuna`. What a study is stands in kd/sweep/optuna_study.py."""

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
    _target_: str = "hydra_plugins._kd_optuna.OptunaSweeper"
    n_trials: int = 20  # of the whole study, however many processes and restarts it takes
    storage: str = "sqlite:///${paths.runs}/search.db"  # any that Optuna takes; a journal: a path ending in .journal
    study: str | None = (
        None  # its name; null: from what is searched, so that the same command goes on with it
    )
    objective: str = (
        "val_accuracy"  # or val_nll, val_ece, val_agreement, val_teacher_kl; never of test images
    )
    sampler: str = "tpe"  # tpe, random
    pruner: str = "median"  # median, hyperband, none; reads the objective after each epoch
    seed: int | None = 0  # of the sampler
    params: dict[str, str] | None = field(
        default_factory=dict
    )  # what is searched, beside the command line


class OptunaSweeper(Sweeper):
    """A trial for each slot that is free, until the study has n."""

    hydra_context: Any
    launcher: Any

    def __init__(self, **settings: Any) -> None:
        self.settings = OptunaConf(**settings)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        from kd.core.errors import UserError

        self.hydra_context, self.config = hydra_context, config
        choices = _kd_grid.choices(hydra_context.config_loader, config)
        if any(choice.params != dict(config.hydra.sweeper.params or {}) for choice in choices):
            groups = ", ".join(choices[0].overrides)
            raise UserError(
                f"{groups}: each choice has swept keys of its own; search one at a time"
            )
        _kd_grid.apply_shared_config(config, choices)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from kd.core.errors import UserError
        from kd.core.io import write_json
        from kd.runs.optuna_storage import absolute
        from kd.sweep.optuna_study import Study, name_of
        from kd.sweep.scheduler import check_plan, report_on_exit, worker_environments
        from kd.training import tracking

        _kd_grid.announce_seeds(self.settings.params or {}, arguments)
        params = without_seed(self.settings.params, arguments)
        words = [*(f"{key}={value}" for key, value in params.items()), *arguments]
        overrides = OverridesParser.create(
            config_loader=self.hydra_context.config_loader
        ).parse_overrides(words)
        said = {
            override.get_key_element(): override for override in overrides
        }  # what is said last holds
        space = {key: override for key, override in said.items() if override.is_sweep_override()}
        fixed = [
            f"{key}={o.get_value_element_as_str()}" for key, o in said.items() if key not in space
        ]
        asked = self.settings
        if is_dry(self):
            return self.describe(fixed, space)
        with report_on_exit(resolve_sweep_dir(self), is_default(self)) as directory:
            search = self._described(fixed, space)
            name = asked.study or name_of(search)
            where = {"storage": absolute(asked.storage), "study": name}
            directory.claim(where)
            study = Study(
                asked.storage, name, asked.n_trials, search, asked.sampler, asked.pruner, asked.seed
            )
            jobs = study.jobs()
            write_json(directory.path / "study.json", where)
            directory.write(jobs)
            tracking.name_group(directory.path, jobs)
            typed: dict[int, list[str]] = {}  # the overrides of each job, by its number

            def begin(trial: Any) -> None:
                setting = [*fixed, *(f"{key}={suggest(trial, key, space[key])}" for key in space)]
                seeds = each_seed(self, setting, len(jobs))
                added = [job for job, _ in check_plan((job for _, job in seeds), len(jobs))]
                study.begin_trial(trial, added)
                jobs.extend(added)
                directory.write(jobs)
                typed.update(
                    {job["number"]: words for job, (words, _) in zip(added, seeds, strict=True)}
                )

            def source() -> Any:
                while (job := study.next_job()) is None:
                    if (trial := study.ask_trial()) is None:
                        return None
                    try:
                        begin(trial)
                    except UserError as error:
                        study.refuse(trial, str(error))
                return [(job, typed[job["number"]])]

            if self.launcher.pack > 1:
                getLogger("kd").info(
                    "hydra.launcher.pack is for grids: a search runs each job by itself"
                )
            try:
                assert self.config is not None
                total = asked.n_trials * len(search["seeds"])
                workers = worker_environments(
                    self.launcher.slots, total, self.config.device, each_core=False
                )
                self.launcher.stream(
                    source, total, workers, over=study.finish_trial, heard=study.report_epoch
                )
            finally:
                study.close()
                directory.write(study.jobs())  # the report is on the study, whoever ran its trials

    def describe(self, fixed: list[str], space: dict[str, Override]) -> None:
        """Print what is searched and how many trials remain, and do none."""
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
        """Describe the search. Each bound of each searched key must be allowed by itself.

        **Raises:** UserError, before any work.
        """
        from kd.config.schema import validate_config
        from kd.core.errors import UserError
        from kd.sweep.optuna_study import BEST, PRUNERS, SAMPLERS, description

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
            several = "to search on several machines, give the same command on each with one hydra.sweeper.storage"
            raise UserError(f"hydra/launcher: hydra/sweeper=optuna needs local; {several}")
        if not space:
            raise UserError(
                "hydra.sweeper.params: nothing is searched; give a key as method.T=interval(1,16)"
            )
        for key in space:
            if key.lstrip("+") in ("seed", "seeds"):
                remedy = "with seeds=[0,1,2] a trial is one setting, its value the mean over them"
                raise UserError(
                    f"{key}: seeds are not searched, as the best one would be luck; {remedy}"
                )
        search_integers(space, composed(self, fixed)[1])
        corners: dict[str, dict[str, Any]] = {}
        seeds: list[int] = []
        searched = [key for key in space if not self._is_group(key)]
        for key, override in sorted(space.items()):
            ends, log = bounds(override), "log" in getattr(override.value(), "tags", ())
            if isinstance(override.value(), IntervalSweep) and (
                ends[0] > ends[1] or (log and ends[0] <= 0)
            ):
                raise UserError(
                    f"{key}: interval(a,b) needs a <= b, and a > 0 for its logarithm, got {ends}"
                )
            for end in ends:
                words = [*fixed, f"{key}={end}"]
                node = composed(self, words)[1]
                own = seeds_of(words, node)
                config = validate_config(node)
                if not config.description.val:
                    raise UserError("data.val_size: a search needs validation images, got 0")
                seeds = seeds or own or [config.root.seed]
                if seeds != (own or [config.root.seed]):
                    raise UserError(
                        f"seeds: all trials need the same seeds, which {key}={end} changes"
                    )
                corners[f"{key}={end}"] = {
                    k: v for k, v in config.determinants().items() if not _nested(k, searched)
                }
        return description(
            self.settings.objective, seeds, {k: domain(o) for k, o in space.items()}, corners
        )

    def _is_group(self, key: str) -> bool:
        return bool(
            self.hydra_context.config_loader.get_group_options(key.lstrip("+").partition("@")[0])
        )


def _nested(key: str, searched: list[str]) -> bool:
    """Whether a key is searched, by itself or with all of its node; or is a seed, which is described apart."""
    nodes = [one.lstrip("+") for one in searched]
    return key == "seed" or any(key == node or key.startswith(f"{node}.") for node in nodes)


def search_integers(space: dict[str, Override], plain: dict[str, Any]) -> None:
    """Hydra reads every interval as one of floats; make it one of integers where the key takes nothing else."""
    from kd.config.schema import takes_integers
    from kd.core.errors import UserError

    for key, override in space.items():
        interval = override.value()
        if isinstance(interval, IntervalSweep) and takes_integers(plain, key.lstrip("+")):
            if not all(float(end).is_integer() for end in bounds(override)):
                raise UserError(
                    f"{key}: takes integers, so the ends of its interval must be, got {bounds(override)}"
                )
            interval.start, interval.end = (int(end) for end in bounds(override))


def bounds(override: Override) -> list[Any]:
    """The ends of an interval, or all choices; in one order, also those that are to be shuffled."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    start = len(override.get_key_element()) + 1
    choices = [word[start:] for word in _kd_grid.values(override)]
    return sorted(choices) if getattr(value, "shuffle", False) else choices


def domain(override: Override) -> dict[str, Any]:
    """What is searched for a key: interval(a,b) (integers where both are), tag(log,interval(a,b)), range or choice."""
    value = override.value()
    if not isinstance(value, IntervalSweep):
        return {"kind": "choice", "choices": bounds(override)}
    low, high = bounds(override)
    if isinstance(low, int) and isinstance(high, int):
        return {"kind": "int", "low": low, "high": high, "log": "log" in value.tags}
    return {"kind": "float", "low": float(low), "high": float(high), "log": "log" in value.tags}


def suggest(trial: Any, key: str, override: Override) -> Any:
    """A value for one key, of its `domain`."""
    what = domain(override)
    if what["kind"] == "choice":
        return trial.suggest_categorical(key, what["choices"])
    draw = trial.suggest_int if what["kind"] == "int" else trial.suggest_float
    return draw(key, what["low"], what["high"], log=what["log"])
