"""Run the parts of the study in docs/study.md and store the tables that the page is written from.

    python -m benchmarks.study              # list the parts
    python -m benchmarks.study original data=imagefolder data.root=PATH    # run or resume a part
    python -m benchmarks.study --page       # write docs/study.md and its figures from the tables

A part consists of sweeps; arguments with `=` are overrides for each of them. The tables of a part
are stored in docs/study/PART/ after each sweep, without paths of this machine. A sweep that is
complete there is not run again; remove it there to run it again. `fair` and the parts after it take
T, alpha, beta and smoothing from the settings that `choice` found best on validation images.
"""

import argparse
import io
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.measure import clock
from benchmarks.networks import CACHE, network
from benchmarks.study_claims import GRAIN, share
from kd.core.io import write_json, write_text
from kd.report.stats import against_standard
from kd.report.summary import summarise
from kd.report.tables import Tables, load_tables
from kd.training import device as devices
from kd.training.environment import environment

HERE = Path(__file__).parents[1] / "docs" / "study"
FEW = "seed=0,1,2"
OWN = {
    "logits": ["T", "alpha"],
    "feature": ["T", "alpha", "beta"],
    "label_smoothing": ["smoothing"],
}
# columns that depend on this machine, or are of no use to a reader
LOCAL = ["folder", "overrides", "reason", "id"]

Words = list[str]


def original(kept: Path) -> list[Words]:
    """The protocol of the original study, and the bug behind its result for logits."""
    students = ["original", "original_logits", "original_feature"]
    wrong = ["+experiment=original_logits", "teacher.outputs=misaligned", FEW]
    return [*([f"+experiment={name}", FEW] for name in students), wrong]


def choice(kept: Path) -> list[Words]:
    """T, alpha, beta and smoothing, chosen on validation images with one seed."""
    return [
        ["method=standard", "seed=0"],
        ["method=logits", "method.T=1,2,4,8", "method.alpha=0.1,0.5,0.9", "seed=0"],
        ["method=feature", "method.beta=0.1,0.3,0.6", "seed=0"],
        ["method=label_smoothing", "method.smoothing=0.05,0.1,0.2", "seed=0"],
    ]


def fair(kept: Path) -> list[Words]:
    """Every method at its best by validation, at one budget, with five seeds."""
    return [
        ["+experiment=fair", f"method={name}", *chosen(kept, name)] for name in ("standard", *OWN)
    ]


def labels(kept: Path) -> list[Words]:
    """How many labels a student needs."""
    part = "student.label_fraction=0.01,0.1,1.0"
    return [["method=standard", part, FEW], ["method=logits", *chosen(kept, "logits"), part, FEW]]


def budget(kept: Path) -> list[Words]:
    """The gain in shorter and in longer training, and the accuracy that a small student reaches."""
    part = "student.epochs=5,15,45"
    return [["method=standard", part, FEW], ["method=logits", *chosen(kept, "logits"), part, FEW]]


def student(kept: Path) -> list[Words]:
    """What the gain is for students from tiny to the teacher's own size."""
    part = "student.scale=4,8,16,32"
    return [["method=standard", part, FEW], ["method=logits", *chosen(kept, "logits"), part, FEW]]


def teacher(kept: Path) -> list[Words]:
    """Whether a larger teacher teaches more."""
    five = "seed=0,1,2,3,4"
    return [
        ["method=standard", five],
        # the largest first, because it takes the longest to train
        ["method=logits", *chosen(kept, "logits"), five, "teacher.scale=64,32,16"],
    ]


PARTS = {part.__name__: part for part in (original, choice, fair, labels, budget, student, teacher)}


def chosen(kept: Path, method: str) -> Words:
    """Return the overrides for the setting of a method that `choice` found best on validation."""
    if method not in OWN:
        return []
    if (found := load("choice", kept)) is None:
        sys.exit(
            "benchmarks.study: the part choice comes first: this one takes its settings from it"
        )
    table = found[0].summary
    row = table[(table["method"] == method) & table["chosen"]].iloc[0]
    best = {key: row.get(f"method.{key}") for key in OWN[method]}
    return [
        f"method.{key}={value:g}"
        for key, value in best.items()
        if value is not None and not pd.isna(value)
    ]


