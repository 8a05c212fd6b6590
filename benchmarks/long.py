"""Measure whether memory or open files grow over a long sweep of short jobs with one worker.

    python -m benchmarks.long [--jobs 200]

Prints the memory (PSS) and the number of open files of the parent process and of its worker each
time that a tenth of the jobs is done, and writes them as JSON next to this file.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kd.core.io import write_json

WORDS = [
    "data=digits",
    "student.scale=1",
    "teacher.scale=1",
    "student.epochs=1",
    "teacher.epochs=1",
    "device=cpu",
    "threads=1",
    "tracker.mode=disabled",
    "method=logits",
    "hydra.launcher.slots=1",
]


def seen(pid: int) -> dict[str, float]:
    """Return the memory in megabytes and the number of open files of a process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    pss = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return {"megabytes": round(pss / 1024, 1), "files": len(os.listdir(f"/proc/{pid}/fd"))}


def workers(parent: int) -> list[int]:
    """Return the worker processes, which are children of the fork server of `parent`."""
    processes = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name, _, fields = (path / "stat").read_text().partition("(")[2].rpartition(")")
            processes[int(path.name)] = name, int(fields.split()[1])
        except OSError:
            continue
    return [
        pid
        for pid, (name, server) in processes.items()
        if name == "kd-worker" and processes.get(server, ("", 0))[1] == parent
    ]


def measure(jobs: int) -> list[dict[str, float]]:
    """Run the sweep and return a row for each time that a tenth of the jobs is done."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        words = [*WORDS, f"seed=range(0,{jobs})"]
        process = subprocess.Popen(
            [sys.executable, "-m", "kd", "-m", *words], cwd=folder, stdout=subprocess.DEVNULL
        )
        while process.poll() is None:
            done = len(list(Path(folder).glob("runs/logits-*/result.json")))
            if (
                done >= (len(rows) + 1) * jobs / 10
                and done < jobs
                and (found := workers(process.pid))
            ):
                row = {"jobs": done}
                for name, pid in (("parent", process.pid), ("worker", found[0])):
                    row |= {f"{name}_{key}": value for key, value in seen(pid).items()}
                rows.append(row)
            time.sleep(0.05)
        if process.returncode:
            raise SystemExit(f"the sweep ended with code {process.returncode}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=200)
    asked = parser.parse_args()
    rows = measure(asked.jobs)
    print("  ".join(f"{name:>16}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value:>16}" for value in row.values()))
    write_json(Path(__file__).with_suffix(".json"), {"jobs": asked.jobs, "rows": rows})


if __name__ == "__main__":
    main()
