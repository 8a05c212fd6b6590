"""A search's trials in an Optuna study, which any number of processes may be at: none is lost, none is one too many."""

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
from kd.runs.directory import load_result, process_start_time, read_status, write_status
from kd.runs.optuna_storage import absolute, open_storage
from kd.sweep.worker_pool import Outcome

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
SEARCH = "kd.search"  # the study's attribute that holds what is searched
SETTLED = (
    1.0  # seconds after which of several processes that describe one new study the last has done so
)


def description(
    objective: str,
    seeds: Sequence[int],
    space: Mapping[str, Any],
    corners: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Describe a search: two searches with equal descriptions may share a study.

    **Arguments:** `space`: the domain of each searched key; `corners`: for each bound of each searched key what
    determines a result there, beside the searched keys.
    """
    (_, fixed), *others = corners.items()
    varying = {name: _changes(fixed, keys) for name, keys in others if keys != fixed}
    search = {
        "objective": objective,
        "direction": BEST[objective],
        "seeds": list(seeds),
        "space": dict(space),
    }
    search = {**search, "fixed": dict(fixed), "varying": varying}
    described: dict[str, Any] = json.loads(json.dumps(search, sort_keys=True))
    return described


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: after.get(key)
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    }


def name_of(search: Mapping[str, Any]) -> str:
    """Name the study of a search."""
    return hashlib.sha256(json.dumps(search, sort_keys=True).encode()).hexdigest()[:12]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """What sets the search of a study apart from another, a key each, as text for an error."""
    for key in ("objective", "seeds"):
        yield from _describe_differences({key: there[key]}, {key: here[key]})
    before, after = (
        {key: _interval(domain) for key, domain in each["space"].items()} for each in (there, here)
    )
    yield from _describe_differences(before, after, "not searched")
    searched = {*before, *after}
    before, after = (
        {k: v for k, v in each["fixed"].items() if k not in searched} for each in (there, here)
    )
    yield from _describe_differences(before, after)
    for corner in sorted({*there["varying"], *here["varying"]}):
        before, after = (each["varying"].get(corner, {}) for each in (there, here))
        yield from (
            f"{difference} (with {corner})" for difference in _describe_differences(before, after)
        )


def _describe_differences(
    there: Mapping[str, Any], here: Mapping[str, Any], missing: str = "not set"
) -> Iterator[str]:
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            yield f"{key} is {there.get(key, missing)} there and {here.get(key, missing)} here"


def _interval(domain: Mapping[str, Any]) -> str:
    """A domain as it is typed."""
    if domain["kind"] == "choice":
        return f"choice({','.join(domain['choices'])})"
    interval = f"interval({domain['low']},{domain['high']})"
    return f"tag(log,{interval})" if domain["log"] else interval


@dataclass
class RunningTrial:
    """A trial whose jobs, one for each seed, are under way."""

    trial: Any
    jobs: list[dict[str, Any]]  # the first is the one that the pruner reads
    waiting: list[dict[str, Any]] = field(default_factory=list)
    running: set[int] = field(default_factory=set)  # job numbers
    end: str = ""  # why the trial is given up: pruned, failed or killed


class Study:
    """n trials, asked for one by one and told by their jobs' outcomes.

    A trial is one setting. It has a job for each seed; its value is the mean of the objective over the seeds. The
    pruner reads the first seed only, so that it always compares epochs of one and the same seed.
    A trial whose process is gone fails, and its values wait to be tried again; it is not counted. `storage` is the
    URL of a database or a path ending in .journal; `search` is the `description` that a study keeps. n_trials, sampler,
    pruner and their seed are no part of it and may change.
    **Raises:** UserError when it cannot be opened, or is the study of another search.
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
                "hydra/sweeper=optuna needs Optuna: pip install 'kd[optuna]'"
            ) from error

        self.sweep_dir, self.name, self.n_trials, self.objective = (
            absolute(storage),
            name,
            n_trials,
            search["objective"],
        )
        self.kind, self.seed = sampler, seed
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
        except Exception as error:  # of Optuna, of SQLAlchemy, of any database's driver
            what = first_line(error)
            raise UserError(
                f"hydra.sweeper.storage: {self.sweep_dir} cannot be opened ({what})"
            ) from error
        self._check_same_search(search)

    def _create(self, direction: str, pruner: Any) -> tuple[Any, bool]:
        """(The study of that name, whether it was made here): of several processes one makes it."""
        import optuna

        file = Path(self.sweep_dir.removeprefix("sqlite:///"))
        if file.is_absolute():
            file.parent.mkdir(parents=True, exist_ok=True)
        storage, created = open_storage(self.sweep_dir), True
        try:
            storage.create_new_study([optuna.study.StudyDirection[direction.upper()]], self.name)
        except optuna.exceptions.DuplicatedStudyError:
            created = False
        study = optuna.load_study(
            study_name=self.name, storage=storage, sampler=self._sampler(0), pruner=pruner
        )
        return study, created

    def _is_undescribed(self) -> bool:
        """Whether the study has no trials, and the process that made it did not live to describe it."""
        deadline = time.monotonic() + UNSIGNED
        while SEARCH not in self.study.user_attrs and not self.study.get_trials(deepcopy=False):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.1)
        return False

    def _describe(self, search: Mapping[str, Any], seconds: float) -> None:
        """Store what the study searches, then give others `seconds` to do so: the last one holds for all."""
        if SEARCH not in self.study.user_attrs:
            self.study.set_user_attr(SEARCH, dict(search))
            time.sleep(seconds)

    def _check_same_search(self, search: Mapping[str, Any]) -> None:
        """Refuse the study of another search. **Raises:** UserError."""
        start = f"hydra.sweeper.study: {self.name} in {self.sweep_dir}"
        remedy = "choose another hydra.sweeper.study, or delete that one"
        directions = [direction.name.lower() for direction in self.study.directions]
        if len(directions) > 1:
            raise UserError(
                f"{start} has {len(directions)} objectives, a search of kd has one; {remedy}"
            )
        there = self.study.user_attrs.get(SEARCH)
        if there is None:
            raise UserError(
                f"{start} does not say what it searches: this kd did not make it; {remedy}"
            )
        if there != search:
            first, *more = differences(there, search)
            others = f" (and {len(more)} more differences)" if more else ""
            raise UserError(f"{start} is another search: {first}{others}; {remedy}")
        if directions != [search["direction"]]:
            wrong, right = directions[0], search["direction"]
            raise UserError(f"{start} {wrong}s, but {self.objective} is one to {right}; {remedy}")

    def ask_trial(self) -> Any:
        """A trial that is this process's to run, or None when the study has, or will have, all."""
        from optuna.trial import TrialState

        def running() -> list[Any]:
            return list(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

        deadline = time.monotonic() + UNSIGNED
        while (
            any("owner" not in trial.user_attrs for trial in running())
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)  # another process has asked, and signs at once, if it lives
        for trial in running():
            if is_orphaned(trial):
                self._fail_orphaned_trial(trial.number)
        counted = [t for t in self.study.get_trials(deepcopy=False) if _counts(t)]
        if sum(t.state != TrialState.WAITING for t in counted) >= self.n_trials:
            return None
        trial = self.study.ask()
        try:
            trial.set_user_attr(
                "owner", [platform.node(), os.getpid(), process_start_time(os.getpid())]
            )
            trial.set_user_attr("beat", time.time())
        except RuntimeError:  # so slow to sign that another process took it for lost
            return self.ask_trial()
        self.study.sampler = self._sampler(trial.number)
        numbers = sorted(t.number for t in self.study.get_trials(deepcopy=False) if _counts(t))
        if numbers.index(trial.number) < self.n_trials:
            return trial
        with contextlib.suppress(RuntimeError):
            trial.set_user_attr("surplus", True)  # others asked at the same moment
        self._finish_in_storage(trial, None, "FAIL")
        return None

    def begin_trial(self, trial: Any, jobs: Sequence[Mapping[str, Any]]) -> None:
        """`jobs` are what the trial runs, one for each seed; none where another process took this one for dead."""
        try:
            for number, job in enumerate(
                jobs
            ):  # an attribute each: a database may limit its length
                trial.set_user_attr(f"job{number or ''}", dict(job))
        except RuntimeError:
            return
        begun = RunningTrial(trial, [dict(job) for job in jobs])
        begun.waiting = list(begun.jobs)
        self.running_trials |= {job["number"]: begun for job in begun.jobs}

    def next_job(self) -> dict[str, Any] | None:
        """The next job of a trial that has begun, or None when all have been started."""
        for begun in self.running_trials.values():
            if begun.waiting:
                job = begun.waiting.pop(0)
                begun.running.add(job["number"])
                return job
        return None

    def refuse(self, trial: Any, reason: str) -> None:
        """These values make no allowed configuration, as alpha + beta > 1."""
        with contextlib.suppress(RuntimeError):
            trial.set_user_attr("refused", reason)
        self._finish_in_storage(trial, None, "FAIL")

    def report_epoch(self, job: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
        """After an epoch: whether the job shall stop, as the pruner gives its trial up or another seed has failed."""
        begun = self.running_trials[job["number"]]
        try:
            begun.trial.set_user_attr("beat", time.time())
            if job["number"] == begun.jobs[0]["number"] and not begun.end:
                begun.trial.report(row[self.objective], step=int(row["epoch"]))
                begun.end = "pruned" if begun.trial.should_prune() else ""
        except RuntimeError:  # another process took this one for dead
            begun.end = begun.end or "pruned"
        return begun.end in ("pruned", "failed")

    def finish_trial(self, job: Mapping[str, Any], outcome: Outcome) -> None:
        """A job ended. One that is not done ends its trial: jobs that have not started are not started."""
        begun = self.running_trials[job["number"]]
        begun.running.discard(job["number"])
        if outcome.state != "done":
            ends = {"killed": "killed", "pruned": "pruned"}
            begun.end = begun.end or ends.get(outcome.state, "failed")
        if begun.end:
            self._skip(begun)
        if begun.running or begun.waiting:
            return
        self.running_trials = {
            number: other for number, other in self.running_trials.items() if other is not begun
        }
        results = [load_result(Path(one["folder"])) for one in begun.jobs]
        values = [result["metrics"].get(self.objective) for result in results if result]
        if len(values) == len(begun.jobs) and None not in values:
            self._finish_in_storage(begun.trial, fmean(values), "COMPLETE")
        elif begun.end == "killed":
            self._fail_orphaned_trial(begun.trial.number)
        else:
            self._finish_in_storage(
                begun.trial, None, "PRUNED" if begun.end == "pruned" else "FAIL"
            )

    def _skip(self, begun: RunningTrial) -> None:
        """Start no further job of a trial. One that was killed is tried again, and starts them then."""
        end = {"pruned": "was pruned", "failed": "failed"}.get(begun.end)
        for job in begun.waiting if end else ():
            folder = Path(job["folder"])
            if read_status(folder).state == "planned":
                folder.mkdir(parents=True, exist_ok=True)
                write_status(folder, "pruned", f"not started: another seed of its trial {end}")
        begun.waiting.clear()

    def close(self) -> None:
        """Let the trials that have not ended be tried again, by whatever process comes next."""
        for number in {begun.trial.number for begun in self.running_trials.values()}:
            self._fail_orphaned_trial(number)
        self.running_trials = {}

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs of all trials, whoever ran them; a run that was tried again once."""
        trials = self.study.get_trials(deepcopy=False)
        jobs = [job for t in trials for key, job in t.user_attrs.items() if key.startswith("job")]
        return list({job["folder"]: job for job in jobs}.values())

    def _sampler(self, number: int) -> Any:
        """Each trial draws from a stream of its own: processes and restarts repeat no other's draws."""
        import optuna

        seed = None if self.seed is None else self.seed + number
        if self.kind == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)

    def _fail_orphaned_trial(self, number: int) -> None:
        """A trial without a result, whose process is gone, fails; its values wait to be tried again, if it is not the
        trial itself that kills."""
        from optuna.trial import TrialState

        trial = self.study.get_trials(deepcopy=False)[number]
        tries = trial.user_attrs.get("tries", 1)
        try:
            if not trial.state.is_finished() and tries < TRIES:
                self.study._storage.set_trial_user_attr(trial._trial_id, "lost", True)
            self.study.tell(number, None, TrialState.FAIL)
        except (ValueError, RuntimeError):  # another process was first
            return
        if tries < TRIES:
            self.study.enqueue_trial(trial.params, user_attrs={"again": number, "tries": tries + 1})

    def _finish_in_storage(self, trial: Any, value: float | None, state: str) -> None:
        from optuna.trial import TrialState

        with contextlib.suppress(
            ValueError, RuntimeError
        ):  # another process, which took this one for dead, was first
            self.study.tell(trial, value, TrialState[state])


def trials(storage: str, name: str) -> Counter[str]:
    """How many trials of a study there are in each state, of those that count; it makes neither study nor storage.

    **Raises:** UserError when the storage cannot be opened.
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
        raise UserError("hydra/sweeper=optuna needs Optuna: pip install 'kd[optuna]'") from error
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
    """Whether a database was opened in which Optuna has made no tables yet."""
    text = f"{error} {error.__cause__} {error.__context__}".lower()
    return "version_info" in text and ("no such table" in text or "exist" in text)


def _counts(trial: Any) -> bool:
    """Whether a trial is one of the n: not one that was lost with its process, nor one too many."""
    return not trial.user_attrs.get("lost") and not trial.user_attrs.get("surplus")


def is_orphaned(trial: Any) -> bool:
    """Whether a running trial's process is gone: surely on this machine; by its silence on another."""
    host, pid, start = trial.user_attrs.get("owner", (None, None, None))
    if host is None:  # it died before it could sign
        return True
    if host == platform.node():
        return process_start_time(pid) != start
    return time.time() - trial.user_attrs.get("beat", 0.0) > PATIENCE
