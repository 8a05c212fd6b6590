"""Build tables of runs from their files alone: no torch, no training, any state of a sweep."""

import csv
import functools
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd.core.io import write_json
from kd.core.settings import flatten
from kd.report.provenance import Grouped, note
from kd.runs import directory
from kd.runs.directory import printable, read_status
from kd.runs.labels import MISALIGNED, applies, describe, make_labels, method_name  # noqa: F401
from kd.runs.locate import PLAN, GivenFolders, Search, is_run, runs_in  # noqa: F401
from kd.runs.schema import (
    LARGEST,
    Config,
    Job,
    JobLocation,
    Plan,
    RunResult,
    StatusRecord,
    find_error,
    read_record,
)
from kd.runs.status import RunState, RunStatus

# Explanations of the columns of all tables. In `summary`, columns that fold seeds are means.
COLUMNS = {
    "id": "identifier of the configuration and its seed; runs with equal ids are the same run",
    "setting": "method and the keys in which this configuration differs from the others, without "
    "the seed",
    "full_setting": "setting in full, where its name is too long for a table",
    "method": "distillation method; MISALIGNED: the student was trained, on purpose, on the "
    "teacher's outputs for other images",
    "student": "student architecture with its size",
    "data": "data set",
    "seed": "seed of everything random in the student's run",
    "status": "planned, running, done, failed, diverged, pruned or killed",
    "reason": "why the run is not done, or which of its files is damaged; damaged results are not "
    "counted",
    "overrides": "configuration overrides of this run",
    "epochs": "number of training epochs of the student",
    "samples": "training images per epoch",
    "batch_size": "images per step",
    "budget": "epochs x training images; must be equal in rows that are compared",
    "shares_budget": "whether the row has the budget of its baseline; without a baseline, the most "
    "common budget for its student and data set",
    "n": "number of seeds that are done",
    "planned": "number of planned seeds; n < planned: the mean covers fewer seeds than planned",
    "test_accuracy": "fraction of test images classified correctly after the last epoch, 0 to 1",
    "test_accuracy_std": "standard deviation of test_accuracy over seeds (n - 1)",
    "test_accuracy_ci95": "half-width of the 95 % confidence interval of the mean test_accuracy "
    "(Student's t); empty for n = 1",
    "test_nll": "mean negative log-likelihood of the test labels, nats",
    "test_ece": "expected calibration error on test images, 15 equal-width bins, 0 to 1",
    "test_agreement": "fraction of test images on which student and teacher predict the same class",
    "test_teacher_kl": "mean KL(teacher || student) on test images, nats",
    "val_accuracy": "like test_accuracy, on images held out of training; all choices are based on "
    "it; likewise val_*",
    "params": "number of parameters of the network that is deployed",
    "macs": "multiply-accumulate operations of that network per image",
    "method_params": "number of additional parameters that only the method needed",
    "train_seconds": "wall-clock time of the student's training, seconds",
    "images_per_second": "training images per second",
    "teacher": "teacher architecture",
    "teacher_params": "number of parameters of the teacher",
    "teacher_macs": "multiply-accumulate operations of the teacher per image",
    "teacher_test_accuracy": "accuracy of the teacher on the same test images",
    "lr": "learning rate of the last step of the epoch",
    "accuracy": "fraction of the epoch's training views classified correctly, in train mode",
    "loss": "training loss: the weighted sum of the method's terms, each of which has its own "
    "column (hard, soft, ...)",
    "seconds": "wall-clock time of the epoch, seconds",
    "chosen": "whether the setting is the best of its method by val_accuracy, for this student and "
    "data set; of settings that tie, the one planned first is chosen",
    "tied_with": "the chosen setting, planned earlier, that has the same val_accuracy as this one",
    "pairs": "number of seeds that the row and its baseline (`standard`, same student and data "
    "set) share",
    "difference": "mean of the test accuracy minus the baseline's, paired by seed",
    "difference_ci95": "half-width of its 95 % confidence interval (paired Student's t)",
    "p": "p-value of the two-sided paired t-test that the difference is 0",
    "p_holm": "p after Holm's correction over the chosen rows, the only ones about which claims "
    "are made",
    "verdict": "the comparison in words, at the 5 % level of p_holm",
    "epoch": "number of epochs done",
    "folder": "directory of the run's files",
}

