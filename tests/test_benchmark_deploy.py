"""The benchmark of learned optimizers in use: a short run."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts/benchmarks/deploy.py"


def test_cost_and_memory_of_a_step_are_measured(tmp_path):
    out = tmp_path / "deploy.json"
    options = ["--networks", "784-20-10", "--rounds", "2", "--steps", "2", "--json", str(out)]
    done = subprocess.run([sys.executable, SCRIPT, *options], check=True, capture_output=True, text=True)
    one = json.loads(out.read_text())["networks"]["784-20-10"]
    assert one["coordinates"] == 15_910
    assert all(seconds > 0 for seconds in one["seconds"].values())
    assert 8 * 15_910 <= one["state_bytes"]["Adam"] < 8 * 15_910 + 64  # two moments, and step counts
    # m, v, and h and c of 20 units in two layers; the guard keeps the last step and up to two points
    assert 82 * 4 * 15_910 <= one["state_bytes"]["learned"] < 82 * 4 * 15_910 + 64
    extra = one["state_bytes"]["learned, guarded"] - one["state_bytes"]["learned"]
    assert extra in (8 * 15_910, 12 * 15_910)
    assert "learned, guarded" in done.stdout
