"""Measure the cost of a training step of each method relative to `standard`; write docs/methods.md.

    python -m benchmarks.methods [--repeats 5] [--device cpu] [--out benchmarks/methods.json]
    python -m benchmarks.methods --page                   # writes docs/methods.md
    python -m benchmarks.methods --page SWEEP/runs.csv    # also adds the runs of a sweep to it

Each method trains a student of scale 16 with a teacher of scale 32. Images and weights are random,
which does not change the work. As in all runs of a teacher but the first, its logits and vectors
are read and its feature maps are computed. In each repeat every method takes `--steps` steps, one
method after the other; the cost is the median ratio of its seconds to those of `standard`.
"""

import argparse
import inspect
import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.measure import clock, ratio
from benchmarks.networks import BATCH, CACHE, network
from benchmarks.throughput import Pictures, pictures, take
from kd import methods
from kd.core import registry
from kd.core.io import write_json, write_text
from kd.data.augment import Augment
from kd.methods import MethodContext
from kd.optim import SGD, Schedule
from kd.report.comparison import format_accuracy, format_interval, format_p
from kd.report.inference import MARGIN
from kd.report.stats import against_standard
from kd.report.summary import finished_runs, summarise
from kd.training import device as devices
from kd.training.device import Device
from kd.training.environment import environment
from kd.training.loop import Recipe, TrainingState, train
from kd.training.metrics import count
from kd.training.teacher import TeacherForward, freeze
from kd.training.teacher_cache import TeacherCache, TeacherCacheSpec

ROOT = Path(__file__).parents[1]
MEASURED, PAGE, TABLE = (
    ROOT / "benchmarks" / "methods.json",
    ROOT / "docs" / "methods.md",
    ROOT / "docs" / "methods.csv",
)
TEST_IMAGES = 10_000  # of CIFAR-10
ONE_VIEW = Augment(
    crop_padding=0, padding_mode="zeros", flip=False
)  # after an epoch all that a teacher can say is known
KINDS = {  # {what is compared: {method: when to try it}}
    "Without a teacher": {
        "standard": "The baseline that every other is compared with; run it first, with the same "
        "seeds.",
        "label_smoothing": "The control that needs no teacher: a gain that it has as well is not "
        "the teacher's.",
        "tfkd": "As label_smoothing, with a made teacher in the form of the soft loss.",
    },
    "On logits": {
        "logits": "First. It reads only logits, which are cached for all runs, and is hard to "
        "beat at an equal budget.",
        "soft_labels": "Labels are missing or wrong, or you ask what the teacher alone is worth.",
        "standardized": "Teacher and student differ much in size, so that logits of one scale ask "
        "too much.",
        "dkd": "Many classes, and a very confident teacher, whose probabilities of the other "
        "classes carry information. Its weights are large: lower the learning rate where the loss "
        "grows.",
        "nkd": "As dkd, with one weight less to choose.",
        "dist": "A much stronger teacher: only the order and the spread of its answers are asked "
        "for.",
        "wttm": "You would tune T: a power of the teacher's probabilities takes its place.",
        "ctkd": "You would sweep T: it is learned instead, and rises to what is hardest.",
        "mlkd": "Images are cheap: a step sees each twice, so give other methods as many steps "
        "when you compare.",
        "function_matching": "Long training, or many images without labels; short training does "
        "not repay it.",
        "born_again": "There is no larger teacher.",
    },
    "On feature maps and vectors": {
        "feature": "Shapes differ, and there is one layer that you trust.",
        "attention": "Networks of one family: it asks where they look, and needs no parameters.",
        "nst": "As attention; it compares the statistics of channels, and costs more where there "
        "are many.",
        "similarity": "Architectures differ: only the likeness of the samples of a batch is "
        "compared.",
        "correlation": "As similarity, with a kernel in place of the inner product.",
        "rkd": "The vectors will be used for search or clustering: it keeps distances and angles.",
        "pkt": "As rkd, cheaper, and without a scale to choose.",
        "vid": "Some of the teacher's channels cannot be learned: the variance of each says how "
        "much it counts.",
        "crd": "A large data set and long training; the memory takes 1 KB a sample.",
        "reviewkd": "Feature distillation at its most thorough; its fusion modules take time.",
        "ofd": "Convolutional networks with batch norm of one family.",
        "srrl": "You want the student's vector to serve the teacher's classifier.",
        "simkd": "The last layers of the teacher may be shipped: `size` in the result counts them.",
    },
    "Together": {"sum": "Two of the above looked good alone."},
}


