"""The look of all figures: canvas, colours, markers, dashes, labels that fit, and legends."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

MARKERS = ["o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "p", "h", "d"]
DASHES: list[Any] = ["-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 2)), (0, (1, 3))]
WIDTH = 44  # columns of text that a label may take
CHARACTER = 0.08  # inches that a column of text takes, about
MAX_LISTED = 8  # names that a caption lists
FALLBACKS = [
    "Noto Sans CJK SC",
    "Noto Sans",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
]


@contextmanager
def style() -> Iterator[Any]:
    """Give figures kd's look inside the block; yields pyplot."""
    import matplotlib as mpl
    import seaborn as sns
    from matplotlib import font_manager

    mpl.use("agg")
    installed = set(font_manager.get_font_names())
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kd",
        "font.size": 10,
        "font.family": ["sans-serif", *(name for name in FALLBACKS if name in installed)],
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "figure.dpi": 110,
        "savefig.dpi": 150,
    }
    with sns.axes_style("whitegrid"), mpl.rc_context(settings):
        import matplotlib.pyplot as plt

        yield plt


def canvas(
    width: float, height: float, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Any, Any]:
    """Make a figure of so many inches. **Returns:** (figure, axes [rows][columns])."""
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of each name, by its position.

    Colours are those that colour-blind people tell apart. There are 10 of them, 13 markers and 7 dashes: a colour
    with a marker repeats after 130 names, all three after 910.
    """
    import seaborn as sns

    colours = sns.color_palette("colorblind")
    return {
        name: {
            "color": colours[i % len(colours)],
            "marker": MARKERS[i % len(MARKERS)],
            "ls": DASHES[i % len(DASHES)],
        }
        for i, name in enumerate(names)
    }


# ---- text


def short(key: str) -> str:
    return key.removeprefix("method.")


def short_value(value: Any) -> str:
    """A value for a label: a float with four digits, a long text shortened."""
    return format(value, ".4g") if isinstance(value, float) else shorten(clean(str(value)))


def clean(text: str) -> str:
    """The text on one line, with a replacement character for each one that no font can show."""
    return "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())
    )


def columns_of(text: str) -> int:
    """Columns that a text takes: East Asian characters are two wide."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, width: int = WIDTH) -> str:
    """The text with an ellipsis in its middle where it is wider than `width` columns."""
    if columns_of(text) <= width:
        return text
    head, tail = "", ""
    for front, back in zip(text, reversed(text), strict=True):
        if columns_of(head + front + tail) > width - 1:
            break
        head += front
        if columns_of(head + back + tail) > width - 1:
            break
        tail = back + tail
    return f"{head}…{tail}"


def literal(text: str) -> str:
    """The text as matplotlib shows it unchanged: no formulas, and no hidden legend entry."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def labels(names: Iterable[str], width: int = WIDTH) -> tuple[dict[str, str], str]:
    """Labels that fit into a figure. One that must be shortened gets a number, which the note resolves.

    **Returns:** ({name: label}, note for the caption, or "").
    """
    fitting: dict[str, str] = {}
    notes: list[str] = []
    for name in names:
        text = clean(name)
        if name not in fitting and columns_of(text) > width:
            notes.append(f"[{len(notes) + 1}] {text}")
            text = f"[{len(notes)}] {shorten(text, width - 4)}"
        fitting.setdefault(name, literal(text))
    return fitting, f"In full: {'; '.join(notes)}." if notes else ""


def listed(names: Iterable[str]) -> str:
    """Names for a caption: the first few, then how many more."""
    return joined([shorten(clean(name)) for name in names])


def joined(words: Sequence[str], most: int = MAX_LISTED) -> str:
    """The first few of these words, then how many more."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def sentences(*parts: str) -> str:
    """The parts that are not empty as one caption."""
    return " ".join(part for part in parts if part)


# ---- legends


def legend(figure: Any, entries: Mapping[str, Any]) -> None:
    """Put a legend above a figure, {label: handle}: as many columns as fit, the figure higher by its rows."""
    if not entries:
        return
    width, height = figure.get_size_inches()
    longest = max(map(columns_of, entries))
    columns = max(1, min(len(entries), 5, int(width / (longest * CHARACTER + 0.6))))
    rows = -(-len(entries) // columns)
    figure.set_size_inches(width, height + 0.21 * max(0, rows - 1))
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", ncols=columns, frameon=False
    )


def handle(**look: Any) -> Any:
    """A legend's handle for a colour, marker and dash."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)
