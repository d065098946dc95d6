"""The benchmark of checkpoints: a short run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/benchmarks/checkpoints.py"


def test_writing_reading_and_the_share_of_a_run_are_measured(tmp_path):
    options = "--slots 2 --hidden 3 --rounds 2 --seconds 1 --every_seconds 0.1 --threads 1"
    out = tmp_path / "checkpoints.json"
    command = [sys.executable, SCRIPT, *options.split(), "--folder", tmp_path / "disk", "--json", out]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    content = json.loads(out.read_text())
    one, run = content["one"], content["training"]
    assert one["coordinates"] == 3 * (64 + 1 + 10) + 10
    assert one["bytes"] > 2 * 235 * 4 * 80  # h and c of two layers
    assert all(0 < entry["fsync"] < entry["write"] for entry in one["rounds"])
    assert run["windows"] > 10
    assert run["seconds_of_checkpoints"] > 0
    assert run["share"] == pytest.approx(
        run["seconds_of_checkpoints"] / (run["seconds"] - run["seconds_of_the_last"])
    )
    assert "went into checkpoints" in done.stdout
    assert list((tmp_path / "disk").iterdir()) == []