def run(part: str, also: Words, place: Path, kept: Path) -> bool:
    """Run or resume the sweeps of a part and store their tables. Returns whether all succeeded."""
    sweeps, good = PARTS[part](kept), True
    for number, words in enumerate(sweeps):
        if whole(part, number, [*words, *anonymous(also)], kept):
            print(
                f"{part}: sweep {number + 1} of {len(sweeps)} is kept in {kept / part}", flush=True
            )
            continue
        here = place / part / str(number)
        spent = place / f"{part}-{number}.json"  # seconds, including those of interrupted runs
        here.mkdir(parents=True, exist_ok=True)
        own = ["tracker.mode=disabled", f"hydra.sweep.dir={here}", f"paths.runs={place / 'runs'}"]
        command = [sys.executable, "-m", "kd", "-m", *words, *also, *own]
        print(shlex.join(["python", *command[1:]]), flush=True)
        begun = time.monotonic()
        try:
            code = subprocess.run(command, check=False).returncode
        finally:
            before = json.loads(spent.read_text())["seconds"] if spent.exists() else 0.0
            write_json(spent, {"seconds": before + time.monotonic() - begun})
        if code not in (0, 1):
            sys.exit(code)
        good &= code == 0
        seconds = json.loads(spent.read_text())["seconds"]
        keep(part, number, len(sweeps), here, [*words, *anonymous(also)], seconds, kept)
    return good


def anonymous(also: Words) -> Words:
    return ["data.root=PATH" if word.startswith("data.root=") else word for word in also]


def whole(part: str, number: int, words: Words, kept: Path) -> bool:
    """Return whether this sweep is stored with the same overrides and all its runs are done."""
    if not (kept / part / "part.json").exists():
        return False
    said = json.loads((kept / part / "part.json").read_text())["sweeps"].get(str(number), {})
    runs = pd.read_csv(kept / part / "runs.csv")
    states = runs[runs["sweep"] == number]["status"]
    return said.get("words") == words and bool((states == "done").all())


def keep(
    part: str, number: int, of: int, place: Path, words: Words, seconds: float, kept: Path
) -> None:
    """Store the tables of a sweep and how they were made, replacing what is stored of it."""
    folder = kept / part
    folder.mkdir(parents=True, exist_ok=True)
    tables = load_tables([place])
    # runs without overrides are baselines, which another sweep ran
    own = tables.runs[tables.runs["overrides"] != ""]
    of_own = tables.history[tables.history["id"].isin(own["id"])]
    for name, table in (("runs", own), ("history", of_own)):
        fresh = table.drop(columns=LOCAL, errors="ignore").assign(sweep=number)
        write_text(folder / f"{name}.csv", joined(folder / f"{name}.csv", fresh))
    shown = ("device", "precision", "processor", "python", "threads", "torch")
    everything = environment(devices.resolve("auto", "auto", CACHE))
    found = {name: value for name, value in everything.items() if name in shown}
    path = folder / "part.json"
    said = json.loads(path.read_text()) if path.exists() else {"sweeps": {}, "latency": {}}
    said["of"] = of
    said["sweeps"][str(number)] = {
        "words": words,
        "seconds": round(seconds),
        "swept": tables.swept,
        "environment": found,
    }
    if part == "student":
        said["latency"] |= latency(tables.runs[["student", "teacher"]].stack().dropna())
    write_json(path, said)
    runs = pd.read_csv(folder / "runs.csv")
    write_summary(part, summary_of(part, runs, swept(said["sweeps"].values())), kept)


def summary_of(part: str, runs: pd.DataFrame, keys: Words) -> pd.DataFrame:
    """Return a row per setting, compared with `standard`.

    The page of the study makes one more comparison in some parts, which belongs to the family.
    """
    runs = runs.assign(test_samples=round(1 / GRAIN))
    summary = summarise(runs, keys)
    methods = summary["method"].nunique()
    level, _ = share(methods - 1, extra=part in ("original", "fair"))
    return against_standard(summary, runs, level=level)


def write_summary(part: str, summary: pd.DataFrame, kept: Path) -> None:
    table = summary.drop(columns=["context", "baseline"])
    write_text(kept / part / "summary.csv", table.to_csv(index=False, float_format="%.6g"))


