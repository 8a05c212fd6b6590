"""The look of all figures: canvas, colours, markers, dashes, short labels and legends."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

MARKERS = ["o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "p", "h", "d"]
DASHES: list[Any] = ["-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 2)), (0, (1, 3))]
WIDTH = 44  # largest width of a label, in columns of text
CHARACTER = 0.08  # approximate width of a column of text, in inches
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
    """Apply kd's look to figures drawn inside the block.

    Yields:
        matplotlib.pyplot.
    """
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
    """Create a figure of this width and height, in inches.

    Returns:
        (figure, axes as [rows][columns]).
    """
    import matplotlib.pyplot as plt

    return plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return {name: colour, marker and dash}, which depend on the position of the name.

    The colours can be distinguished by colour-blind readers. With 10 colours, 13 markers and 7
    dashes, a pair of colour and marker repeats after 130 names, and all three after 910.
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
    """Return a configuration key without the prefix `method.`."""
    return key.removeprefix("method.")


def short_value(value: Any) -> str:
    """Return a value for a label: a float with four significant digits, or a shortened text."""
    return format(value, ".4g") if isinstance(value, float) else shorten(clean(str(value)))


def clean(text: str) -> str:
    """Return the text on one line, with unprintable characters replaced."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def columns_of(text: str) -> int:
    """Return the width of a text in columns; East Asian characters are two columns wide."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, width: int = WIDTH) -> str:
    """Return the text, with an ellipsis in its middle if it is wider than `width` columns."""
    if columns_of(text) <= width:
        return text
    head = ""
    tail = ""
    for front, back in zip(text, reversed(text), strict=True):
        if columns_of(head + front + tail) > width - 1:
            break
        head += front
        if columns_of(head + back + tail) > width - 1:
            break
        tail = back + tail
    return f"{head}…{tail}"


def literal(text: str) -> str:
    """Escape a text so that matplotlib shows it unchanged.

    A dollar sign would start a formula, and a leading underscore would hide a legend entry.
    """
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def labels(names: Iterable[str], width: int = WIDTH) -> tuple[dict[str, str], str]:
    """Return labels that fit into a figure.

    A name that is too wide is shortened and numbered; the note gives its full text.

    Args:
        names: The names to label.
        width: Largest width of a label, in columns of text.

    Returns:
        ({name: label}, note for the caption or "").
    """
    fitting: dict[str, str] = {}
    notes: list[str] = []
    for name in names:
        text = clean(name)
        if name not in fitting and columns_of(text) > width:
            notes.append(f"[{len(notes) + 1}] {text}")
            text = f"[{len(notes)}] {shorten(text, width - 4)}"
        fitting.setdefault(name, literal(text))
    return fitting, f"Full names: {'; '.join(notes)}." if notes else ""


def listed(names: Iterable[str]) -> str:
    """Return names for a caption: the first few, then the number of the others."""
    return joined([shorten(clean(name)) for name in names])


def joined(items: Sequence[str], most: int = MAX_LISTED) -> str:
    """Return the first `most` items, separated by commas, then the number of the others."""
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def sentences(*parts: str) -> str:
    """Return the parts that are not empty as one caption."""
    return " ".join(part for part in parts if part)


# ---- legends


def legend(figure: Any, entries: Mapping[str, Any]) -> None:
    """Add a legend of {label: handle} above a figure.

    It has as many columns as fit, and the height of the figure grows with its rows.
    """
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
    """Return a legend handle with this colour, marker and dash."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)
