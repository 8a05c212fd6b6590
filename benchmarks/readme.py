"""Write the README's section on speed from the results of the benchmarks.

python -m benchmarks.readme
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BEGIN, END = "<!-- written by python -m benchmarks.readme -->", "<!-- to here -->"


def section(throughput: dict[str, Any], sweep: dict[str, Any]) -> str:
    """Return the section as Markdown."""
    where, rows = throughput["environment"], throughput["rows"]
    lines = [
        "Measured by `python -m benchmarks.throughput` and `python -m benchmarks.sweep` on "
        f"{where['threads']} cores ({where['processor']}, {where['device']}, "
        f"{where['precision']}, torch {where['torch']}; a 2048³ matrix product runs at "
        f"{throughput['matrix_flops'] / 1e9:.0f} GFLOP/s there), against the loop that everyone "
        "writes ([`benchmarks/plain.py`](benchmarks/plain.py): float32, PIL, two loader workers) "
        f"in the same process, in turn, as the median ratio of {throughput['repeats']}: student "
        f"scale 16, teacher scale 32, batches of {throughput['batch_size']}, "
        f"{throughput['images']:,} images.",
        "",
        "| | plain, images/s | kd, images/s | ratio | target | of the floor "
        "| memory, plain / kd | disk |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        memory = row["memory_mb"]
        lines.append(
            f"| {row['path']} | {row['plain']:,} | {row['kd']:,} | **{row['ratio']:.1f}×** "
            f"| {_target(row)} | {100 * row['of_floor']:.0f} % "
            f"| {memory['plain']:,} / {memory['kd']:,} MB | {row['disk_mb']:,} MB |"
        )
    seconds = sweep["plain_seconds"]
    each = sum(seconds) / len(seconds)
    for row in sweep["rows"]:
        lines.append(
            f"| {row['path']}, typing to report | {sweep['students']} × {each:.0f} s "
            f"| {row['seconds']:.0f} s | **{row['ratio']:.1f}×** | {_target(row)} | "
            f"| {sweep['plain_memory_mb']:,} / {row['memory_mb']:,} MB | {row['disk_mb']:,} MB |"
        )
    lines += [
        "",
        f"Start-up to the first step, cached data: {sweep['startup_seconds']:.1f} s (target "
        f"{sweep['startup_target']:.0f} s). The floor is the networks' FLOPs over the rate of the "
        f"matrix product. The sweep: {sweep['images']:,} images, {sweep['epochs']} epochs, "
        f"{len(seconds)} of the plain runs timed. Where a step's time goes, in milliseconds:",
        "",
        "| | " + " | ".join(_parts(rows)) + " |",
        "| --- |" + " --- |" * len(_parts(rows)),
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


def _target(row: dict[str, Any]) -> str:
    if row["target"] is None:
        return ""
    return f"{row['target']:g}× {'reached' if row['ratio'] >= row['target'] else 'missed'}"


def written(readme: str, text: str) -> str:
    """Return the README with this section."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def measured() -> str:
    return section(
        *(json.loads((HERE / f"{name}.json").read_text()) for name in ("throughput", "sweep"))
    )


if __name__ == "__main__":
    README.write_text(written(README.read_text(), measured()))