# Keys that define what is trained on what: settings are compared within them, never chosen
CONTEXT = (
    "student.",
    "data.",
)
FOLDED = (  # columns averaged over seeds
    "test_nll",
    "test_ece",
    "test_agreement",
    "test_teacher_kl",
    "val_accuracy",
    "val_nll",
    "val_ece",
    "train_seconds",
    "images_per_second",
    "teacher_test_accuracy",
)
KEPT_COLUMNS = (  # columns copied from the first seed
    "data",
    "params",
    "macs",
    "teacher",
    "teacher_params",
    "teacher_macs",
    "epochs",
    "samples",
    "batch_size",
    "budget",
)


class Tables(NamedTuple):
    """The tables of sweeps and runs.

    Attributes:
        runs: One row per run.
        history: One row per epoch.
        summary: One row per setting, with its seeds folded.
        swept: The configuration keys that differ between runs; they are columns too.
        reliability: The bins of the reliability diagram, by setting.
        searches: For each sweep that may have been moved, where its runs were found.
        provenance: The facts about what was run.
    """

    runs: pd.DataFrame
    history: pd.DataFrame
    summary: pd.DataFrame
    swept: list[str]
    reliability: dict[str, dict[str, list[float]]]
    searches: Sequence[Search] = ()
    provenance: Grouped = {}  # noqa: RUF012

    def with_short_names(self) -> dict[str, str]:
        """Return the settings whose names are shortened, with their full names."""
        if "full_setting" not in self.runs:
            return {}
        names = self.runs[["setting", "full_setting"]].drop_duplicates()
        return {
            short: full for short, full in names.itertuples(index=False, name=None) if short != full
        }


def read_plan(folder: Path) -> list[dict[str, Any]]:
    """Return the planned jobs of a sweep that are not damaged; an empty list without a plan.

    The file stores their folders relative to the sweep's directory, which may have been moved.
    """
    return [job for job in _plan(folder) if "damage" not in job]


def write_plan(folder: Path, jobs: Iterable[Mapping[str, Any]]) -> None:
    """Write the plan that `read_plan` reads, with the jobs numbered in this order."""
    base = folder.resolve()
    entries = []
    for number, job in enumerate(jobs):
        paths = _with_paths(job, lambda path: os.path.relpath(path, base))
        entries.append({**job, "number": number, **paths})
    write_json(folder / PLAN, entries)


def discover_runs(
    directories: Iterable[Path], run_folders: Sequence[Path] | None = None
) -> tuple[list[dict[str, Any]], list[Search]]:
    """Return the jobs of sweeps and the runs in other directories, each run once.

    The finished `standard` runs that are the baselines of jobs are included even if they were not
    part of the sweep. A run that is damaged beyond use is a job without a configuration, and its
    `damage` is the reason.

    Args:
        directories: Directories of sweeps, or directories that contain runs.
        run_folders: Folders to search, in addition to those near a sweep, for runs that are not
            where they were planned. With None, such runs are not searched for.

    Returns:
        The jobs, and the search for the runs of each sweep.
    """
    jobs_by_folder: dict[str, dict[str, Any]] = {}
    searches = []
    given = GivenFolders(run_folders or ())
    for root in directories:
        jobs = _plan(root)
        sound = [job for job in jobs if "damage" not in job]
        if sound and run_folders is not None:
            searches.append(Search(root, given))
            searches[-1].locate(sound)
        for job in jobs if sound else [*jobs, *map(_job_from_run_dir, runs_in(root))]:
            jobs_by_folder.setdefault(job["folder"], job)
    baselines = [job["baseline"] for job in jobs_by_folder.values() if job.get("baseline")]
    for path in dict.fromkeys(baselines):
        if path not in jobs_by_folder and directory.load_result(Path(path)):
            jobs_by_folder[path] = _job_from_run_dir(Path(path))
    return list(jobs_by_folder.values()), searches


