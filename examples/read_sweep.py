"""Read the tables of a sweep with pandas: the best setting of each method, and its test accuracy.

The best setting is that of the highest validation accuracy.

python examples/read_sweep.py SWEEP            # SWEEP: such as multirun/2026-11-28/10-00-00
"""

import sys
from pathlib import Path

import pandas as pd


def main(sweep: str) -> None:
    # One row per setting, with means over seeds
    summary = pd.read_parquet(Path(sweep) / "summary.parquet")
    chosen = summary[summary["chosen"]]
    columns = ["setting", "n", "val_accuracy", "test_accuracy", "test_accuracy_ci95", "verdict"]
    print(chosen[columns].to_string(index=False))

    runs = pd.read_parquet(Path(sweep) / "runs.parquet")  # one row per run
    spread = (
        runs[runs["status"] == "done"]
        .groupby("setting")["test_accuracy"]
        .agg(["min", "max", "count"])
    )
    print(spread.to_string())


if __name__ == "__main__":
    main(*sys.argv[1:])
