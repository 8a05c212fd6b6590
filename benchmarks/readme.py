"""Write the measurements in docs/performance.md from the results of the benchmarks.

python -m benchmarks.readme
"""

import json
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- written by python -m benchmarks.readme -->", "<!-- to here -->"
SWEEPS = {  # rows of sweep.json, as the table names them
    "sweep of 16, a worker a core": "sweep of 16, one worker per core",
    "sweep of 16, packed by 8": "sweep of 16, packed by 8",
}


def section(throughput: dict[str, Any], sweep: dict[str, Any]) -> str:
    """Return the section as Markdown."""
    where, rows = throughput["environment"], throughput["rows"]
    seconds = sweep["plain_seconds"]
    lines = [
        _wrapped(
            f"Measured on {where['threads']} cores ({where['processor']}, {where['device']}, "
            f"{where['precision']}, torch {where['torch']}), where a 2048³ matrix product runs at "
            f"{throughput['matrix_flops'] / 1e9:.0f} GFLOP/s."
        ),
        "`python -m benchmarks.throughput` and `python -m benchmarks.sweep` print these numbers.",
        "",
        *map(
            _wrapped,
            (
                "- **Baseline**: the usual training loop in plain PyTorch, `benchmarks/plain.py` "
                "(float32, PIL images, two loader workers).",
                "- **Setup**: a student of scale 16, a teacher of scale 32, batches of "
                f"{throughput['batch_size']} and {throughput['images']:,} images.",
                "- **Ratio**: both loops run in one process and take turns. The ratio is the "
                f"median of {throughput['repeats']} repeats.",
                "- **Peak**: the speed as a fraction of the fastest possible one, at which the "
                "networks' FLOPs run at the rate of the matrix product.",
                f"- **Sweep**: the time from command to report, with {sweep['images']:,} images "
                f"and {sweep['epochs']} epochs. {len(seconds)} of the {sweep['students']} plain "
                "runs were timed.",
            ),
        ),
        "",
        "| | plain, images/s | kd, images/s | ratio | of peak | memory, plain / kd | disk |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = row["memory_mb"]
        lines.append(
            f"| {row['path']} | {row['plain']:,} | {row['kd']:,} | **{row['ratio']:.1f}×** "
            f"| {100 * row['of_floor']:.0f} % "
            f"| {memory['plain']:,} / {memory['kd']:,} MB | {row['disk_mb']:,} MB |"
        )
    each = sum(seconds) / len(seconds)
    for row in sweep["rows"]:
        lines.append(
            f"| {SWEEPS.get(row['path'], row['path'])}, command to report "
            f"| {sweep['students']} × {each:.0f} s "
            f"| {row['seconds']:.0f} s | **{row['ratio']:.1f}×** | "
            f"| {sweep['plain_memory_mb']:,} / {row['memory_mb']:,} MB | {row['disk_mb']:,} MB |"
        )
    lines += [
        "",
        f"With cached data, the first training step starts {sweep['startup_seconds']:.1f} s after "
        "the command. Milliseconds per step:",
        "",
        "| | " + " | ".join(_parts(rows)) + " |",
        "| --- |" + " ---: |" * len(_parts(rows)),
    ]
    for row in rows:
        spent = (row["ms_a_step"].get(part) for part in _parts(rows))
        lines.append(
            f"| {row['path']} | "
            + " | ".join("" if ms is None else f"{ms:.1f}" for ms in spent)
            + " |"
        )
    return "\n".join(lines)


def _parts(rows: list[dict[str, Any]]) -> list[str]:
    return ["data", "teacher", *(part for part in rows[0]["ms_a_step"] if part != "data")]


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent="  " if text.startswith("- ") else "")


def written(page: str, text: str) -> str:
    """Return the page with this section."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def measured() -> str:
    """Return the section for the results in benchmarks/*.json."""
    return section(
        *(json.loads((HERE / f"{name}.json").read_text()) for name in ("throughput", "sweep"))
    )


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), measured()))
