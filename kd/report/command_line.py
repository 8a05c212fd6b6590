"""The command line of `python -m kd.report`."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kd.core import streams
from kd.core.errors import UserError
from kd.report import build
from kd.report.columns import COLUMNS
from kd.report.published import COLUMNS as PUBLISHED
from kd.report.published import Line, load
from kd.runs.directory import printable
from kd.runs.labels import one_line
from kd.runs.locate import is_run


@streams.protected()
def main(args: Sequence[str] | None = None) -> None:
    """Run `python -m kd.report`.

    The exit code is 2 if a directory has no runs, or published figures cannot be read.
    """
    parser = _argument_parser()
    options = parser.parse_args(args)
    directories = options.directories
    # the files of a run must not be replaced by those of a report
    in_place = len(directories) == 1 and not is_run(directories[0])
    out = options.out or (directories[0] if in_place else Path("kd-report"))
    try:
        problems = [
            *(f"no such directory: {folder}" for folder in directories if not folder.is_dir()),
            *(
                f"--runs: no such directory: {folder}"
                for folder in options.runs
                if not folder.is_dir()
            ),
        ]
        if problems:
            sys.exit(_print_error(problems[0]))
        if is_run(out):
            sys.exit(
                _print_error(f"{out} is the directory of a run; choose another with --out DIR")
            )
        resolved = out.resolve()
        if resolved != Path(os.path.normpath(out.absolute())):
            out = resolved  # the links of the page to the runs are relative to it
        lines = _load_comparison(options.compare, options.image_folder_data, out)
        report = build.write(
            directories,
            out,
            published_lines=lines,
            image_folder_data=options.image_folder_data,
            run_folders=options.runs,
            margin=_margin(options.margin),
        )
    except UserError as error:
        sys.exit(_print_error(str(error)))
    except OSError as error:
        path = error.filename or out
        sys.exit(
            _print_error(
                f"cannot write to {path} ({error.strerror}); choose another directory with "
                "--out DIR"
            )
        )
    print(f"{report.text}\n\nreport   {printable(report.page or out)}")


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kd.report",
        description=(build.__doc__ or "").split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="directory of a sweep or of a run, or one that contains runs",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of the report (default: DIR, or kd-report/ for a run or several DIR)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="folder to search for runs that are neither where they were planned nor near the "
        "sweep; can be given several times",
    )
    parser.add_argument(
        "--compare",
        metavar="published|CSV",
        help="compare with published figures: those shipped with kd (`published`), or those of a "
        "CSV file with the same columns",
    )
    parser.add_argument(
        "--as",
        dest="image_folder_data",
        metavar="DATA",
        help="with --compare: the data set that an image folder contains, such as cifar10",
    )
    parser.add_argument(
        "--margin",
        metavar="POINTS",
        help="differences of test accuracy up to this count as none (default: report.margin of "
        "the runs)",
    )
    parser.add_argument(
        "--columns",
        action="version",
        help="explain the columns of the tables and exit",
        version="\n".join(explain_columns()),
    )
    return parser


def explain_columns() -> list[str]:
    """Return a line for each column of each table.

    Columns of `published.csv` differ in meaning from those of the same names in other tables.
    """
    tables = {"runs.*, history.*, summary.*": COLUMNS, "published.csv (--compare)": PUBLISHED}
    lines = []
    width = 2 + max(len(name) for columns in tables.values() for name in columns)
    for title, columns in tables.items():
        lines += [
            "",
            f"{title}:",
            "",
            *(f"{name:{width}}{meaning}" for name, meaning in columns.items()),
        ]
    return lines[1:]


def _margin(text: str | None) -> float | None:
    """Return --margin as a fraction; None without it."""
    if text is None:
        return None
    try:
        points = float(text)
    except ValueError:
        points = math.nan
    if not 0 < points <= 100:
        raise UserError(
            f"--margin: should be a number of points above 0 and at most 100, got {text!r}"
        )
    return points / 100


def _load_comparison(source: str | None, image_folder_data: str | None, out: Path) -> list[Line]:
    """Load the figures of --compare, checked together with --as; an empty list without them."""
    if source is None:
        if image_folder_data is not None:
            raise UserError("--as: requires --compare published or --compare CSV")
        return []
    if Path(source).resolve() == (out / "published.csv").resolve():
        raise UserError(
            f"--compare: {source} would be overwritten by this report; "
            "give your own figures another name"
        )
    lines = load(source)
    if not lines:
        raise UserError(f"--compare: {source} contains no figures")
    return lines


def _print_error(line: str) -> int:
    """Print an error and return the exit code."""
    print(f"kd: {one_line(line)}", file=sys.stderr)
    return 2
