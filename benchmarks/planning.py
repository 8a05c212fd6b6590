"""Measure the seconds that a sweep needs to compose, check and record its jobs.

    python -m benchmarks.planning [--jobs 2000] [--out benchmarks/planning.json]

The jobs are a grid, and none is run. The imports are timed separately; `compositions` is the number
of configurations that Hydra composed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TARGET = 10.0  # seconds for 2,000 jobs
GRID = [
    "data=digits",
    "method=standard,logits,feature,dkd",
    "optimizer.lr=0.1,0.05,0.02,0.01,0.005",
]


def measure(jobs: int) -> dict[str, Any]:
    """Plan a grid of about this many jobs."""
    started = time.perf_counter()
    from hydra import initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    from hydra_plugins._kd_sweeper import composed
    from kd import cli
    from kd.report.tables import read_plan
    from kd.sweep.directory import SweepDirectory
    from kd.sweep.scheduler import plan

    imported = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as place,
        initialize_config_dir(str(cli.CONF), version_base="1.3"),
    ):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("config", [], RunMode.MULTIRUN)
        sweeper = SimpleNamespace(
            hydra_context=SimpleNamespace(config_loader=loader), config=master
        )
        words = [*GRID, f"seed=range({-(-jobs // 20)})", f"paths.runs={place}/runs"]
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
        (batch,) = BasicSweeper.split_arguments(overrides, None)
        directory = SweepDirectory(Path(place) / "sweep")
        directory.claim()
        plan(directory, (composed(sweeper, list(job)) for job in batch), total=len(batch))
        planned = time.perf_counter()
        read_plan(Path(place) / "sweep")
        return {
            "jobs": len(batch),
            "compositions": sweeper.composer.compositions,
            "import_seconds": imported - started,
            "plan_seconds": planned - imported,
            "read_seconds": time.perf_counter() - planned,
            "target_seconds": TARGET * len(batch) / 2000,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        "benchmarks.planning", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options.jobs)
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
