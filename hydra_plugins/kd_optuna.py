"""A thin adapter of Optuna (ask and tell) to Hydra: `hydra/sweeper=optuna`. The objective is measured on validation."""

import os
import platform
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from hydra_plugins.kd_sweeper import composed, place

TRIES = 3  # how often a trial may lose its process


@dataclass
class OptunaConf:
    _target_: str = "hydra_plugins.kd_optuna.OptunaSweeper"
    n_trials: int = 20  # of the whole study, however many processes and restarts it takes
    storage: str = "sqlite:///${paths.runs}/search.db"  # any that Optuna takes; a journal: a path ending in .journal
    study: str | None = None  # its name; null: from what is searched, so that the same command goes on with it
    objective: str = "val_accuracy"  # of result.json's metrics; never of test images
    direction: str = "maximize"
    sampler: str = "tpe"  # tpe, random
    pruner: str = "median"  # median, hyperband, none; reads the objective after each epoch
    seed: int | None = 0  # of the sampler
    params: dict[str, str] | None = field(default_factory=dict)  # what is searched, beside the command line


ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node=OptunaConf, provider="kd")


class OptunaSweeper(Sweeper):
    """A trial for each slot that is free, until the study has n. A trial whose process died is tried again."""

    def __init__(self, **settings: Any) -> None:
        self.settings = OptunaConf(**settings)

    hydra_context: Any
    launcher: Any

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from kd.record import finished, write_json
        from kd.settings import UserError
        from kd.sweep import concluding, plan

        words = [*(f"{key}={value}" for key, value in (self.settings.params or {}).items()), *arguments]
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(words)
        space = {o.get_key_element(): o for o in overrides if o.is_sweep_override()}
        fixed = {o.get_key_element(): f"{o.get_key_element()}={o.get_value_element_as_str()}" for o in overrides
                 if not o.is_sweep_override()}  # fmt: skip
        if not hasattr(self.launcher, "stream"):
            raise UserError("hydra/launcher: hydra/sweeper=optuna needs local; to search on several machines, give the "
                            "same command on each with one hydra.sweeper.storage")  # fmt: skip
        with concluding(place(self)) as folder:
            given = list(fixed.values())
            self._check(given, space)
            study = self._study(given, space)
            write_json(folder / "study.json", {"storage": self._storage_name(), "study": study.study_name})
            running: dict[int, Any] = {}

            def source() -> Any:
                while (trial := self._ask(study)) is not None:
                    typed = [*given, *(f"{key}={suggest(trial, key, space[key])}" for key in space)]
                    try:
                        (job,) = plan(folder, [composed(self, typed)])
                    except UserError as error:  # a combination that is refused, as alpha + beta > 1
                        trial.set_user_attr("refused", str(error))
                        self._tell(study, trial, None, "FAIL")
                        continue
                    running[job["number"]] = trial
                    return job, (job["number"], typed)
                return None

            def over(job: dict[str, Any], outcome: Any) -> None:
                trial = running.pop(job["number"])
                if outcome.state == "killed":
                    return self._lose(study, trial.number, trial.params)
                result = finished(Path(job["folder"])) if outcome.state == "done" else None
                value = result["metrics"].get(self.settings.objective) if result else None
                state = "COMPLETE" if value is not None else "PRUNED" if outcome.state == "pruned" else "FAIL"
                return self._tell(study, trial, value, state)

            def heard(job: dict[str, Any], row: dict[str, Any]) -> bool:
                trial, value = running[job["number"]], row.get(self.settings.objective)
                if value is None:
                    return False
                trial.report(value, step=int(row["epoch"]))
                return bool(trial.should_prune())

            self.launcher.stream(source, self.settings.n_trials, over=over, heard=heard)

    # ---- before the first trial

    def _check(self, given: list[str], space: dict[str, Override]) -> None:
        """Each bound of each searched key must be allowed by itself. **Raises:** UserError, before any work."""
        from kd.config import check
        from kd.settings import UserError

        for name, allowed in (("sampler", ["tpe", "random"]), ("pruner", ["median", "hyperband", "none"]),
                              ("direction", ["maximize", "minimize"])):  # fmt: skip
            if (value := getattr(self.settings, name)) not in allowed:
                raise UserError(f"hydra.sweeper.{name}: {value!r} is not known; allowed: {', '.join(allowed)}")
        if self.settings.objective.startswith("test"):
            raise UserError(f"hydra.sweeper.objective: {self.settings.objective} would choose on the test images; "
                            "allowed: val_accuracy, val_nll, val_ece, ...")  # fmt: skip
        if not space:
            raise UserError("hydra.sweeper.params: nothing is searched; give a key as method.T=interval(1,16)")
        for key, override in space.items():
            for value in bounds(override):
                check(composed(self, [*given, f"{key}={value}"])[1])

    def _storage_name(self) -> str:
        kind, _, path = self.settings.storage.partition("sqlite:///")
        if self.settings.storage.endswith(".journal"):
            return str(Path(self.settings.storage).absolute())
        if kind or not path:
            return self.settings.storage
        Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{Path(path).expanduser().absolute()}"

    def _study(self, given: list[str], space: dict[str, Override]) -> Any:
        import hashlib

        try:
            import optuna
            from optuna.study import StudyDirection
        except ImportError as error:
            from kd.settings import UserError

            raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'kd[optuna]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        said = sorted([*given, *(str(o.input_line) for o in space.values())])
        said = [word for word in said if not word.startswith(("paths.", "tracker.", "hydra", "device", "threads"))]
        name = self.settings.study or hashlib.sha256(repr((said, self.settings.objective)).encode()).hexdigest()[:12]
        seed = self.settings.seed
        samplers = {"tpe": lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
                    "random": lambda: optuna.samplers.RandomSampler(seed=seed)}  # fmt: skip
        pruners = {"median": optuna.pruners.MedianPruner, "hyperband": optuna.pruners.HyperbandPruner,
                   "none": optuna.pruners.NopPruner}  # fmt: skip
        return optuna.create_study(
            storage=storage(self._storage_name()), study_name=name, load_if_exists=True,
            direction=StudyDirection[self.settings.direction.upper()], sampler=samplers[self.settings.sampler](),
            pruner=pruners[self.settings.pruner](),
        )  # fmt: skip

    # ---- the study, which other processes may be at as well

    def _ask(self, study: Any) -> Any:
        """A trial that is this process's to run, or None when the study has, or will have, all."""
        from optuna.trial import TrialState

        from kd.record import born

        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if orphaned(trial):
                self._lose(study, trial.number, trial.params)
        counted = [t for t in study.get_trials(deepcopy=False) if counts(t)]
        if sum(t.state != TrialState.WAITING for t in counted) >= self.settings.n_trials:
            return None
        trial = study.ask()
        trial.set_user_attr("owner", [platform.node(), os.getpid(), born(os.getpid())])
        numbers = sorted(t.number for t in study.get_trials(deepcopy=False) if counts(t))
        if numbers.index(trial.number) < self.settings.n_trials:
            return trial
        trial.set_user_attr("surplus", True)  # others asked at the same moment
        self._tell(study, trial, None, "FAIL")
        return None

    def _lose(self, study: Any, number: int, params: dict[str, Any]) -> None:
        """A trial without a result, whose process is gone, fails; its values wait to be tried again, if it is not the
        trial itself that kills."""
        trial = study.get_trials(deepcopy=False)[number]
        tries = trial.user_attrs.get("tries", 1)
        if not trial.state.is_finished() and tries < TRIES:
            study._storage.set_trial_user_attr(trial._trial_id, "lost", True)
        try:
            self._tell(study, number, None, "FAIL")
        except ValueError:  # another process was first
            return
        if tries < TRIES:
            study.enqueue_trial(params, user_attrs={"again": number, "tries": tries + 1})

    def _tell(self, study: Any, trial: Any, value: float | None, state: str) -> None:
        from optuna.trial import TrialState

        study.tell(trial, value, TrialState[state])