def _plan(folder: Path) -> list[dict[str, Any]]:
    """Return the planned jobs of a sweep.

    A damaged job is replaced by what the run's own files contain, if they can be found.
    """
    entries, damage = read_record(Plan, folder / PLAN)
    base = os.path.realpath(folder)
    jobs: list[dict[str, Any]] = []
    if damage:
        jobs.append({"folder": base, "overrides": [], "damage": damage})
    for number, entry in enumerate(entries or (), 1):
        problem = find_error(Job, entry)
        if not problem:
            paths = _with_paths(entry, lambda path: os.path.realpath(Path(base, path)))
            jobs.append(entry | paths)
            continue
        run_folder = "." if find_error(JobLocation, entry) else entry["folder"]
        job = _job_from_run_dir(Path(base, run_folder)) | {"number": number - 1}
        if "damage" in job:
            job["damage"] = f"{PLAN} is damaged: job {number}: {problem}"
        jobs.append(job)
    return jobs


def _with_paths(job: Mapping[str, Any], convert: Callable[[str], str]) -> dict[str, Any]:
    """Return the entries of a job that hold paths, with `convert` applied to each path."""
    paths: dict[str, Any] = {
        key: convert(job[key]) for key in ("folder", "baseline") if job.get(key)
    }
    if job.get("teachers"):
        paths["teachers"] = [convert(path) for path in job["teachers"]]
    return paths


def _job_from_run_dir(folder: Path) -> dict[str, Any]:
    """Return a run as if it had been planned, from its own files."""
    result, _ = read_record(RunResult, folder / "result.json")
    config, damage = (result.get("config"), "") if result else (None, "")
    if config is None:
        config, damage = read_record(Config, folder / "config.yaml")
    job = {"folder": os.path.realpath(folder), "overrides": []}
    if config is None:
        return job | {"damage": damage or "config.yaml is missing"}
    if result:
        taught = bool((result["teacher"] or {"chosen": False}).get("chosen", True))
    else:
        taught = config["method"]["name"] != "standard"
    content = result.get("content") if result else None
    return job | {"taught": taught, "config": config, "content": content}


# ---- rows


def load_tables(directories: Iterable[Path], run_folders: Sequence[Path] | None = None) -> Tables:
    """Load all tables of the sweeps and runs in `directories`, in whatever state they are.

    Args:
        directories: Directories of sweeps, or directories that contain runs.
        run_folders: Folders to search for moved runs; see `discover_runs`.
    """
    jobs, searches = discover_runs(directories, run_folders)
    sound = [job for job in jobs if "damage" not in job]
    names = describe(sound)
    swept = [
        key
        for key in names.swept
        if key == "batch_size" or not (key in COLUMNS or key.startswith(("test_", "val_")))
    ]
    for job, setting, full in zip(sound, names.short, names.full, strict=True):
        job |= {"setting": setting, "full_setting": full}
    rows = []
    epochs_by_folder: dict[str, list[dict[str, Any]]] = {}
    reliability_by_folder: dict[str, dict[str, list[float]]] = {}
    reliability: dict[str, dict[str, list[float]]] = {}  # by setting
    provenance: Grouped = {}
    for job in jobs:
        folder = Path(job["folder"])
        result, damage = read_record(RunResult, folder / "result.json")
        if "damage" in job:
            rows.append(_row(job, None, RunStatus(RunState.FAILED, job["damage"])))
            continue
        if "absent" in job:
            rows.append(_row(job, None, RunStatus(RunState.PLANNED, job["absent"])))
            continue
        row = _row(job, result, RunStatus(RunState.DONE) if result else _state(folder, damage))
        rows.append(row)
        flat = flatten(job["config"])
        row |= {key: flat.get(key) for key in swept if applies(job, key)}
        note(provenance, flat, job["taught"], result)
        epochs, damage = _history(folder / "history.csv")
        row["reason"] = row["reason"] or damage
        run_columns = {key: row[key] for key in ("id", "setting", "method", "seed")}
        epochs_by_folder[row["folder"]] = [{**run_columns, **epoch} for epoch in epochs]
        if result and result.get("reliability"):
            reliability_by_folder[row["folder"]] = result["reliability"]
    runs = _typed_frame(rows, ["setting", "method", "seed", "status", "reason"])
    finished = finished_runs(runs)
    repeated: set[str] = set()
    if len(runs):
        done_folders = set(runs.loc[runs["status"] == RunState.DONE, "folder"])
        repeated = done_folders - set(finished["folder"])
    for setting, path in zip(finished["setting"], finished.get("folder", ()), strict=True):
        if path in reliability_by_folder:
            total = _add(reliability.get(setting), reliability_by_folder[path])
            reliability[setting] = total
    history_rows = [
        row for path, epochs in epochs_by_folder.items() if path not in repeated for row in epochs
    ]
    history = _typed_frame(history_rows, ["id", "setting", "method", "seed", "epoch"])
    summary = summarise(runs, swept)
    return Tables(runs, history, summary, swept, reliability, searches, provenance)


