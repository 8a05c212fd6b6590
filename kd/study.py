"""A search's trials in an Optuna study, which any number of processes may be at: none is lost, none is one too many."""

import contextlib
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.pool import Outcome
from kd.record import born, finished
from kd.settings import UserError, first_line

BEST = {
    "val_accuracy": "maximize",
    "val_agreement": "maximize",
    "val_nll": "minimize",
    "val_ece": "minimize",
    "val_teacher_kl": "minimize",
}
SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "hyperband", "none")
PATIENCE = 3600.0  # seconds without an epoch after which a trial of another machine counts as lost
UNSIGNED = 10.0  # seconds between asking for a trial and signing it after which it counts as lost
TRIES = 3  # how often a trial may lose its process


class Study:
    """n trials, asked for one by one and told by their jobs' outcomes.

    A trial whose process is gone fails, and its values wait to be tried again; it is not counted. `storage` is the
    URL of a database or a path ending in .journal. **Raises:** UserError when it cannot be opened.
    """

    def __init__(
        self, storage: str, name: str, n_trials: int, objective: str, sampler: str, pruner: str, seed: int | None
    ):
        try:
            import optuna
        except ImportError as error:
            raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'kd[optuna]'") from error

        self.place, self.name, self.n_trials, self.objective = absolute(storage), name, n_trials, objective
        self.kind, self.seed = sampler, seed
        self.running: dict[int, Any] = {}  # job number -> trial
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruners = {
            "median": optuna.pruners.MedianPruner,
            "hyperband": optuna.pruners.HyperbandPruner,
            "none": optuna.pruners.NopPruner,
        }
        direction: Any = BEST[objective]
        try:
            self.study: Any = optuna.create_study(
                storage=opened(self.place), study_name=name, load_if_exists=True, direction=direction,
                pruner=pruners[pruner](), sampler=self._sampler(0),
            )  # fmt: skip
        except Exception as error:  # of Optuna, of SQLAlchemy, of any database's driver
            what = first_line(error)
            raise UserError(f"hydra.sweeper.storage: {self.place} cannot be opened ({what})") from error

    def ask(self) -> Any:
        """A trial that is this process's to run, or None when the study has, or will have, all."""
        from optuna.trial import TrialState

        def running() -> list[Any]:
            return list(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

        deadline = time.monotonic() + UNSIGNED
        while any("owner" not in trial.user_attrs for trial in running()) and time.monotonic() < deadline:
            time.sleep(0.1)  # another process has asked, and signs at once, if it lives
        for trial in running():
            if orphaned(trial):
                self._lose(trial.number)
        counted = [t for t in self.study.get_trials(deepcopy=False) if _counts(t)]
        if sum(t.state != TrialState.WAITING for t in counted) >= self.n_trials:
            return None
        trial = self.study.ask()
        try:
            trial.set_user_attr("owner", [platform.node(), os.getpid(), born(os.getpid())])
            trial.set_user_attr("beat", time.time())
        except RuntimeError:  # so slow to sign that another process took it for lost
            return self.ask()
        self.study.sampler = self._sampler(trial.number)
        numbers = sorted(t.number for t in self.study.get_trials(deepcopy=False) if _counts(t))
        if numbers.index(trial.number) < self.n_trials:
            return trial
        trial.set_user_attr("surplus", True)  # others asked at the same moment
        self._tell(trial, None, "FAIL")
        return None

    def begin(self, trial: Any, job: Mapping[str, Any]) -> None:
        """`job` is what the trial runs."""
        trial.set_user_attr("job", dict(job))
        self.running[job["number"]] = trial

    def refuse(self, trial: Any, reason: str) -> None:
        """These values make no allowed configuration, as alpha + beta > 1."""
        trial.set_user_attr("refused", reason)
        self._tell(trial, None, "FAIL")

    def heard(self, job: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
        """After an epoch: whether the pruner, which reads the objective, gives the trial up."""
        trial = self.running[job["number"]]
        try:
            trial.set_user_attr("beat", time.time())
            trial.report(row[self.objective], step=int(row["epoch"]))
            return bool(trial.should_prune())
        except RuntimeError:  # another process took this one for dead
            return True

    def over(self, job: Mapping[str, Any], outcome: Outcome) -> None:
        """The trial's job ended."""
        trial = self.running.pop(job["number"])
        if outcome.state == "killed":
            self._lose(trial.number)
            return
        result = finished(Path(job["folder"])) if outcome.state == "done" else None
        value = result["metrics"].get(self.objective) if result else None
        self._tell(trial, value, "COMPLETE" if result else "PRUNED" if outcome.state == "pruned" else "FAIL")

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs of all trials, whoever ran them; a run that was tried again once."""
        trials = self.study.get_trials(deepcopy=False)
        jobs = [t.user_attrs["job"] for t in trials if "job" in t.user_attrs]
        return list({job["folder"]: job for job in jobs}.values())

    def _sampler(self, number: int) -> Any:
        """Each trial draws from a stream of its own: processes and restarts repeat no other's draws."""
        import optuna

        seed = None if self.seed is None else self.seed + number
        if self.kind == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def _lose(self, number: int) -> None:
        """A trial without a result, whose process is gone, fails; its values wait to be tried again, if it is not the
        trial itself that kills."""
        from optuna.trial import TrialState

        trial = self.study.get_trials(deepcopy=False)[number]
        tries = trial.user_attrs.get("tries", 1)
        if not trial.state.is_finished() and tries < TRIES:
            self.study._storage.set_trial_user_attr(trial._trial_id, "lost", True)
        try:
            self.study.tell(number, None, TrialState.FAIL)
        except ValueError:  # another process was first
            return
        if tries < TRIES:
            self.study.enqueue_trial(trial.params, user_attrs={"again": number, "tries": tries + 1})

    def _tell(self, trial: Any, value: float | None, state: str) -> None:
        from optuna.trial import TrialState

        with contextlib.suppress(ValueError):  # another process, which took this one for dead, told it already
            self.study.tell(trial, value, TrialState[state])


def opened(place: str) -> Any:
    """Optuna's storage of that name. **Raises:** whatever Optuna, SQLAlchemy or a database's driver raise."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    if place.endswith(".journal"):
        return optuna.storages.JournalStorage(JournalFileBackend(place))
    arguments = {"connect_args": {"timeout": 60}} if place.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(place, engine_kwargs=arguments)


def absolute(storage: str) -> str:
    """The same storage, named so that any directory understands it; its folder is made."""
    sqlite = storage.startswith("sqlite:///")
    if not sqlite and not storage.endswith(".journal"):
        return storage
    place = Path(storage.removeprefix("sqlite:///")).expanduser().absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{place}" if sqlite else str(place)


def _counts(trial: Any) -> bool:
    """Whether a trial is one of the n: not one that was lost with its process, nor one too many."""
    return not trial.user_attrs.get("lost") and not trial.user_attrs.get("surplus")


def orphaned(trial: Any) -> bool:
    """Whether a running trial's process is gone: surely on this machine; by its silence on another."""
    host, pid, start = trial.user_attrs.get("owner", (None, None, None))
    if host is None:  # it died before it could sign
        return True
    if host == platform.node():
        return born(pid) != start
    return time.time() - trial.user_attrs.get("beat", 0.0) > PATIENCE
