"""The benchmark of drawing windows: short runs, and what it draws."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/benchmarks/sampling.py"


def run(out: Path, arguments: str) -> tuple[dict, str]:
    """What the benchmark writes and prints."""
    command = [sys.executable, SCRIPT, *arguments.split(), "--json", out]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert out.with_suffix(".png").stat().st_size > 10_000
    return json.loads(out.read_text()), done.stdout


def test_drawing_and_waiting_are_measured_in_process(tmp_path: Path) -> None:
    content, printed = run(
        tmp_path / "new" / "sampling.json",
        "--workloads tiny,blank --actors 0 --rounds 2 --patience 0 --seconds 0 --waiting_windows 2",
    )
    blank, way = content["throughput"]["blank"], content["throughput"]["blank"]["ways"]["in process"]
    assert blank["window_bytes"] == pytest.approx(80e6, rel=0.01)
    speed = way["windows_per_s"]
    assert 0 < speed["min"] <= speed["median"] <= speed["max"]
    assert way["mb_per_s"] == pytest.approx(speed["median"] * blank["window_bytes"] / 1e6)
    waiting = content["waiting"]["ways"]["in process"]
    assert 0 < waiting["share"]["median"] < 1
    assert waiting["waited_seconds"]["median"] < waiting["window_seconds"]["median"]
    assert "blank: windows of 80.1 MB" in printed
    assert "waiting: LSTM on one streamed MNIST MLP" in printed


@pytest.mark.slow
def test_actors_are_measured_beside_it(tmp_path: Path) -> None:
    arguments = "--workloads tiny --actors 0,1,2 --rounds 1 --patience 0 --seconds 0.1 --waiting_windows 0"
    content, printed = run(tmp_path / "sampling.json", arguments)
    ways = content["throughput"]["tiny"]["ways"]
    assert [*ways] == ["in process", "1 actor, depth 4", "2 actors, depth 4", "1 actor, depth 1"]
    assert all(way["windows_per_s"]["min"] > 0 for way in ways.values())
    assert "asking an actor and fetching its answer: " in printed
    assert "waiting" not in content


def test_a_round_goes_on_where_the_last_one_ended(benchmarks) -> None:
    sources, jobs = benchmarks("sampling_sources"), benchmarks("sampling_jobs")
    source = sources.Source(jobs.WORKLOADS["tiny"](), sources.Entrant(0, 4))
    w_and_y, theta0, inner_step, reset, horizon = 4 * 2, 4, 8, 1, 8
    assert sources.size_of(source.first()) == w_and_y + theta0 + inner_step + reset + horizon
    assert source.round(0).windows == 1
    assert source.loader.next_index == 3  # the first, one that fills the queue, one that counts
    source.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workloads pixel", "--workloads (pixel) must be tiny, quadratics"),
        ("--actors 0,-1", "--actors (-1) must be at least 0"),
        ("--depth 0", "--depth (0) must be at least 1"),
        ("--actors ,", "--actors and --waiting_depths must not be empty"),
    ],
)
def test_what_does_not_exist_is_refused(benchmarks, monkeypatch, capsys, arguments, message) -> None:
    sampling = benchmarks("sampling")
    monkeypatch.setattr(sys, "argv", ["benchmark_sampling", *arguments.split()])
    with pytest.raises(SystemExit):
        sampling.arguments()
    assert message in " ".join(capsys.readouterr().err.split())