def storage(name: str) -> Any:
    """Optuna's storage of that name: a database's URL, or a journal's path."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if name.endswith(".journal"):
        backend = JournalFileBackend(name)
        return optuna.storages.JournalStorage(backend)
    arguments = {"connect_args": {"timeout": 60}} if name.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(name, engine_kwargs=arguments)


def counts(trial: Any) -> bool:
    """Whether a trial is one of the n: not one that was lost with its process, nor one too many."""
    return not trial.user_attrs.get("lost") and not trial.user_attrs.get("surplus")


def orphaned(trial: Any, patience: float = 3600.0) -> bool:
    """Whether a running trial's process is gone: surely on this machine; by its silence on another."""
    from kd.record import born

    owner = trial.user_attrs.get("owner")
    age = (datetime.now() - trial.datetime_start).total_seconds() if trial.datetime_start else 0.0
    if owner is None:
        return age > 60
    host, pid, start = owner
    return born(pid) != start if host == platform.node() else age > patience


def bounds(override: Override) -> list[Any]:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    return list(override.sweep_string_iterator())


def suggest(trial: Any, key: str, override: Override) -> Any:
    """A value for one key: from interval(a,b) (of integers where both are), tag(log,interval(a,b)), range or choice."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if isinstance(low, int) and isinstance(high, int) and "float" not in value.tags:
            return trial.suggest_int(key, low, high, log=log)
        return trial.suggest_float(key, float(low or 0), float(high or 0), log=log)
    if isinstance(value, RangeSweep | ChoiceSweep) or override.is_sweep_override():
        return trial.suggest_categorical(key, list(override.sweep_string_iterator()))
    raise AssertionError(key)