def _state(folder: Path, damage: str) -> RunStatus:
    """Return the state of an unfinished run.

    A run with damaged files is not done, whatever its status file contains.

    Args:
        folder: Directory of the run.
        damage: What is wrong with its result file, or "".
    """
    record, status_damage = read_record(StatusRecord, folder / "status.json")
    if status_damage:
        return RunStatus(RunState.FAILED, damage or status_damage)
    status = read_status(folder)
    if not damage:
        return status
    was_done = RunState.DONE in (status.state, record and record["state"])
    return RunStatus(RunState.FAILED if was_done else status.state, damage)


def _row(
    job: Mapping[str, Any], result: Mapping[str, Any] | None, status: RunStatus
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": job.get("id"),
        "setting": job.get("setting", ""),
        "full_setting": job.get("full_setting", ""),
        "method": None,
        "student": None,
        "seed": None,
        "status": status.state,
        "reason": status.reason,
        "overrides": " ".join(job["overrides"]),
        "epochs": None,
        "batch_size": None,
        "data": None,
    }
    if config := job.get("config"):
        row |= {"method": method_name(job), "seed": config["seed"]}
        row |= {"epochs": config["student"]["epochs"], "batch_size": config["batch_size"]}
        data = config.get("data")
        row["data"] = data.get("name") if isinstance(data, dict) else None
    if result:
        teacher = result["teacher"] or {}
        row |= {
            "id": result["id"],
            "student": result["student"],
            "samples": result["samples"]["train"],
        }
        row |= {
            key: value
            for key, value in result["metrics"].items()
            if key.startswith(("test_", "val_"))
        }
        row |= {key: result["size"][key] for key in ("params", "macs", "method_params")}
        row |= {key: result["time"][key] for key in ("train_seconds", "images_per_second")}
        row |= {"teacher": teacher.get("name"), "teacher_params": teacher.get("params")}
        row |= {"teacher_macs": teacher.get("macs")}
        row |= {"teacher_test_accuracy": teacher.get("metrics", {}).get("test_accuracy")}
        row["budget"] = f"{row['epochs']} x {row['samples']:,}"
    return {**row, "folder": printable(job["folder"])}


def _history(path: Path) -> tuple[list[dict[str, float]], str]:
    """Read the epochs of a history file, up to the first incomplete or damaged line.

    Numbers that are not finite are left out.

    Returns:
        The epochs, and what is wrong with the file, or "".
    """
    rows: list[dict[str, float]] = []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = csv.reader(io.StringIO(text[: text.rfind("\n") + 1]))
        head = next(lines, [])
        if "epoch" not in head or {"id", "setting", "method", "seed"} & set(head):
            raise ValueError
        for number, cells in enumerate(lines, 1):
            row = {name: float(cell) for name, cell in zip(head, cells, strict=True) if cell}
            if row.get("epoch") != number:
                raise ValueError
            rows.append({name: value for name, value in row.items() if abs(value) <= LARGEST})
        if not text.endswith("\n"):
            raise ValueError
    except FileNotFoundError:
        return [], ""
    except (OSError, ValueError, csv.Error):
        return rows, f"{path.name} is damaged after epoch {len(rows)}"
    return rows, ""


def _add(
    total: dict[str, list[float]] | None, counts: dict[str, list[float]]
) -> dict[str, list[float]]:
    """Add the bins of two reliability diagrams."""
    if total is None:
        return counts
    sums = {}
    for key in total:
        sums[key] = [x + y for x, y in zip(total[key], counts[key], strict=True)]
    return sums