def steps(name: str, found: Pictures, device: Device, kept: Path) -> Iterator[Any]:
    """Run kd's loop with this method: yield the number of its parameters, then an item per step."""
    kind = methods.find(name)
    torch.manual_seed(0)
    teacher, student = network(32), device.prepare_module(network(16))
    freeze(teacher, device)
    split = found.split(device)
    spec = MethodContext(
        student.shapes(32),
        teacher.shapes(32),
        10,
        len(found.images),
        student,
        teacher,
        10**6,
        found.labels,
    )
    method = device.prepare_module(
        kind(kind.Config.model_validate(registry.defaults("method", name)), spec)
    )
    live, place = (
        TeacherForward(teacher, method.teacher_taps, device),
        TeacherCacheSpec(kept, 4.0, False, False),
    )
    teach = (
        TeacherCache(live, split, ONE_VIEW, 0, method.views, place, method.mixed)
        if kind.needs_teacher
        else None
    )
    optimizer = SGD(name="sgd", lr=1e-5, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = Schedule(
        name="constant", warmup_fraction=0.0, final_lr_factor=0.0, milestones=[], gamma=1.0
    )
    yield count(method.parameters())
    state = TrainingState(student, method, optimizer)
    recipe = Recipe(10**6, BATCH, 0, ONE_VIEW, schedule)
    rows = train(state, teach, split, recipe, device)
    yield from (None for row in rows if row is None)


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    device, found = devices.resolve(asked.device, "auto", CACHE), pictures(asked.images)
    names = [name for kind in KINDS.values() for name in kind]
    kept, loops, parameters = Path(tempfile.mkdtemp(prefix="kd-benchmark-")), {}, {}
    for name in names:
        loops[name] = steps(name, found, device, kept)
        parameters[name] = next(loops[name])
        take(loops[name], -(-asked.images // BATCH))  # an epoch: what can be kept is known
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(asked.repeats):
        for name, loop in loops.items():
            seconds[name].append(clock(partial(take, loop, asked.steps), device))
    shutil.rmtree(kept)
    rows = {
        name: {
            "ratio": ratio(seconds[name], seconds["standard"]), "parameters": parameters[name],
            "ms": round(1e3 * statistics.median(seconds[name]) / asked.steps, 2),
        }
        for name in names
    }  # fmt: skip
    said = {
        "images": asked.images,
        "steps": asked.steps,
        "repeats": asked.repeats,
        "batch_size": BATCH,
    }
    return {**said, "rows": rows, "environment": environment(device)}


def page(measured: dict[str, Any], runs: pd.DataFrame | None) -> str:
    """Return the text of docs/methods.md."""
    where = measured["environment"]
    accuracy = {} if runs is None else _results(runs)
    lines = [
        "# The methods",
        "",
        "Written by `python -m benchmarks.methods --page` from the methods' own files, "
        "`benchmarks/methods.json`" + (" and `docs/methods.csv`." if runs is not None else "."),
        "",
        "**Cost** is the time of a training step relative to one of `standard`, for a student of "
        f"scale 16 and a teacher of scale 32, {where['threads']} threads ({where['processor']}, "
        f"{where['precision']}), the median of {measured['repeats']} repeats of "
        f"{measured['steps']} steps of {measured['batch_size']} images "
        "(`python -m benchmarks.methods`). The teacher's logits and vectors are read from its "
        "table, as in every run but its first; its maps are computed in each step "
        "(`teacher.cache.feature_maps=true` keeps them). **Own** are the parameters that only the "
        "method trains.",
        "",
        *(NO_RESULTS if runs is None else _said(runs)),
        "",
    ]
    head = ["method", "cost", "own", *(RESULTS if accuracy else [])]
    lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for names in KINDS.values():
        for name in names:
            row = measured["rows"][name]
            cells = [f"[`{name}`](#{name})", f"{row['ratio']:.2f}×", f"{row['parameters']:,}"]
            lines.append("| " + " | ".join([*cells, *accuracy.get(name, [])]) + " |")
            for setting in (other for other in accuracy if other.startswith(f"{name} ")):
                cells = [f"with `{setting.removeprefix(name).strip()}`", "", ""]
                lines.append("| " + " | ".join([*cells, *accuracy[setting]]) + " |")
    for title, names in KINDS.items():
        lines += ["", f"## {title}"]
        for name, when in names.items():
            lines += ["", *_section(name, when)]
    return "\n".join([*lines, ""])


KEPT = [  # columns of runs.csv
    "method",
    "seed",
    "status",
    "student",
    "data",
    "epochs",
    "samples",
    "batch_size",
    "budget",
    "test_accuracy",
    "test_nll",
    "test_ece",
    "test_agreement",
    "test_teacher_kl",
    "val_accuracy",
    "params",
    "macs",
    "method_params",
    "train_seconds",
    "teacher",
    "teacher_params",
    "teacher_macs",
    "teacher_test_accuracy",
]
NO_RESULTS = [
    "To measure every method on your data, run `python -m kd -m method='glob(*)' seed=0,1,2`."
]


RESULTS = ["n", "val, %", "test, %", "vs standard", "p", "verdict"]


def _results(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Return the cells of `RESULTS` for every method."""
    found = {
        name: ["", "", "not run yet", "", "", ""] for names in KINDS.values() for name in names
    }
    found |= {
        name: ["", "", "diverged", "", "", "unstable"]
        for name in runs[runs["status"] == "diverged"]["setting"]
    }
    runs = runs.assign(test_samples=TEST_IMAGES)
    for _, row in against_standard(summarise(runs, []), runs).iterrows():
        val = row["val_accuracy"]
        found[row["setting"]] = [
            str(row["n"]),
            "" if pd.isna(val) else f"{100 * val:.2f}",
            format_accuracy(row),
            format_interval(row["difference"], row["difference_ci95"], "+.2f"),
            format_p(row["p"]),
            _decision(row),
        ]
    return found


def _decision(row: pd.Series) -> str:
    """Return the decision on a row as a cell of the table."""
    if row["unstable"]:
        return f"unstable ({row['unstable']} of {row['planned']})"
    if row["decision"] == "equal":
        return f"equal within ± {100 * MARGIN:g}"
    if row["decision"] == "undecided":
        more = re.search("(about|more than) .* would decide", row["verdict"])
        return f"undecided; {more.group()}" if more else "undecided"
    return row["decision"] if isinstance(row["decision"], str) else ""


def _said(runs: pd.DataFrame) -> list[str]:
    """Return the text that explains the accuracies, and the commands that produced them."""
    done = finished_runs(runs)
    counts = done[done["setting"] == done["method"]]["method"].value_counts()
    several = sorted(counts[counts > 1].index)
    data = "data=imagefolder data.root=PATH"
    besides = []
    for words, some in runs[runs["setting"] != runs["method"]].groupby(
        runs["setting"].str.partition(" ")[2]
    ):
        names = ",".join(sorted(set(some["method"])))
        besides.append(
            f"python -m kd -m method={names} {words} seed=0 {data} hydra.sweep.dir=other"
        )
        besides.append(f"python -m benchmarks.methods --page other/runs.csv --with {words}")
    taught = done.dropna(subset=["teacher_test_accuracy"]).iloc[0]
    compared = against_standard(summarise(runs, []), runs)
    family = int(compared["difference_ci95"].notna().sum())
    more, spread = [], ""
    if several:
        more = [f"python -m kd -m method={','.join(several)} seed=1,2 {data} hydra.sweep.dir=best"]
        groups = done[done["setting"].isin(several)].groupby("setting")["test_accuracy"]
        apart = (100 * (groups.max() - groups.min())).sort_values()
        spread = (
            f" One seed says little: where there are {counts.max()}, they lie "
            f"{apart.iloc[0]:.2f} (`{apart.index[0]}`) to {apart.iloc[-1]:.2f} points apart "
            f"(`{apart.index[-1]}`), {apart.median():.2f} in the median."
        )
    return [
        "**Test** is the accuracy on CIFAR-10's test images (as JPEG copies of quality 75, which "
        f"cost two to three points), teacher {taught['teacher']} "
        f"({100 * taught['teacher_test_accuracy']:.2f} %), student {taught['student']}, "
        f"{taught['epochs']} epochs for each, ± the 95 % interval of the mean over n seeds. "
        f"The {family} methods with three stable seeds are one family: their differences from "
        "`standard` share one error variance and hold together (Dunnett), with this teacher and on "
        "these test images. Which methods had more seeds was decided after seed 0, which is one "
        "of the three. The others have too few seeds to tell. Each "
        "method has the weights of its file, which are its paper's: none was tuned for this pair, "
        f"and all have one learning rate, at which some diverge.{spread}",
        "",
        "```bash",
        f"python -m kd -m method='glob(*)' seed=0 {data} hydra.sweep.dir=all",
        *more,
        f"python -m kd.report all{' best' if more else ''} --out table",
        "python -m benchmarks.methods --page table/runs.csv",
        *besides,
        "```",
    ]


def _section(name: str, when: str) -> list[str]:
    """Return the section of a method, from the docstrings and the configuration of its file."""
    kind = methods.find(name)
    source = inspect.getmodule(kind)
    assert source is not None
    paper = re.sub(
        r"arXiv (\d{4}\.\d{5})",
        r"[arXiv \1](https://arxiv.org/abs/\1)",
        inspect.cleandoc(source.__doc__ or ""),
    )
    formula, _, more = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    config = (registry.CONF / "method" / f"{name}.yaml").read_text().strip()
    said = [f"### {name}", "", paper, "", "```text", formula, "```"]
    said += ["", more] if more else []
    return [*said, "", f"*When:* {when}", "", "```yaml", config, "```"]


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.methods", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--images", type=int, default=6_400)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=MEASURED)
    parser.add_argument(
        "--page",
        nargs="?",
        const="",
        help="write docs/methods.md; with the runs.csv of a sweep's report, keep those",
    )
    parser.add_argument(
        "--with", dest="words", default="", help="what was typed for these runs beside the method"
    )
    asked = parser.parse_args()
    if asked.page is None:
        devices.configure_process(None)
        found = measure(asked)
        for name, row in found["rows"].items():
            print(
                f"{name:20}{row['ratio']:6.2f}  {row['ms']:8.2f} ms per step  "
                f"{row['parameters']:>10,} parameters"
            )
        write_json(asked.out, found)
        return
    if asked.page:
        merge(pd.read_csv(asked.page), asked.words)
    write_text(PAGE, page(json.loads(MEASURED.read_text()), kept_runs()))


def merge(runs: pd.DataFrame, words: str = "") -> None:
    """Add these runs to docs/methods.csv, replacing runs of the same setting and seed.

    `words`: as in --with.
    """
    runs = runs[runs["status"].isin(["done", "diverged"])]
    runs = runs[[name for name in KEPT if name in runs]].assign(
        setting=(runs["method"] + " " + words).str.strip()
    )
    together = pd.concat([kept_runs(), runs]).drop_duplicates(["setting", "seed"], keep="last")
    write_text(
        TABLE, together.sort_values(["setting", "seed"]).to_csv(index=False, float_format="%.8g")
    )


def kept_runs() -> pd.DataFrame | None:
    """Return the runs whose accuracies the page shows, if there are any."""
    return pd.read_csv(TABLE) if TABLE.exists() else None


if __name__ == "__main__":
    main()
