"""The benchmark of many processes: its arithmetic, and a short run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/benchmarks/scaling.py"
WORK = {
    "coordinate_steps": 1e6,
    "slots": 8,
    "compute": 10e-3,
    "fixed": 2e-3,
    "overhead": 1e-3,
    "phi_bytes": 20_000,
    "draw": 0.0,
    "fetch": 1e-3,
}


@pytest.fixture
def model(benchmarks):
    return benchmarks("scaling_model")


def test_an_all_reduce_takes_its_messages(model) -> None:
    link = model.Link(latency=1e-5, bandwidth=1e9)
    assert model.ring(1, 1e6, link) == model.tree(1, 1e6, link) == 0
    assert model.ring(4, 1e6, link) == pytest.approx(6 * (1e-5 + 0.25e-3))
    assert model.tree(5, 1e6, link) == pytest.approx(6 * (1e-5 + 1e-3))
    cluster = model.Cluster(inside=link, between=link)
    assert model.all_reduce(8, 0, cluster) == pytest.approx(6e-5)  # three levels of a tree, up and down
    assert model.all_reduce(8, 1e9, cluster) == pytest.approx(model.ring(8, 1e9, link))
    assert model.all_reduce(64, 1e9, cluster) == pytest.approx(2 * model.ring(8, 1e9, link))
    assert model.broadcast(64, 0, cluster) == pytest.approx(6e-5)


def test_one_gpu_does_what_was_measured(model) -> None:
    (one,) = model.weak(model.Work(**WORK), model.Cluster(), [1])
    assert (one.exchange, one.efficiency, one.actors) == (0, 1, 0)
    assert one.step == pytest.approx(11e-3)
    assert one.rate == pytest.approx(8e6 / 11e-3)


def test_efficiency_falls_by_the_exchange_alone_if_every_gpu_has_as_many_slots(model) -> None:
    rows = model.weak(model.Work(**WORK), model.Cluster(), [1, 8, 64, 1024])
    for row in rows:
        assert row.step == pytest.approx(11e-3 + row.exchange)
        assert row.efficiency == pytest.approx(11e-3 / row.step)
        assert row.slots == 8
    assert rows[0].exchange < rows[1].exchange < rows[2].exchange < rows[3].exchange


def test_what_is_fixed_limits_as_many_slots_on_more_gpus(model) -> None:
    rows = model.strong(model.Work(**WORK), model.Cluster(), [1, 8, 64, 1024], total=64)
    assert [row.gpus for row in rows] == [1, 8, 64]  # 1,024 GPUs would have less than a slot each
    assert [row.slots for row in rows] == [64, 8, 1]
    assert rows[0].step == pytest.approx(2e-3 + 64e-3 + 1e-3)
    assert rows[2].step == pytest.approx(2e-3 + 1e-3 + 1e-3 + rows[2].exchange)
    assert rows[2].efficiency == pytest.approx(rows[0].step / 64 / rows[2].step)


def test_windows_are_drawn_where_that_is_faster_and_actors_keep_up_or_set_the_pace(model) -> None:
    cluster = model.Cluster(cores_per_gpu=4)

    def one(draw: float):
        return model.predict(model.Work(**{**WORK, "draw": draw}), cluster, 1, 8)

    assert (one(0.5e-3).actors, one(0.5e-3).step) == (0, pytest.approx(11.5e-3))
    assert (one(24e-3).actors, one(24e-3).step) == (3, pytest.approx(12e-3))
    assert not one(24e-3).drawing_limits
    assert (one(48e-3).drawing_limits, one(48e-3).step) == (True, pytest.approx(16e-3))
    alone = model.predict(model.Work(**{**WORK, "draw": 24e-3}), model.Cluster(cores_per_gpu=1), 1, 8)
    assert (alone.actors, alone.step) == (0, pytest.approx(35e-3))


def test_all_wait_for_the_slowest(model) -> None:
    assert model.straggling(1, 0.1) == 1
    assert model.straggling(1024, 0.1) == pytest.approx(1 + 0.1 * math.sqrt(2 * math.log(1024)))
    rows = [model.weak(model.Work(**WORK, jitter=jitter), model.Cluster(), [64])[0] for jitter in (0, 0.1)]
    assert rows[1].step > rows[0].step


@pytest.mark.slow
def test_two_processes_are_measured_and_many_gpus_predicted(tmp_path: Path) -> None:
    out = tmp_path / "new" / "scaling.json"
    arguments = "--workloads S=2 --rounds 1 --patience 0 --seconds 0.1 --gpus 1,16 --total_slots 8"
    command = [sys.executable, SCRIPT, *arguments.split(), "--json", out]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    content = json.loads(out.read_text())
    own = content["measured"]["S=2"]
    for mode in ("alone", "both", "ranks"):
        speed, seconds = own["modes"][mode]["coordinate_steps_per_s"], own["modes"][mode]["seconds"]
        assert speed["median"] > 0
        parts = sum(seconds[part] for part in ("drawing", "forward", "backward", "adam_and_lightning"))
        assert parts == pytest.approx(seconds["meta_step"], rel=1e-6)
    assert own["phi_bytes"] == 4 * 5_061
    assert own["all_reduce_seconds"]["min"] > 0
    assert [[row["gpus"] for row in rows] for rows in content["predicted"]["S=2"].values()] == [
        [1, 16],
        [1, 16],
        [1],
    ]
    assert content["assumed"]["latency_us"] == 10
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "(measured)" in run.stdout
    assert "predicted, not measured" in run.stdout
    assert "Assumed: --latency_us 10" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workloads W4", "--workloads (W4) must be W1, W2, W3, N=<coordinates> or S=<tasks>"),
        ("--rounds 0", "--rounds (0) must be at least 1"),
        ("--gpus 8,0", "--gpus (0) must be at least 1"),
        ("--bandwidth_gb 0", "--bandwidth_gb (0) must be positive"),
    ],
)
def test_what_cannot_be_is_refused(benchmarks, monkeypatch, capsys, arguments: str, message: str) -> None:
    scaling = benchmarks("scaling")
    monkeypatch.setattr(sys, "argv", ["benchmark_scaling", *arguments.split()])
    with pytest.raises(SystemExit):
        scaling.arguments()
    assert message in " ".join(capsys.readouterr().err.split())