def _typed_frame(
    rows: Sequence[Mapping[str, Any]], columns_if_empty: Sequence[str]
) -> pd.DataFrame:
    """Return a table of these rows whose integers stay integers even if some are missing.

    Args:
        rows: The rows of the table.
        columns_if_empty: The columns of a table without rows.
    """
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(columns_if_empty))
    for name in (
        "seed",
        "epochs",
        "samples",
        "batch_size",
        "epoch",
        "params",
        "macs",
        "method_params",
        "teacher_params",
        "teacher_macs",
    ):
        if name in frame:
            frame[name] = pd.array([row.get(name) for row in rows], dtype="Int64")
    return frame


# ---- seeds folded


def half_width(values: pd.Series) -> float:
    """Return half the 95 % confidence interval of a mean, by Student's t.

    The result is nan for fewer than two values.
    """
    n = int(values.count())
    return float(_quantile(n - 1) * values.std() / math.sqrt(n)) if n > 1 else math.nan


@functools.cache
def _quantile(degrees_of_freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, degrees_of_freedom))


def finished_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that are done, one for each setting and seed.

    If a seed of a setting was run more than once, because the identity of its configuration has
    changed since, the last run counts.
    """
    return runs[runs["status"] == RunState.DONE].drop_duplicates(["setting", "seed"], keep="last")


def summarise(runs: pd.DataFrame, swept: Sequence[str]) -> pd.DataFrame:
    """Return a row for each setting that has a finished run.

    A row holds n, means, the spread of the test accuracy, and whether validation chooses the
    setting among those of its method. The chosen rows come first, each part best on validation
    first.

    Args:
        runs: One row per run.
        swept: The configuration keys that differ between runs.
    """
    rows = []
    planned = runs.groupby("setting", sort=False)["seed"].nunique()
    groups = dict(iter(finished_runs(runs).groupby("setting", sort=False)))
    for setting in planned.index:
        if setting not in groups:
            continue
        done = groups[setting]
        first = done.iloc[0]
        row = {"setting": setting, "method": first["method"], "student": first["student"]}
        row |= {key: first[key] for key in swept if key in done}
        row |= {
            "n": len(done),
            "planned": planned[setting],
            "test_accuracy": done["test_accuracy"].mean(),
        }
        row |= {
            "test_accuracy_std": done["test_accuracy"].std(),
            "test_accuracy_ci95": half_width(done["test_accuracy"]),
        }
        row |= {name: done[name].mean() for name in FOLDED if name in done}
        row |= {name: first[name] for name in KEPT_COLUMNS if name in done}
        context = [
            (key, first[key])
            for key in swept
            if key.startswith(CONTEXT) and key != "student.epochs"
        ]
        row["context"] = str(context)
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if table.empty else _mark_chosen(table)


def _mark_chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Return `table` with the columns `chosen` and `tied_with`, sorted.

    The chosen rows come first, and each part is sorted by validation accuracy; rows that tie stay
    in planned order. The rows of a student and data set without validation images come after the
    others, in planned order.
    """
    table["chosen"] = table.groupby(["context", "method"])["setting"].transform("size") == 1
    table["tied_with"] = None
    score = pd.Series(0.0, index=table.index)
    if "val_accuracy" in table:
        known = table["val_accuracy"].notna().groupby(table["context"]).transform("all")
        score = validated(table).where(known, -1.0)
        best = score.groupby([table["context"], table["method"]]).transform("idxmax")
        table["chosen"] |= known & (table.index == best)
        ties = known & (score == score[best].to_numpy()) & ~table["chosen"]
        table["tied_with"] = table["setting"][best].where(ties.to_numpy(), None).to_numpy()
    order = pd.DataFrame({"chosen": table["chosen"], "score": score})
    order = order.sort_values(["chosen", "score"], ascending=False, kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def has_validation(table: pd.DataFrame) -> bool:
    """Return whether every row of a summary has a validation accuracy to be ordered by."""
    return "val_accuracy" in table and bool(table["val_accuracy"].notna().all())


def validated(table: pd.DataFrame) -> pd.Series:
    """Return the validation accuracies, rounded.

    Means of the same numbers that differ only by the order of summation become equal.
    """
    return table["val_accuracy"].round(12)