def swept(sweeps: Iterable[dict[str, Any]]) -> list[str]:
    """Return the keys that differ within any of a part's sweeps."""
    return list(dict.fromkeys(key for sweep in sweeps for key in sweep["swept"]))


def joined(path: Path, fresh: pd.DataFrame) -> str:
    """Return a CSV text of a fresh table and the file's unchanged rows of other sweeps, sorted."""

    def read(text: Any) -> pd.DataFrame:
        return pd.read_csv(text, dtype=str, keep_default_na=False)

    new = read(io.StringIO(fresh.to_csv(index=False, float_format="%.6g")))
    old = read(path) if path.exists() else new[:0]
    both = pd.concat([old[~old["sweep"].isin(new["sweep"])], new]).fillna("")
    text: str = both.sort_values(
        "sweep", key=lambda numbers: numbers.astype(int), kind="stable"
    ).to_csv(index=False)
    return text


def latency(names: Iterable[str], passes: int = 100) -> dict[str, dict[str, float]]:
    """Measure the median milliseconds of a forward pass of the networks named cnn-SCALE.

    The networks are in eval mode and take turns pass by pass, so that other load on the machine
    affects all of them equally.

    Returns:
        {network: {images per pass: median milliseconds}}.
    """
    device = devices.resolve("auto", "auto", CACHE)
    known = sorted(
        {name for name in names if re.fullmatch(r"cnn-\d+", name)}, key=lambda name: int(name[4:])
    )
    nets = {name: device.prepare_module(network(int(name[4:]))).eval() for name in known}
    found: dict[str, dict[str, float]] = {name: {} for name in nets}
    for size in (1, 128):
        x = torch.randn(size, 3, 32, 32, device=device.torch).to(memory_format=torch.channels_last)
        seconds: dict[str, list[float]] = {name: [] for name in nets}
        with torch.no_grad(), device.autocast():
            for _ in range(passes + 5):
                for name, net in nets.items():
                    seconds[name].append(clock(partial(net, x), device))
        for name in nets:
            found[name][str(size)] = round(1e3 * statistics.median(seconds[name][5:]), 2)
    return found


def load(part: str, kept: Path = HERE) -> tuple[Tables, dict[str, Any]] | None:
    """Load the stored tables of a part and how they were made.

    Returns:
        (tables, the overrides of its sweeps, total seconds, environments and latency of its
        networks), or None if a sweep of the part has not been run yet.
    """
    folder = kept / part
    if not (folder / "part.json").exists():
        return None
    said = json.loads((folder / "part.json").read_text())
    sweeps = [said["sweeps"][number] for number in sorted(said["sweeps"], key=int)]
    if len(sweeps) < said["of"]:
        return None
    runs, history = (pd.read_csv(folder / f"{name}.csv") for name in ("runs", "history"))
    summary = summary_of(part, runs, swept(sweeps))
    environments = list(
        {json.dumps(sweep["environment"]): sweep["environment"] for sweep in sweeps}.values()
    )
    return Tables(runs, history, summary, swept(sweeps), {}), {
        "sweeps": [sweep["words"] for sweep in sweeps],
        "seconds": sum(sweep["seconds"] for sweep in sweeps),
        "environments": environments,
        "latency": said["latency"],
    }


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("benchmarks.study", description=__doc__, formatter_class=form)
    parser.add_argument("words", nargs="*", metavar="PART|KEY=VALUE")
    parser.add_argument("--page", action="store_true", help="write docs/study.md and its figures")
    parser.add_argument(
        "--place", type=Path, default=Path("study"), help="where the runs are (default: study/)"
    )
    parser.add_argument(
        "--kept", type=Path, default=HERE, help="where the tables are kept (default: docs/study/)"
    )
    asked = parser.parse_args()
    if asked.page:
        from benchmarks.study_page import publish

        publish(asked.kept)
        return
    names, also = [w for w in asked.words if "=" not in w], [w for w in asked.words if "=" in w]
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]}; allowed: {', '.join(PARTS)}")
    if not names:
        for name, part in PARTS.items():
            print(f"{name:10}{part.__doc__}")
    good = [run(name, also, asked.place.absolute(), asked.kept) for name in names]
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
