"""Simulate how often the report's verdicts are right; write docs/verdicts.md.

    python -m benchmarks.verdicts [--repeats 1000]     # about 5 minutes for 1000
    python -m benchmarks.verdicts --page               # writes docs/verdicts.md

Accuracies are normal around 80 %, with the spread over seeds that docs/study.md shows. One of k
settings gains over the baseline, the others do not. A collapse costs a run 6.5 points.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from kd.core.io import write_json, write_text
from kd.report.inference import COLLAPSE, LEVEL, MARGIN, Decision, compare

ROOT = Path(__file__).parents[1]
MEASURED, PAGE = ROOT / "benchmarks" / "verdicts.json", ROOT / "docs" / "verdicts.md"
SD = 0.002  # of an accuracy over seeds
GRAIN = 1e-4  # 10,000 test images
FALL = 0.065  # of a collapse
GAINS = (0.0, 0.0025, 0.005, 0.0075, 0.01)
SEEDS = (3, 5, 8)
SETTINGS = (3, 9)
COLLAPSES = (0.0, 0.05)


def accuracies(
    rng: np.random.Generator, k: int, n: int, gain: float = 0.0, collapses: float = 0.0
) -> pd.DataFrame:
    """Draw accuracies of a baseline and k settings over n seeds.

    Args:
        rng: Where randomness comes from.
        k: Number of settings.
        n: Number of seeds.
        gain: What the first setting gains over the baseline, as a fraction.
        collapses: The probability that a run collapses.
    """
    values = rng.normal(0.8, SD, (n, k + 1))
    values[:, 1] += gain
    values -= FALL * (rng.random(values.shape) < collapses)
    return pd.DataFrame(values, columns=["standard", *(f"m{i}" for i in range(k))])


def simulate(
    k: int, n: int, gain: float, collapses: float, repeats: int, seed: int = 0
) -> dict[str, float]:
    """Return how often each decision is made about the setting that gains.

    Returns:
        The fraction of each decision, and `false`: the fraction of repeats in which any setting
        without a gain is called better or worse.
    """
    rng = np.random.default_rng([seed, k, n, round(1e6 * gain), round(1e6 * collapses)])
    counts: Counter[str] = Counter()
    false = 0
    for _ in range(repeats):
        comparison = compare(accuracies(rng, k, n, gain, collapses), "standard", grain=GRAIN)
        decisions = {name: one.decide() for name, one in comparison.estimates.items()}
        counts[decisions.get("m0", "unstable")] += 1
        if gain:
            decisions.pop("m0", None)
        false += bool({"better", "worse"} & set(decisions.values()))
    shares = {name: counts[name] / repeats for name in get_args(Decision)}
    return {**shares, "false": false / repeats}


def page(measured: dict[str, Any]) -> str:
    """Return the text of docs/verdicts.md."""
    lines = [
        "# How often verdicts are right",
        "",
        f"Simulated by `python -m benchmarks.verdicts`: {measured['repeats']:,} repeats of each "
        "row through the code of the report. One of k settings has the gain, in points; the others "
        f"have none. The standard deviation over seeds is {100 * SD:g} points, "
        f"the margin {100 * MARGIN:g} points. In the second part each run collapses, by "
        f"{100 * FALL:g} points, with a probability of {COLLAPSES[1]:.0%}.",
        "",
        f"`false` is the fraction of reports in which any setting without a gain is called better "
        f"or worse. It is to be at most {LEVEL:.0%}. `equal` is to be at most {LEVEL:.0%} where "
        "the gain is the margin. With so many repeats, a true rate of 5% is simulated to within "
        f"{1.96 * (0.05 * 0.95 / measured['repeats']) ** 0.5:.3f}.",
    ]
    head = ["gain", "k", "seeds", "better", "equal", "undecided", "worse", "unstable", "false"]
    for collapses in COLLAPSES:
        title = "With collapses" if collapses else "Without collapses"
        lines += [
            "",
            f"## {title}",
            "",
            "| " + " | ".join(head) + " |",
            "|" + " ---: |" * len(head),
        ]
        for row in measured["rows"]:
            if row["collapses"] != collapses:
                continue
            shares = [f"{row[name]:.3f}" for name in head[3:]]
            cells = [f"{100 * row['gain']:g}", str(row["k"]), str(row["n"]), *shares]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"A seed collapses, for the report, if it is more than {100 * COLLAPSE:g} points and eight "
        "standard deviations below the median of its setting. [Reports](reports.md) explains the "
        "procedure.",
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.verdicts", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--page", action="store_true", help="write docs/verdicts.md")
    asked = parser.parse_args()
    if not asked.page:
        rows = []
        for collapses in COLLAPSES:
            for gain in GAINS:
                for k in SETTINGS:
                    for n in SEEDS:
                        row = {"gain": gain, "k": k, "n": n, "collapses": collapses}
                        row |= simulate(repeats=asked.repeats, **row)
                        print(row, flush=True)
                        rows.append(row)
        write_json(MEASURED, {"repeats": asked.repeats, "rows": rows})
    write_text(PAGE, page(json.loads(MEASURED.read_text())))


if __name__ == "__main__":
    main()
