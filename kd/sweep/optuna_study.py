"""Run a search's trials in an Optuna study that any number of processes may share.

No trial is lost when a process dies, and the study never gets more trials than configured.
"""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from kd.core.errors import UserError, first_line
from kd.core.locks import process_start_time
from kd.runs.directory import load_result, read_status, write_status
from kd.runs.optuna_storage import absolute, open_storage
from kd.runs.status import RunState, RunStatus

# The allowed objectives, and the direction in which each is better.
BEST = {
    "val_accuracy": "maximize",
    "val_agreement": "maximize",
    "val_nll": "minimize",
    "val_brier": "minimize",
    "val_ece": "minimize",
    "val_teacher_kl": "minimize",
}
SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "hyperband", "none")
PATIENCE = 3600.0  # seconds without an epoch after which another machine's trial counts as lost
UNSIGNED = 10.0  # seconds that a process has to sign a new trial before it counts as lost
TRIES = 3  # how often the values of a trial are tried if each process that runs them dies
SEARCH = "kd.search"  # the study's user attribute that holds what is searched
SETTLED = 1.0  # seconds to wait until all processes that describe one new study have done so


def description(
    objective: str,
    seeds: Sequence[int],
    space: Mapping[str, Any],
    corners: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Describe a search; two searches with equal descriptions may share a study.

    Args:
        objective: The metric to optimize, a key of `BEST`.
        seeds: The seeds over which each trial is averaged.
        space: The domain of each searched key.
        corners: For each bound of each searched key, the other keys that determine a result there.

    Returns:
        The description, which consists of JSON values.
    """
    (_, fixed), *others = corners.items()
    varying = {name: _changes(fixed, keys) for name, keys in others if keys != fixed}
    search = {
        "objective": objective,
        "direction": BEST[objective],
        "seeds": list(seeds),
        "space": dict(space),
        "fixed": dict(fixed),
        "varying": varying,
    }
    json_search: dict[str, Any] = json.loads(json.dumps(search, sort_keys=True))
    return json_search


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: after.get(key)
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    }


def name_of(search: Mapping[str, Any]) -> str:
    """Return the default name of the study of a search, a hash of its description."""
    return hashlib.sha256(json.dumps(search, sort_keys=True).encode()).hexdigest()[:12]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences between two searches, one per key, as text for an error message.

    Args:
        there: The description of the search that is stored in the study.
        here: The description of the search that was requested.
    """
    for key in ("objective", "seeds"):
        yield from _describe_differences({key: there[key]}, {key: here[key]})
    stored = {key: _interval(domain) for key, domain in there["space"].items()}
    requested = {key: _interval(domain) for key, domain in here["space"].items()}
    yield from _describe_differences(stored, requested, "not searched")
    searched = {*stored, *requested}
    stored = {key: value for key, value in there["fixed"].items() if key not in searched}
    requested = {key: value for key, value in here["fixed"].items() if key not in searched}
    yield from _describe_differences(stored, requested)
    for corner in sorted({*there["varying"], *here["varying"]}):
        stored = there["varying"].get(corner, {})
        requested = here["varying"].get(corner, {})
        for difference in _describe_differences(stored, requested):
            yield f"{difference} (with {corner})"


def _describe_differences(
    stored: Mapping[str, Any], requested: Mapping[str, Any], missing: str = "not set"
) -> Iterator[str]:
    for key in sorted({*stored, *requested}):
        if stored.get(key) != requested.get(key):
            in_study = stored.get(key, missing)
            yield f"{key} is {in_study} in the study and {requested.get(key, missing)} here"


def _interval(domain: Mapping[str, Any]) -> str:
    """Return a domain in the syntax of the command line."""
    if domain["kind"] == "choice":
        return f"choice({','.join(domain['choices'])})"
    interval = f"interval({domain['low']},{domain['high']})"
    return f"tag(log,{interval})" if domain["log"] else interval


@dataclass
class RunningTrial:
    """A trial whose jobs, one per seed, are being run."""

    trial: Any
    jobs: list[dict[str, Any]]  # the pruner reads the first one
    waiting: list[dict[str, Any]] = field(default_factory=list)
    running: set[int] = field(default_factory=set)  # job numbers
    end: RunState | None = (
        None  # why the trial is given up: pruned, failed or killed; empty if it is not
    )


class Study:
    """An Optuna study of a fixed number of trials, created or resumed.

    A trial is one setting. It has one job per seed, and its value is the mean of the objective over
    the seeds. The pruner reads the first seed only, so it always compares epochs of the same seed.
    A trial whose process has died fails and is not counted. Its values are enqueued, to be tried
    again. `n_trials`, the sampler, the pruner and `seed` may change when a study is resumed.

    Args:
        storage: The URL of a database, or a path that ends in .journal.
        name: Name of the study.
        n_trials: Number of trials, over all processes and restarts.
        search: The `description` of the search, which is stored in the study.
        sampler: One of `SAMPLERS`.
        pruner: One of `PRUNERS`.
        seed: Seed of the sampler; None for a random one.

    Raises:
        UserError: Optuna is not installed, the study cannot be opened, or it belongs to another
            search.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        n_trials: int,
        search: Mapping[str, Any],
        sampler: str,
        pruner: str,
        seed: int | None,
    ):
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "hydra/sweeper: optuna requires the package optuna; run pip install -e '.[optuna]'"
            ) from error

        self.storage = absolute(storage)
        self.name = name
        self.n_trials = n_trials
        self.objective = search["objective"]
        self.kind = sampler
        self.seed = seed
        self.running_trials: dict[int, RunningTrial] = {}  # by job number
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruners = {
            "median": optuna.pruners.MedianPruner,
            "hyperband": optuna.pruners.HyperbandPruner,
            "none": optuna.pruners.NopPruner,
        }
        try:
            self.study, created = self._create(search["direction"], pruners[pruner]())
            if created or self._is_undescribed():
                self._describe(search, 0.0 if created else SETTLED)
        except Exception as error:  # of Optuna, SQLAlchemy, or the driver of any database
            reason = first_line(error)
            raise UserError(
                f"hydra.sweeper.storage: {self.storage} cannot be opened ({reason})"
            ) from error
        self._check_same_search(search)

    def _create(self, direction: str, pruner: Any) -> tuple[Any, bool]:
        """Return (the study of that name, whether this process created it)."""
        import optuna

        file = Path(self.storage.removeprefix("sqlite:///"))
        if file.is_absolute():
            file.parent.mkdir(parents=True, exist_ok=True)
        storage = open_storage(self.storage)
        created = True
        try:
            storage.create_new_study([optuna.study.StudyDirection[direction.upper()]], self.name)
        except optuna.exceptions.DuplicatedStudyError:
            created = False
        study = optuna.load_study(
            study_name=self.name, storage=storage, sampler=self._sampler(0), pruner=pruner
        )
        return study, created

    def _is_undescribed(self) -> bool:
        """Return whether the study has no trials, and its creator died before describing it."""
        deadline = time.monotonic() + UNSIGNED
        while SEARCH not in self.study.user_attrs and not self.study.get_trials(deepcopy=False):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.1)
        return False

    def _describe(self, search: Mapping[str, Any], seconds: float) -> None:
        """Store what the study searches, and wait `seconds` for other processes that do the same.

        The description that is stored last is valid for all of them.
        """
        if SEARCH not in self.study.user_attrs:
            self.study.set_user_attr(SEARCH, dict(search))
            time.sleep(seconds)

    def _check_same_search(self, search: Mapping[str, Any]) -> None:
        """Raise UserError if the study belongs to another search."""
        prefix = f"hydra.sweeper.study: {self.name} in {self.storage}"
        remedy = "choose another hydra.sweeper.study, or delete that one"
        directions = [direction.name.lower() for direction in self.study.directions]
        if len(directions) > 1:
            raise UserError(
                f"{prefix} has {len(directions)} objectives, but a search has only one; {remedy}"
            )
        stored = self.study.user_attrs.get(SEARCH)
        if stored is None:
            raise UserError(
                f"{prefix} does not record what it searches, so this version of kd did "
                f"not create it; {remedy}"
            )
        if stored != search:
            first, *more = differences(stored, search)
            others = f" (and {len(more)} more differences)" if more else ""
            raise UserError(f"{prefix} belongs to another search: {first}{others}; {remedy}")
        if directions != [search["direction"]]:
            actual = directions[0]
            required = search["direction"]
            raise UserError(
                f"{prefix} {actual}s, but {self.objective} must be {required}d; {remedy}"
            )

    def ask_trial(self) -> Any:
        """Return a new trial for this process to run, or None if the study has enough trials."""
        from optuna.trial import TrialState

        def running() -> list[Any]:
            return list(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

        deadline = time.monotonic() + UNSIGNED
        while (
            any("owner" not in trial.user_attrs for trial in running())
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)  # another process has a new trial, and signs it at once if it is alive
        for trial in running():
            if is_orphaned(trial):
                self._fail_orphaned_trial(trial.number)
        counted = [trial for trial in self.study.get_trials(deepcopy=False) if _counts(trial)]
        if sum(trial.state != TrialState.WAITING for trial in counted) >= self.n_trials:
            return None
        trial = self.study.ask()
        try:
            trial.set_user_attr(
                "owner", [platform.node(), os.getpid(), process_start_time(os.getpid())]
            )
            trial.set_user_attr("beat", time.time())
        except RuntimeError:  # signed so late that another process took it for lost
            return self.ask_trial()
        self.study.sampler = self._sampler(trial.number)
        numbers = sorted(t.number for t in self.study.get_trials(deepcopy=False) if _counts(t))
        if numbers.index(trial.number) < self.n_trials:
            return trial
        with contextlib.suppress(RuntimeError):
            trial.set_user_attr("surplus", True)  # other processes started trials at this moment
        self._finish_in_storage(trial, None, "FAIL")
        return None

    def begin_trial(self, trial: Any, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Record the jobs of a trial, one per seed, to be started by `next_job`.

        Nothing is recorded if another process has taken this one for dead and failed the trial.
        """
        try:
            # One attribute per job, since a database may limit the length of an attribute.
            for index, job in enumerate(jobs):
                trial.set_user_attr(f"job{index or ''}", dict(job))
        except RuntimeError:
            return
        running_trial = RunningTrial(trial, [dict(job) for job in jobs])
        running_trial.waiting = list(running_trial.jobs)
        self.running_trials |= {job["number"]: running_trial for job in running_trial.jobs}

    def next_job(self) -> dict[str, Any] | None:
        """Return the next job of a running trial, or None if all have been started."""
        for running_trial in self.running_trials.values():
            if running_trial.waiting:
                job = running_trial.waiting.pop(0)
                running_trial.running.add(job["number"])
                return job
        return None

    def refuse(self, trial: Any, reason: str) -> None:
        """Fail a trial whose values make an invalid configuration, such as alpha + beta > 1."""
        with contextlib.suppress(RuntimeError):
            trial.set_user_attr("refused", reason)
        self._finish_in_storage(trial, None, "FAIL")

    def report_epoch(self, job: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
        """Record an epoch of a job, and return whether the job should stop.

        It should stop if the pruner gives its trial up, or if another seed of the trial has failed.

        Args:
            job: The job.
            row: The epoch's row of its history, with the objective.
        """
        running_trial = self.running_trials[job["number"]]
        try:
            running_trial.trial.set_user_attr("beat", time.time())
            if job["number"] == running_trial.jobs[0]["number"] and not running_trial.end:
                running_trial.trial.report(row[self.objective], step=int(row["epoch"]))
                running_trial.end = RunState.PRUNED if running_trial.trial.should_prune() else None
        except RuntimeError:  # another process took this one for dead
            running_trial.end = running_trial.end or RunState.PRUNED
        return running_trial.end in (RunState.PRUNED, RunState.FAILED)

    def finish_trial(self, job: Mapping[str, Any], outcome: RunStatus) -> None:
        """Record the outcome of a job, and finish its trial if it was the trial's last one.

        A job that is not done ends its trial: jobs that have not been started are skipped.
        """
        running_trial = self.running_trials[job["number"]]
        running_trial.running.discard(job["number"])
        if outcome.state != RunState.DONE:
            ends = {RunState.KILLED: RunState.KILLED, RunState.PRUNED: RunState.PRUNED}
            running_trial.end = running_trial.end or ends.get(outcome.state, RunState.FAILED)
        if running_trial.end:
            self._skip_waiting(running_trial)
        if running_trial.running or running_trial.waiting:
            return
        self.running_trials = {
            number: other
            for number, other in self.running_trials.items()
            if other is not running_trial
        }
        results = [load_result(Path(each["folder"])) for each in running_trial.jobs]
        values = [result["metrics"].get(self.objective) for result in results if result]
        if len(values) == len(running_trial.jobs) and None not in values:
            self._finish_in_storage(running_trial.trial, fmean(values), "COMPLETE")
        elif running_trial.end == RunState.KILLED:
            self._fail_orphaned_trial(running_trial.trial.number)
        else:
            state = "PRUNED" if running_trial.end == RunState.PRUNED else "FAIL"
            self._finish_in_storage(running_trial.trial, None, state)

    def _skip_waiting(self, running_trial: RunningTrial) -> None:
        """Start no more jobs of a trial. A killed trial is tried again, and starts them then."""
        ends: dict[RunState | None, str] = {
            RunState.PRUNED: "was pruned",
            RunState.FAILED: "failed",
        }
        end = ends.get(running_trial.end)
        for job in running_trial.waiting if end else ():
            folder = Path(job["folder"])
            if read_status(folder).state == RunState.PLANNED:
                folder.mkdir(parents=True, exist_ok=True)
                write_status(
                    folder, RunState.PRUNED, f"not started: another seed of its trial {end}"
                )
        running_trial.waiting.clear()

    def close(self) -> None:
        """Fail the unfinished trials, and enqueue their values for the next process to try."""
        for number in {each.trial.number for each in self.running_trials.values()}:
            self._fail_orphaned_trial(number)
        self.running_trials = {}

    def jobs(self) -> list[dict[str, Any]]:
        """Return the jobs of all trials of all processes, each run only once."""
        jobs: dict[str, dict[str, Any]] = {}  # by folder: a retried trial repeats its runs
        for trial in self.study.get_trials(deepcopy=False):
            for key, job in trial.user_attrs.items():
                if key.startswith("job"):
                    jobs[job["folder"]] = job
        return list(jobs.values())

    def _sampler(self, number: int) -> Any:
        """Return a sampler with a random stream for this trial only.

        So processes and restarts do not repeat the draws of another trial.
        """
        import optuna

        seed = None if self.seed is None else self.seed + number
        if self.kind == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def _fail_orphaned_trial(self, number: int) -> None:
        """Fail a trial without a result whose process is gone, and enqueue its values again.

        Values that have lost `TRIES` processes are not enqueued: they may be what kills them.
        """
        from optuna.trial import TrialState

        trial = self.study.get_trials(deepcopy=False)[number]
        tries = trial.user_attrs.get("tries", 1)
        try:
            if not trial.state.is_finished() and tries < TRIES:
                self.study._storage.set_trial_user_attr(trial._trial_id, "lost", True)
            self.study.tell(number, None, TrialState.FAIL)
        except (ValueError, RuntimeError):  # another process failed it first
            return
        if tries < TRIES:
            self.study.enqueue_trial(trial.params, user_attrs={"again": number, "tries": tries + 1})

    def _finish_in_storage(self, trial: Any, value: float | None, state: str) -> None:
        """Store the end of a trial, unless another process took this one for dead and did so."""
        from optuna.trial import TrialState

        with contextlib.suppress(ValueError, RuntimeError):
            self.study.tell(trial, value, TrialState[state])


def trials(storage: str, name: str) -> Counter[str]:
    """Count the trials of a study in each state, without creating the study or its storage.

    Args:
        storage: The URL of a database, or a path that ends in .journal.
        name: Name of the study.

    Returns:
        Number of trials by state in lower case. Trials that are waiting, were lost, or are surplus
        are left out. Empty if there is no such study.

    Raises:
        UserError: The storage cannot be opened, or Optuna is not installed.
    """
    local = storage.startswith("sqlite:///") or storage.endswith(".journal")
    if local and not Path(storage.removeprefix("sqlite:///")).expanduser().exists():
        return Counter()
    try:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.load_study(
            study_name=name, storage=open_storage(absolute(storage), skip_table_creation=True)
        )
    except ImportError as error:
        raise UserError(
            "hydra/sweeper: optuna requires the package optuna; run pip install -e '.[optuna]'"
        ) from error
    except KeyError:  # no study of that name
        return Counter()
    except Exception as error:
        if _has_no_tables(error):
            return Counter()
        raise UserError(
            f"hydra.sweeper.storage: {storage} cannot be opened ({first_line(error)})"
        ) from error
    counted = [trial for trial in study.get_trials(deepcopy=False) if _counts(trial)]
    return Counter(trial.state.name.lower() for trial in counted if trial.state.name != "WAITING")


def _has_no_tables(error: BaseException) -> bool:
    """Return whether the error means that Optuna has not created its tables in a database yet."""
    text = f"{error} {error.__cause__} {error.__context__}".lower()
    return "version_info" in text and ("no such table" in text or "exist" in text)


def _counts(trial: Any) -> bool:
    """Return whether a trial counts towards `n_trials`: it is neither lost nor surplus."""
    return not trial.user_attrs.get("lost") and not trial.user_attrs.get("surplus")


def is_orphaned(trial: Any) -> bool:
    """Return whether the process of a running trial is gone.

    On this machine that is certain; on another it is assumed after `PATIENCE` without an epoch.
    """
    host, pid, start = trial.user_attrs.get("owner", (None, None, None))
    if host is None:  # its process died before signing it
        return True
    if host == platform.node():
        return bool(process_start_time(pid) != start)
    return bool(time.time() - trial.user_attrs.get("beat", 0.0) > PATIENCE)
