"""Figures of a sweep, from its tables alone. Which are drawn follows from what was swept; the rest is named."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kd.files import aside
from kd.settings import first_line
from kd.table import Tables, finished_runs

MARKERS = ["o", "s", "D", "^", "v", "P", "X", "*"]
DASHES = ["-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1))]
MANY = 14  # rows that a figure can name


class Figure(NamedTuple):
    """A drawn figure: `name`.png and `name`.svg lie in the report's folder; `shape` is width by height."""

    name: str
    title: str
    caption: str
    shape: float


class Left(NamedTuple):
    """A figure that was not drawn, and why."""

    title: str
    reason: str


class Unfit(Exception):  # noqa: N818
    """This sweep does not call for the figure; the text says why."""


def draw(
    tables: Tables, folder: Path, study: Mapping[str, str] | None = None, damage: str = ""
) -> tuple[list[Figure], list[Left]]:
    """Draw what the sweep's shape calls for into `folder`, as PNG and SVG; `study` names an Optuna study, if there is
    one, and `damage` says why it cannot be named.

    **Returns:** (drawn, left out).
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted: list[tuple[str, str, Callable[[], tuple[Any, str]]]] = [
        ("accuracy", "Test accuracy", lambda: accuracy(tables)),
        ("curves", "Learning curves", lambda: curves(tables)),
    ]
    numbers = numeric(tables)
    for key in numbers:
        wanted.append((f"response-{key}", f"Response to {short(key)}", partial(response, tables, key)))
    if not numbers:
        wanted.append(("response", "Response curves", lambda: _unfit("no number was swept")))
    pairs = [(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :]]
    for a, b in pairs:
        title = f"{short(a)} by {short(b)}"
        wanted.append((f"heat-{a}-{b}", title, partial(heat, tables, a, b)))
    if not pairs:
        wanted.append(("heat", "Heat maps", lambda: _unfit("fewer than two numbers were swept")))
    wanted.append(("size", "Accuracy against size", lambda: size(tables)))
    wanted.append(("reliability", "Reliability", lambda: reliability(tables)))
    if study or damage:
        for what, title in (("history", "History of the search"), ("importance", "Importance of what was searched")):
            wanted.append((f"search-{what}", title, partial(search, study, what) if study else partial(_unfit, damage)))

    drawn, left = [], []
    with style() as plt:
        for name, title, make in wanted:
            try:
                figure, caption = make()
                for ending in ("png", "svg"):
                    _save(figure, folder, name, ending)
                width, height = figure.get_size_inches()
                drawn.append(Figure(name, title, caption, width / height))
            except Unfit as why:
                left.append(Left(title, str(why)))
            except OSError:
                raise
            except Exception as error:  # of matplotlib, for values that no axis can hold
                left.append(Left(title, f"it cannot be drawn: {first_line(error)}"))
            plt.close("all")
    return drawn, left


@contextmanager
def style() -> Iterator[Any]:
    """Inside, figures look as kd's do; pyplot."""
    import matplotlib as mpl
    import seaborn as sns

    mpl.use("agg")
    said: Any = {"svg.fonttype": "none", "font.size": 10, "axes.titlesize": 11, "figure.dpi": 110, "savefig.dpi": 150,
             "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "kd"}  # fmt: skip
    with sns.axes_style("whitegrid"), mpl.rc_context(said):
        import matplotlib.pyplot as plt

        yield plt


def _save(figure: Any, folder: Path, name: str, ending: str) -> None:
    said = {"Date": None} if ending == "svg" else None
    with aside(folder / f"{name}.{ending}") as part:
        figure.savefig(part, format=ending, bbox_inches="tight", metadata=said)


def _unfit(reason: str) -> Any:
    raise Unfit(reason)


def short(key: str) -> str:
    return key.removeprefix("method.")


def _methods(tables: Tables) -> list[str]:
    """All methods, in one order for all figures, so that each keeps its colour and marker."""
    return list(dict.fromkeys(tables.runs["method"].dropna()))


def palette(names: Sequence[str]) -> dict[str, Any]:
    """Colours that colour-blind people tell apart, of different lightness; markers and dashes say the same again."""
    import seaborn as sns

    colours = sns.color_palette("colorblind")
    return {name: colours[i % len(colours)] for i, name in enumerate(names)}


def numeric(tables: Tables) -> list[str]:
    """The swept keys that are numbers."""
    found = []
    for key in tables.swept:
        if key in tables.summary and pd.api.types.is_numeric_dtype(values := tables.summary[key].dropna()) and (
            values.dtype != bool and values.nunique() > 1
        ):  # fmt: skip
            found.append(key)
    return found


def spread(values: Sequence[float]) -> str:
    """The axis on which these numbers are spread most evenly: log or linear."""
    ordered = sorted(set(map(float, values)))
    if len(ordered) < 3 or ordered[0] <= 0:
        return "log" if len(ordered) == 2 and ordered[0] > 0 and ordered[1] / ordered[0] >= 8 else "linear"

    def unevenness(xs: list[float]) -> float:
        steps = [b - a for a, b in itertools.pairwise(xs)]
        return max(steps) / min(steps)

    return "log" if unevenness([math.log(x) for x in ordered]) < unevenness(ordered) else "linear"


def _apart(values: Sequence[float]) -> list[float]:
    """Those of some sorted values whose labels do not touch on the axis that `spread` gives them."""
    scale: Callable[[float], float] = math.log if spread(values) == "log" else float
    width = (scale(values[-1]) - scale(values[0])) or 1.0
    kept: list[float] = []
    for value in values:
        if not kept or (scale(value) - scale(kept[-1])) / width > 0.09:
            kept.append(value)
    return kept


def canvas(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """(figure, axes [rows][columns]) of so many inches."""
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)


def _done(tables: Tables) -> pd.DataFrame:
    if tables.summary.empty:
        raise Unfit("no run is done")
    return finished_runs(tables.runs)


def accuracy(tables: Tables) -> tuple[Any, str]:
    """Means with 95 % intervals, each seed as a dot, the teacher as a line."""
    done, table = _done(tables), tables.summary
    if len(table) > MANY:
        table = (table[table["chosen"]] if table["chosen"].any() else table).head(MANY)
    figure, axes = canvas(7.2, 1.3 + 0.42 * len(table))
    axis, colours = axes[0][0], palette(_methods(tables))
    for place, (_, row) in enumerate(table.iterrows()):
        seeds = 100 * done[done["setting"] == row["setting"]]["test_accuracy"]
        colour, mark = colours[row["method"]], MARKERS[list(colours).index(row["method"]) % len(MARKERS)]
        axis.scatter(seeds, [place] * len(seeds), s=16, color="0.55", zorder=2, linewidths=0)
        error = None if pd.isna(row["test_accuracy_ci95"]) else 100 * row["test_accuracy_ci95"]
        axis.errorbar(100 * row["test_accuracy"], place, xerr=error, fmt=mark, color=colour, ms=8, capsize=4,
                      lw=2, zorder=3)  # fmt: skip
    axis.set_yticks(range(len(table)), [f"{r['setting']}  (n = {r['n']})" for _, r in table.iterrows()])
    axis.invert_yaxis()
    axis.set_ylim(len(table) - 0.5, -0.5)
    axis.set_xlabel("test accuracy, %")
    teachers = table.dropna(subset=["teacher_test_accuracy"])[["teacher", "teacher_test_accuracy"]]
    teachers = teachers.round(6).drop_duplicates()
    for i, (_, teacher) in enumerate(teachers.head(3).iterrows()):
        axis.axvline(100 * teacher["teacher_test_accuracy"], color="0.2", ls=DASHES[1 + i], lw=1.4,
                     label=f"teacher {teacher['teacher']}")  # fmt: skip
    if len(teachers):
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    every = len(tables.summary)
    left = "" if len(table) == every else f" {len(table)} of {every} settings, those that validation chose first."
    return figure, f"Mean over seeds with its 95 % confidence interval (none for one seed); grey dots are seeds.{left}"


def curves(tables: Tables) -> tuple[Any, str]:
    """Training (dashed) and validation (solid) loss and accuracy by epoch, for each method's chosen setting."""
    import seaborn as sns
    from matplotlib.ticker import LogLocator, NullLocator

    _done(tables)
    table = tables.summary[tables.summary["chosen"]].head(6)
    history = tables.history[tables.history["setting"].isin(table["setting"])]
    panels = [
        ("cross-entropy, nats (log)", "hard", "val_nll", 1),
        ("accuracy, %", "accuracy", "val_accuracy", 100),
    ]
    panels = [p for p in panels if any(c in history and history[c].notna().any() for c in p[1:3])]
    if not panels or history["epoch"].max() < 2:
        raise Unfit("the runs have one epoch")
    figure, axes = canvas(4.6 * len(panels), 3.6, len(panels))
    names = list(table["setting"])
    colours = palette(names)
    for axis, (title, train, val, scale) in zip(axes[0], panels, strict=True):
        for i, name in enumerate(names):
            rows = history[history["setting"] == name]
            band = ("ci", 95) if rows["seed"].nunique() > 1 else None
            for column, dash in ((train, "--"), (val, "-")):
                if column in rows and rows[column].notna().any():
                    shown = pd.DataFrame({"x": rows["epoch"].astype(int), "y": scale * rows[column].astype(float)})
                    sns.lineplot(shown, x="x", y="y", ax=axis, color=colours[name], ls=dash, errorbar=band, seed=0,
                                 marker=MARKERS[i] if dash == "-" else None, markersize=5, n_boot=200,
                                 markeredgewidth=0)  # fmt: skip
        axis.set(xlabel="epoch", ylabel=title, yscale="log" if scale == 1 else "linear")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if scale == 1:
            axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
    handles = [_line(colours[n], "-", MARKERS[i], n) for i, n in enumerate(names)]
    handles += [_line("0.3", "-", None, "validation"), _line("0.3", "--", None, "training views")]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
    return figure, (
        "Means over seeds with 95 % bands. Training accuracy and loss are of augmented views, in train mode; "
        "cross-entropy is with the labels, whatever else a method's loss holds."
    )


def _line(colour: Any, dash: Any, marker: str | None, name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, ls=dash, marker=marker, label=name)


def _held(tables: Tables, free: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """(the rows in which every swept key but the free ones has the value that it has in its method's best setting by
    validation; those values in words)."""
    table, kept, said = tables.summary, [], []
    others = [key for key in tables.swept if key not in free and key in table]
    for method, group in table.groupby("method", sort=False):
        chosen = group[group["chosen"]] if group["chosen"].any() else group
        by = "val_accuracy" if "val_accuracy" in chosen and chosen["val_accuracy"].notna().any() else "test_accuracy"
        best = chosen.sort_values(by, ascending=False, kind="stable").iloc[0]
        same = pd.Series(True, index=group.index)
        for key in others:
            same &= group[key].isna() if pd.isna(best[key]) else group[key] == best[key]
        kept.append(group[same])
        words = [f"{short(k).removesuffix('.name')} = {_brief(best[k])}" for k in others
                 if not pd.isna(best[k]) and (group[k].nunique() > 1)]  # fmt: skip
        if words and group[list(free)].notna().all(axis=None):
            said.append(f"{method}: {', '.join(words)}")
    return pd.concat(kept), f" Held at the best by validation, {'; '.join(said)}." if said else ""


def _brief(value: Any) -> str:
    return format(value, ".4g") if isinstance(value, float) else str(value)


def response(tables: Tables, key: str) -> tuple[Any, str]:
    """Test accuracy over the values of one swept number, a line a method."""
    _done(tables)
    table, held = _held(tables, [key])
    table = table[table[key].notna()]
    figure, axes = canvas(5.6, 3.8)
    axis, methods = axes[0][0], [str(m) for m, g in table.groupby("method", sort=False) if g[key].nunique() > 1]
    if not methods:
        return _scatter(tables, key, figure, axis)
    colours = palette(_methods(tables))
    for i, method in ((_methods(tables).index(m), m) for m in methods):
        rows = table[table["method"] == method].sort_values(key)
        x, y = rows[key].astype(float), 100 * rows["test_accuracy"]
        half = 100 * rows["test_accuracy_ci95"]
        axis.plot(
            x,
            y,
            color=colours[method],
            marker=MARKERS[i % len(MARKERS)],
            ls=DASHES[i % len(DASHES)],
            label=method,
            zorder=3,
        )
        if half.notna().all():
            axis.fill_between(x, y - half, y + half, color=colours[method], alpha=0.18, linewidth=0)
    plain = tables.summary[(tables.summary["method"] == "standard") & tables.summary["chosen"]]
    if len(plain) == 1 and "standard" not in methods:
        axis.axhline(100 * plain["test_accuracy"].iloc[0], color="0.2", ls=":", lw=1.4, label="standard")
    values = sorted(table[key].astype(float).unique())
    axis.set_xscale(spread(values))
    axis.set_xticks(places := _apart(values), [f"{v:g}" for v in places])
    axis.minorticks_off()
    axis.set(xlabel=short(key), ylabel="test accuracy, %")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    least, most = table["n"].min(), table["n"].max()
    seeds = f"n = {least}" if least == most else f"n = {least} to {most}"
    return figure, f"Mean over seeds with its 95 % band ({seeds}).{held}"


def _scatter(tables: Tables, key: str, figure: Any, axis: Any) -> tuple[Any, str]:
    """A search leaves no two runs that differ in one number alone: every setting as a dot, by validation."""
    which = "val_accuracy" if "val_accuracy" in tables.summary else "test_accuracy"
    table = tables.summary[tables.summary[key].notna()]
    colours = palette(_methods(tables))
    for i, method in enumerate(dict.fromkeys(table["method"])):
        rows = table[table["method"] == method]
        axis.scatter(rows[key].astype(float), 100 * rows[which], s=24, color=colours[method],
                     marker=MARKERS[i % len(MARKERS)], label=method)  # fmt: skip
        best = rows[rows["chosen"]]
        axis.scatter(best[key].astype(float), 100 * best[which], s=120, facecolors="none", edgecolors="0.1",
                     label="chosen" if i == 0 else None)  # fmt: skip
    axis.set(xscale=spread(list(table[key])), xlabel=short(key), ylabel=f"{which.split('_')[0]} accuracy, %")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return figure, "Every setting that was tried, on validation images; the other numbers differ from dot to dot."


def heat(tables: Tables, a: str, b: str) -> tuple[Any, str]:
    """Mean test accuracy over the values of two swept numbers, for the method swept most finely."""
    import seaborn as sns

    _done(tables)
    table, held = _held(tables, [a, b])
    both = table.dropna(subset=[a, b])
    sizes = {m: (g[a].nunique(), g[b].nunique(), len(g)) for m, g in both.groupby("method", sort=False)}
    fit = {m: n for m, (x, y, n) in sizes.items() if 1 < x <= MANY and 1 < y <= MANY and 2 * n >= x * y}
    if not fit:
        raise Unfit("no method was run over a grid of both")
    method = max(fit, key=lambda m: fit[m])
    cells = both[both["method"] == method].pivot_table(index=a, columns=b, values="test_accuracy", aggfunc="mean")
    figure, axes = canvas(2.4 + 0.85 * len(cells.columns), 1.6 + 0.5 * len(cells.index))
    sns.heatmap(100 * cells.astype(float).sort_index(ascending=False), annot=True, fmt=".2f", cmap="cividis",
                ax=axes[0][0], cbar_kws={"label": "test accuracy, %"}, linewidths=1)  # fmt: skip
    axes[0][0].set(xlabel=short(b), ylabel=short(a), title=method)
    return figure, f"Mean test accuracy over seeds; empty cells were not run.{held}"


def size(tables: Tables) -> tuple[Any, str]:
    """Accuracy against parameters and MACs, the teacher among the students, the Pareto front joined."""
    _done(tables)
    table = tables.summary[tables.summary["chosen"]]
    if table["params"].nunique() < 2:
        raise Unfit("all students have one size")
    points = [(r["params"], r["macs"], 100 * r["test_accuracy"], r["method"],
               100 * r["test_accuracy_ci95"]) for _, r in table.iterrows()]  # fmt: skip
    teachers = table.dropna(subset=["teacher_params"]).drop_duplicates("teacher")
    points += [(r["teacher_params"], r["teacher_macs"], 100 * r["teacher_test_accuracy"], "teacher", math.nan)
               for _, r in teachers.iterrows()]  # fmt: skip
    names = [m for m in [*_methods(tables), "teacher"] if m in {p[3] for p in points}]
    colours = palette(names) | {"teacher": "0.15"}
    figure, axes = canvas(9.2, 3.8, 2)
    for axis, which, title in zip(axes[0], (0, 1), ("parameters", "multiply-accumulates an image"), strict=True):
        for i, name in enumerate(names):
            mine = [p for p in points if p[3] == name]
            axis.errorbar([p[which] for p in mine], [p[2] for p in mine],
                          yerr=[0 if math.isnan(p[4]) else p[4] for p in mine], fmt=MARKERS[i % len(MARKERS)],
                          color=colours[name], label=name, capsize=3, ms=7, zorder=3)  # fmt: skip
        front = pareto([(p[which], p[2]) for p in points])
        axis.step(*zip(*front, strict=True), where="post", color="0.5", lw=1, ls="--", label="Pareto front", zorder=1)
        axis.set(xscale="log", xlabel=title, ylabel="test accuracy, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False)
    return figure, "Chosen settings with 95 % intervals; nothing lies above and left of the dashed line."


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that none beats in both cost (less is better) and value, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def reliability(tables: Tables) -> tuple[Any, str]:
    """Confidence against accuracy in 15 bins, for each method's chosen setting."""
    _done(tables)
    names = [n for n in tables.summary[tables.summary["chosen"]]["setting"] if n in tables.reliability][:6]
    if not names:
        raise Unfit("the runs hold no counts of confidence")
    figure, axes = canvas(4.8, 4.4)
    axis, colours = axes[0][0], palette(names)
    axis.plot([0, 1], [0, 1], color="0.5", ls="--", lw=1, label="calibrated")
    for i, name in enumerate(names):
        bins = [b for b in zip(*(tables.reliability[name][k] for k in ("images", "confidence", "right")), strict=True)
                if b[0] >= 10]  # fmt: skip
        axis.plot([b[1] / b[0] for b in bins], [b[2] / b[0] for b in bins], color=colours[name], marker=MARKERS[i],
                  ls=DASHES[i % len(DASHES)], label=name)  # fmt: skip
    axis.set(xlabel="confidence", ylabel="part that is right", xlim=(0, 1.02), ylim=(0, 1.02))
    axis.set_aspect("equal")
    columns = 1 if max(map(len, names)) > 20 else 2
    figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    return figure, "Test images of all seeds together; bins with fewer than 10 images are left out."


def search(study: Mapping[str, str], what: str) -> tuple[Any, str]:
    """Optuna's own plot of a study: the best objective so far, or how much each key matters to it."""
    try:
        import warnings

        import optuna
        from optuna.visualization import matplotlib as plots

        from kd.study import opened

        file = study["storage"].removeprefix("sqlite:///")
        if "://" not in file and not Path(file).is_file():  # Optuna would make it
            raise Unfit(f"the study cannot be read: there is no {file}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its plots call themselves experimental
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            found = optuna.load_study(study_name=study["study"], storage=opened(study["storage"]))
            done = found.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
            if len(done) < 4:
                raise Unfit("fewer than four trials are complete")
            axis = plots.plot_optimization_history(found) if what == "history" else plots.plot_param_importances(found)
    except ImportError as error:
        raise Unfit("Optuna is not installed") from error
    except Unfit:
        raise
    except Exception as error:  # of Optuna, of SQLAlchemy, of any database's driver
        raise Unfit(f"the study cannot be read: {first_line(error)}") from error
    figure: Any = axis.figure
    figure.set_size_inches(6.4, 3.8)
    axis.set_title("")
    if what == "history":
        return figure, "The objective of each complete trial, and the best so far; measured on validation images."
    return figure, "The share of the objective's variance that each searched key explains (Optuna's fANOVA)."
