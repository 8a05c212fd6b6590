"""A thin adapter of Optuna (ask and tell) to Hydra: `hydra/sweeper=optuna`. The objective is measured on validation."""

import contextlib
import hashlib
import os
import platform
import time
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

BEST = {
    "val_accuracy": "maximize",
    "val_agreement": "maximize",
    "val_nll": "minimize",
    "val_ece": "minimize",
    "val_teacher_kl": "minimize",
}
PATIENCE = 3600.0  # seconds without an epoch after which a trial of another machine counts as lost
TRIES = 3  # how often a trial may lose its process


@dataclass
class OptunaConf:
    _target_: str = "hydra_plugins.kd_optuna.OptunaSweeper"
    n_trials: int = 20  # of the whole study, however many processes and restarts it takes
    storage: str = "sqlite:///${paths.runs}/search.db"  # any that Optuna takes; a journal: a path ending in .journal
    study: str | None = None  # its name; null: from what is searched, so that the same command goes on with it
    objective: str = "val_accuracy"  # or val_nll, val_ece, val_agreement, val_teacher_kl; never of test images
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
        from kd.study import absolute
        from kd.sweep import concluding, plan
        from kd.table import write_plan

        words = [*(f"{key}={value}" for key, value in (self.settings.params or {}).items()), *arguments]
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(words)
        space: dict[str, Override] = {}
        fixed: dict[str, str] = {}
        for override in overrides:  # what is said last holds
            key = override.get_key_element()
            space.pop(key, None), fixed.pop(key, None)
            if override.is_sweep_override():
                space[key] = override
            else:
                fixed[key] = f"{key}={override.get_value_element_as_str()}"
        if not hasattr(self.launcher, "stream"):
            raise UserError("hydra/launcher: hydra/sweeper=optuna needs local; to search on several machines, give the "
                            "same command on each with one hydra.sweeper.storage")  # fmt: skip
        with concluding(place(self)) as folder:
            given = list(fixed.values())
            self._check(given, space)
            self.storage = absolute(self.settings.storage)
            study = self._study(given, space)
            write_json(folder / "study.json", {"storage": self.storage, "study": study.study_name})
            running: dict[int, Any] = {}
            jobs: list[dict[str, Any]] = []

            def source() -> Any:
                while (trial := self._ask(study)) is not None:
                    typed = [*given, *(f"{key}={suggest(trial, key, space[key])}" for key in space)]
                    try:
                        (job,) = plan(folder, [composed(self, typed)], jobs)
                    except UserError as error:  # a combination that is refused, as alpha + beta > 1
                        trial.set_user_attr("refused", str(error))
                        self._tell(study, trial, None, "FAIL")
                        continue
                    trial.set_user_attr("job", job)
                    jobs.append(job)
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
                trial, value = running[job["number"]], row[self.settings.objective]
                try:
                    trial.set_user_attr("beat", time.time())
                    trial.report(value, step=int(row["epoch"]))
                    return bool(trial.should_prune())
                except RuntimeError:  # another process took this one for dead
                    return True

            try:
                self.launcher.stream(source, self.settings.n_trials, over=over, heard=heard)
            finally:  # the report is on the study, whoever ran its trials
                told = [t.user_attrs["job"] for t in study.get_trials(deepcopy=False) if "job" in t.user_attrs]
                write_plan(folder, told)

    # ---- before the first trial

    def _check(self, given: list[str], space: dict[str, Override]) -> None:
        """Each bound of each searched key must be allowed by itself. **Raises:** UserError, before any work."""
        from kd.config import check
        from kd.settings import UserError

        for name, allowed in (
            ("sampler", ["tpe", "random"]),
            ("pruner", ["median", "hyperband", "none"]),
            ("objective", list(BEST)),
        ):
            if (value := getattr(self.settings, name)) not in allowed:
                raise UserError(f"hydra.sweeper.{name}: {value!r} is not known; allowed: {', '.join(allowed)}")
        if not space:
            raise UserError("hydra.sweeper.params: nothing is searched; give a key as method.T=interval(1,16)")
        for key, override in space.items():
            ends, log = bounds(override), "log" in getattr(override.value(), "tags", ())
            if isinstance(override.value(), IntervalSweep) and (ends[0] > ends[1] or (log and ends[0] <= 0)):
                raise UserError(f"{key}: interval(a,b) needs a <= b, and a > 0 for its logarithm, got {ends}")
            for end in ends:
                if not check(composed(self, [*given, f"{key}={end}"])[1]).described.val:
                    raise UserError("data.val_size: a search needs validation images, got 0")

    def _study(self, given: list[str], space: dict[str, Override]) -> Any:
        from kd.settings import UserError
        from kd.study import storage

        try:
            import optuna
            from optuna.study import StudyDirection
        except ImportError as error:
            raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'kd[optuna]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        said = sorted([*given, *(str(o.input_line) for o in space.values())])
        said = [word for word in said if not word.startswith(("paths.", "tracker.", "hydra", "device", "threads"))]
        name = self.settings.study or hashlib.sha256(repr((said, self.settings.objective)).encode()).hexdigest()[:12]
        pruners = {
            "median": optuna.pruners.MedianPruner,
            "hyperband": optuna.pruners.HyperbandPruner,
            "none": optuna.pruners.NopPruner,
        }
        try:
            return optuna.create_study(
                storage=storage(self.storage), study_name=name, load_if_exists=True,
                direction=StudyDirection[BEST[self.settings.objective].upper()],
                pruner=pruners[self.settings.pruner](), sampler=self._sampler(0),
            )  # fmt: skip
        except Exception as error:  # of Optuna, of SQLAlchemy, of any database's driver
            what = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"hydra.sweeper.storage: {self.storage} cannot be opened ({what})") from error

    def _sampler(self, number: int) -> Any:
        """Each trial draws from a stream of its own: processes and restarts repeat no other's draws."""
        import optuna

        seed = None if self.settings.seed is None else self.settings.seed + number
        if self.settings.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)

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
        trial.set_user_attr("beat", time.time())
        study.sampler = self._sampler(trial.number)
        numbers = sorted(t.number for t in study.get_trials(deepcopy=False) if counts(t))
        if numbers.index(trial.number) < self.settings.n_trials:
            return trial
        trial.set_user_attr("surplus", True)  # others asked at the same moment
        self._tell(study, trial, None, "FAIL")
        return None

    def _lose(self, study: Any, number: int, params: dict[str, Any]) -> None:
        """A trial without a result, whose process is gone, fails; its values wait to be tried again, if it is not the
        trial itself that kills."""
        from optuna.trial import TrialState

        trial = study.get_trials(deepcopy=False)[number]
        tries = trial.user_attrs.get("tries", 1)
        if not trial.state.is_finished() and tries < TRIES:
            study._storage.set_trial_user_attr(trial._trial_id, "lost", True)
        try:
            study.tell(number, None, TrialState.FAIL)
        except ValueError:  # another process was first
            return
        if tries < TRIES:
            study.enqueue_trial(params, user_attrs={"again": number, "tries": tries + 1})

    def _tell(self, study: Any, trial: Any, value: float | None, state: str) -> None:
        from optuna.trial import TrialState

        with contextlib.suppress(ValueError):  # another process, which took this one for dead, told it already
            study.tell(trial, value, TrialState[state])


def counts(trial: Any) -> bool:
    """Whether a trial is one of the n: not one that was lost with its process, nor one too many."""
    return not trial.user_attrs.get("lost") and not trial.user_attrs.get("surplus")


def orphaned(trial: Any) -> bool:
    """Whether a running trial's process is gone: surely on this machine; by its silence on another."""
    from kd.record import born

    host, pid, start = trial.user_attrs.get("owner", (None, None, None))
    if host is None:  # it died before it could sign, or has not yet; the clock of another machine may be far off
        return trial.datetime_start is not None and (datetime.now() - trial.datetime_start).days >= 1
    if host == platform.node():
        return born(pid) != start
    return time.time() - trial.user_attrs.get("beat", 0.0) > PATIENCE


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
