"""The benchmarks run and say what they promise; how fast is theirs to say, never a test's."""

import json
import subprocess
import sys
from pathlib import Path


def test_throughput_compares_both_loops_for_every_method(tmp_path: Path) -> None:
    out = tmp_path / "throughput.json"
    words = ["--images", "256", "--repeats", "1", "--device", "cpu", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.throughput", *words]
    said = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True).stdout
    found = json.loads(out.read_text())
    assert [row["method"] for row in found["rows"]] == ["standard", "logits", "feature"]
    for row in found["rows"]:
        assert row["ratio"] > 0
        assert row["method"] in said
        assert set(row["ms_a_step"]) == {"data", "forward", "backward", "optimizer"} | (
            set() if row["method"] == "standard" else {"teacher"}
        )
    assert found["environment"]["device"] == "cpu"
