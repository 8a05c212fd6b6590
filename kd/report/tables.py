"""Tables of runs, made from their files alone: no torch, no training, and any state of a sweep will do."""

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
from kd.runs.directory import Status, printable, read_status
from kd.runs.labels import MISALIGNED, applies, describe, make_labels, method_name  # noqa: F401
from kd.runs.locate import PLAN, GivenFolders, Search, is_run, runs_in  # noqa: F401
from kd.runs.schema import (
    LARGEST,
    Config,
    Job,
    JobLocation,
    Plan,
    Result,
    StatusRecord,
    find_error,
    read_record,
)

COLUMNS = {  # of the tables below; those of `summary` that fold seeds are means
    "id": "names the configuration, seed included; equal ids are the same run",
    "setting": "the method, and the keys that set this configuration apart from its neighbours; not the seed",
    "full_setting": "the setting as it is where its name is too long for a table",
    "method": "the distillation method; MISALIGNED: taught, on purpose, with what the teacher says of other images",
    "student": "the student's architecture and its numbers",
    "data": "the data set",
    "seed": "of everything random in the student's run",
    "status": "planned, running, done, failed, diverged, pruned or killed",
    "reason": "why a run is not done, or which of its files is damaged; damaged results are not counted",
    "overrides": "what was typed for this run",
    "epochs": "epochs of the student's training",
    "samples": "training images in an epoch",
    "batch_size": "images a step",
    "budget": "epochs x training images: what compared rows must share",
    "shares_budget": "whether that is so for this row and the one it is compared with",
    "n": "seeds that are done",
    "planned": "seeds that were planned; n < planned: the mean rests on fewer",
    "test_accuracy": "part of the test images that are right, 0 to 1, after the last epoch",
    "test_accuracy_std": "its standard deviation over seeds (n - 1)",
    "test_accuracy_ci95": "half the width of the 95 % confidence interval of its mean (Student's t); none for n = 1",
    "test_nll": "negative log-likelihood of the test labels, nats",
    "test_ece": "expected calibration error on test images, 15 equal bins, 0 to 1",
    "test_agreement": "part of the test images on which student and teacher say the same class",
    "test_teacher_kl": "KL(teacher || student) on test images, nats",
    "val_accuracy": "as test_accuracy, of the images held out of training: for every choice. Likewise val_*",
    "params": "parameters of what is shipped",
    "macs": "its multiply-accumulates for one image",
    "method_params": "parameters that only the method needed",
    "train_seconds": "wall time of the student's training",
    "images_per_second": "training images a second",
    "teacher": "the teacher's architecture",
    "teacher_params": "its parameters",
    "teacher_macs": "its multiply-accumulates for one image",
    "teacher_test_accuracy": "its accuracy on the same test images",
    "lr": "the learning rate of the epoch's last step",
    "accuracy": "part of the epoch's training views that were right, in train mode",
    "loss": "what was minimised: the weighted sum of the method's terms, each of which is a column (hard, soft, ...)",
    "seconds": "wall time of the epoch",
    "chosen": "the best setting of its method by val_accuracy, for this student and data; of several that tie the one "
    "that was planned first",
    "tied_with": "the chosen setting that has the same val_accuracy as this one, which was planned later",
    "pairs": "seeds that the row and its baseline (`standard`, same student and data) share",
    "difference": "test accuracy minus the baseline's, paired by seed, mean",
    "difference_ci95": "half the width of its 95 % confidence interval (paired Student's t)",
    "p": "of the two-sided paired t-test that the difference is 0",
    "p_holm": "p after Holm's correction over the chosen rows, which are the ones that claims are made of",
    "verdict": "the comparison in words, at the 5 % level of p_holm",
    "epoch": "epochs done",
    "folder": "where the run's files are",
}

CONTEXT = (
    "student.",
    "data.",
)  # keys that say what is trained on what: compared within, never chosen
FOLDED = (
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
KEPT_COLUMNS = (
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
    """`runs` a row a run, `history` a row an epoch, `summary` a row a configuration with its seeds folded; `swept`:
    the configuration keys that differ, which are columns too; `reliability` by setting; `searches`: for each sweep
    that may have moved, what became of its runs; `about`: what the runs say of what was run."""

    runs: pd.DataFrame
    history: pd.DataFrame
    summary: pd.DataFrame
    swept: list[str]
    reliability: dict[str, dict[str, list[float]]]
    searches: Sequence[Search] = ()
    provenance: Grouped = {}  # noqa: RUF012

    def with_short_names(self) -> dict[str, str]:
        """The settings whose names are cut, each with the whole of it."""
        if "full_setting" not in self.runs:
            return {}
        names = self.runs[["setting", "full_setting"]].drop_duplicates()
        return {
            short: full for short, full in names.itertuples(index=False, name=None) if short != full
        }


def read_plan(folder: Path) -> list[dict[str, Any]]:
    """The planned jobs of a sweep, or none. Their folders are kept relative to the sweep's, which may have moved."""
    return [job for job in _plan(folder) if "damage" not in job]


def write_plan(folder: Path, jobs: Iterable[Mapping[str, Any]]) -> None:
    """Write down what `read_plan` reads, numbered in this order."""
    base, kept = folder.resolve(), []
    for number, job in enumerate(jobs):
        kept.append(
            {**job, "number": number, **_with_paths(job, lambda path: os.path.relpath(path, base))}
        )
    write_json(folder / PLAN, kept)


def discover_runs(
    places: Iterable[Path], runs: Sequence[Path] | None = None
) -> tuple[list[dict[str, Any]], list[Search]]:
    """The jobs of sweeps' directories, and the runs that lie in any other directory; each run once. And the finished
    `standard` runs that are the jobs' baselines, though they were not part of the sweep. What is damaged beyond use is
    a job without a configuration; `damage` says why.

    **Arguments:** `runs`: folders in which runs are looked for, beside those near a sweep, that are not where they
    were planned; None: such runs are not looked for. **Returns:** the jobs, and for each sweep how the search went.
    """
    found: dict[str, dict[str, Any]] = {}
    searches, given = [], GivenFolders(runs or ())
    for place in places:
        jobs = _plan(place)
        sound = [job for job in jobs if "damage" not in job]
        if sound and runs is not None:
            searches.append(Search(place, given))
            searches[-1].locate(sound)
        for job in jobs if sound else [*jobs, *map(_job_from_run_dir, runs_in(place))]:
            found.setdefault(job["folder"], job)
    for path in dict.fromkeys(job["baseline"] for job in found.values() if job.get("baseline")):
        if path not in found and directory.load_result(Path(path)):
            found[path] = _job_from_run_dir(Path(path))
    return list(found.values()), searches


def _plan(folder: Path) -> list[dict[str, Any]]:
    """The planned jobs of a sweep. In place of a damaged one what its run's own files say, if they can be found."""
    entries, damage = read_record(Plan, folder / PLAN)
    base = os.path.realpath(folder)
    jobs: list[dict[str, Any]] = (
        [{"folder": base, "overrides": [], "damage": damage}] if damage else []
    )
    for number, job in enumerate(entries or (), 1):
        if wrong := find_error(Job, job):
            own = _job_from_run_dir(
                Path(base, "." if find_error(JobLocation, job) else job["folder"])
            ) | {"number": number - 1}
            jobs.append(
                own | {"damage": f"{PLAN} is damaged: job {number}: {wrong}"}
                if "damage" in own
                else own
            )
        else:
            jobs.append(job | _with_paths(job, lambda path: os.path.realpath(Path(base, path))))
    return jobs


def _with_paths(job: Mapping[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
    """The places that a planned job names, each as `place` has it."""
    found: dict[str, Any] = {key: place(job[key]) for key in ("folder", "baseline") if job.get(key)}
    return (
        found | {"teachers": [place(path) for path in job["teachers"]]}
        if job.get("teachers")
        else found
    )


def _job_from_run_dir(folder: Path) -> dict[str, Any]:
    """A run as if it had been planned, from its own files."""
    result, _ = read_record(Result, folder / "result.json")
    config, damage = (result.get("config"), "") if result else (None, "")
    if config is None:
        config, damage = read_record(Config, folder / "config.yaml")
    where = {"folder": os.path.realpath(folder), "overrides": []}
    if config is None:
        return where | {"damage": damage or "config.yaml is missing"}
    if result:
        taught = bool((result["teacher"] or {"chosen": False}).get("chosen", True))
    else:
        taught = config["method"]["name"] != "standard"
    return where | {
        "taught": taught,
        "config": config,
        "content": result.get("content") if result else None,
    }


# ---- rows


def load_tables(places: Iterable[Path], runs: Sequence[Path] | None = None) -> Tables:
    """All tables of the sweeps and runs in `places`, as far as they are; for `runs` see `find`."""
    jobs, searches = discover_runs(places, runs)
    whole = [job for job in jobs if "damage" not in job]
    names = describe(whole)
    swept = [
        key
        for key in names.swept
        if key == "batch_size" or not (key in COLUMNS or key.startswith(("test_", "val_")))
    ]
    for job, setting, full in zip(whole, names.short, names.full, strict=True):
        job |= {"setting": setting, "full_setting": full}
    rows, epochs = [], {}
    counts: dict[str, dict[str, list[float]]] = {}  # by folder
    reliability: dict[str, dict[str, list[float]]] = {}  # by setting
    seen: Grouped = {}
    for job in jobs:
        folder = Path(job["folder"])
        result, damage = read_record(Result, folder / "result.json")
        if "damage" in job:
            rows.append(_row(job, None, Status("failed", job["damage"])))
            continue
        if "absent" in job:
            rows.append(_row(job, None, Status("planned", job["absent"])))
            continue
        rows.append(row := _row(job, result, Status("done") if result else _state(folder, damage)))
        flat = flatten(job["config"])
        row |= {key: flat.get(key) for key in swept if applies(job, key)}
        note(seen, flat, job["taught"], result)
        measured, damage = _history(folder / "history.csv")
        row["reason"] = row["reason"] or damage
        same = {key: row[key] for key in ("id", "setting", "method", "seed")}
        epochs[row["folder"]] = [{**same, **epoch} for epoch in measured]
        if result and result.get("reliability"):
            counts[row["folder"]] = result["reliability"]
    made = _typed_frame(rows, ["setting", "method", "seed", "status", "reason"])
    kept = finished_runs(made)
    repeated = (
        set(made.loc[made["status"] == "done", "folder"]) - set(kept["folder"])
        if len(made)
        else set()
    )
    for setting, folder in zip(kept["setting"], kept.get("folder", ()), strict=True):
        if folder in counts:
            reliability[setting] = _add(reliability.get(setting), counts[folder])
    told = [row for folder, own in epochs.items() if folder not in repeated for row in own]
    history = _typed_frame(told, ["id", "setting", "method", "seed", "epoch"])
    return Tables(made, history, summarise(made, swept), swept, reliability, searches, seen)


def _state(folder: Path, damage: str) -> Status:
    """How far a run is. One whose files are damaged is not done, whatever it says."""
    said, wrong = read_record(StatusRecord, folder / "status.json")
    if wrong:
        return Status("failed", damage or wrong)
    state = read_status(folder)
    if not damage:
        return state
    return Status(
        "failed" if "done" in (state.state, said and said["state"]) else state.state, damage
    )


def _row(job: Mapping[str, Any], result: Mapping[str, Any] | None, state: Status) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": job.get("id"),
        "setting": job.get("setting", ""),
        "full_setting": job.get("full_setting", ""),
        "method": None,
        "student": None,
        "seed": None,
        "status": state.state,
        "reason": state.reason,
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
    """(The epochs of a history file, up to the first line that is not whole; what is wrong with that line). A number
    that is not finite is left out."""
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


def _add(a: dict[str, list[float]] | None, b: dict[str, list[float]]) -> dict[str, list[float]]:
    return (
        b if a is None else {key: [x + y for x, y in zip(a[key], b[key], strict=True)] for key in a}
    )


def _typed_frame(rows: Sequence[Mapping[str, Any]], without: Sequence[str]) -> pd.DataFrame:
    """A table of these rows, whole numbers as such though some are missing; its columns `without` any row."""
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=list(without))
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
    """Half the 95 % confidence interval of a mean, by Student's t; nan for fewer than two values."""
    n = int(values.count())
    return float(_quantile(n - 1) * values.std() / math.sqrt(n)) if n > 1 else math.nan


@functools.cache
def _quantile(freedom: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def finished_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that are done, one for each setting and seed (the last, where the recipe has changed since)."""
    return runs[runs["status"] == "done"].drop_duplicates(["setting", "seed"], keep="last")


def summarise(runs: pd.DataFrame, swept: Sequence[str]) -> pd.DataFrame:
    """A row per setting that has a finished run, the chosen ones first and the best by validation first: n, means,
    spread of the test accuracy, and which setting of each method validation chooses."""
    rows = []
    planned = runs.groupby("setting", sort=False)["seed"].nunique()
    groups = dict(iter(finished_runs(runs).groupby("setting", sort=False)))
    for setting, done in (
        (setting, groups[setting]) for setting in planned.index if setting in groups
    ):
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
        row["context"] = str(
            [
                (key, first[key])
                for key in swept
                if key.startswith(CONTEXT) and key != "student.epochs"
            ]
        )
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if table.empty else _mark_chosen(table)


def _mark_chosen(table: pd.DataFrame) -> pd.DataFrame:
    """`table` with `chosen` and `tied_with`, the chosen rows first and each kind by validation accuracy. Of rows that
    tie the one that was planned first comes first. The rows of a student and data set without validation images keep
    the order they were planned in, after the others."""
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
    """Whether every row of a summary was measured on validation images, so that they can be ordered by that."""
    return "val_accuracy" in table and bool(table["val_accuracy"].notna().all())


def validated(table: pd.DataFrame) -> pd.Series:
    """The validation accuracy, so that means which differ only by their summation are equal."""
    return table["val_accuracy"].round(12)
