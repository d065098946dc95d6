"""The benchmark: its independent peers, its measuring processes, its command line."""

import contextlib
import importlib
import json
import math
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


def peer_gradient(benchmarks, workload, batch, peer):
    """The meta-loss, with the peer's gradients filled in."""
    total = benchmarks("eager_peer").meta_loss(
        peer, workload.loss, batch.theta0, batch.task, batch.data, batch.window_length
    )
    total.backward()
    return total


def test_meta_gradient_equals_that_of_plain_pytorch(benchmarks) -> None:
    from l2l_scale.estimators import TruncatedBPTT
    from l2l_scale.tasks import Quadratic
    from l2l_scale.unroll import begin

    eager_peer, methods, workloads = map(benchmarks, ("eager_peer", "methods", "workloads"))
    workload = workloads.draw("small", Quadratic(dimension=3), workloads.quadratic_loss, slots=4)
    batch = workloads.sampler(workload.family)(0, range(4)).to_batch(torch.float64)
    torch.manual_seed(0)
    peer = eager_peer.EagerLSTM(hidden_size=5).double()
    rule = methods.rule_like(peer)
    total = peer_gradient(benchmarks, workload, batch, peer)
    estimate = TruncatedBPTT()(rule, workload.family, begin(rule, batch, None), batch)
    estimate.surrogate.backward()
    torch.testing.assert_close(estimate.surrogate, total, rtol=1e-13, atol=0)
    for ours, theirs in zip(rule.network.cells, (peer.lower, peer.upper), strict=True):
        for own, other in [
            (ours.weight_input, theirs.weight_ih),
            (ours.weight_hidden, theirs.weight_hh),
            (ours.bias, theirs.bias_ih),
        ]:
            torch.testing.assert_close(own.grad, methods.reorder_gates(other.grad), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rule.output.weight.grad, peer.output.weight.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "eager-true", "peer"])
@pytest.mark.parametrize("name", ["N=7", "S=3"])
def test_meta_steps_train_from_the_same_start_and_can_be_restarted(benchmarks, name, backend) -> None:
    methods, workloads = map(benchmarks, ("methods", "workloads"))
    workload = workloads.make(name)
    method = methods.make(backend, workload)
    losses = [method.step() for _ in range(3)]
    assert losses[0] == pytest.approx(methods.make("eager", workload).step(), rel=1e-6)
    assert losses[0] > losses[1] > losses[2]
    method.restart()
    assert [method.step() for _ in range(3)] == losses


@pytest.mark.parametrize("variant", ["plain", "tuned"])
@pytest.mark.parametrize("name", ["N=7", "S=3"])
def test_meta_gradient_of_the_jax_peer(benchmarks, tmp_path: Path, name: str, variant: str) -> None:
    jax = pytest.importorskip("jax", reason="JAX is an optional extra")
    import numpy as np

    export, jax_peer, methods, workloads = map(benchmarks, ("export", "jax_peer", "methods", "workloads"))
    arrays = dict(np.load(export.export(name, tmp_path)))
    weights = {key.removeprefix("phi."): arrays.pop(key) for key in [*arrays] if key.startswith("phi.")}
    theta, kind, steps = (arrays.pop(key) for key in ("theta0", "kind", "steps"))
    tuned, shape = variant == "tuned", (20, theta.size)
    state = tuple(np.zeros(shape if tuned else shape[::-1], np.float32) for _ in range(4))

    def loss(weights):
        tasks = jax_peer.problem(str(kind))
        return jax_peer.meta_loss(tasks, tuned, int(steps), weights, theta, state, arrays)

    (_, value), grads = jax.value_and_grad(loss, has_aux=True)(weights)
    peer, workload = methods.first_weights(), workloads.make(name)
    total = peer_gradient(benchmarks, workload, workload.batch, peer)
    assert float(value) == pytest.approx(total.item(), rel=1e-5)
    for key, own in [
        ("lower_input", peer.lower.weight_ih),
        ("upper_hidden", peer.upper.weight_hh),
        ("upper_bias", peer.upper.bias_ih),
        ("output", peer.output.weight),
    ]:
        other = torch.from_numpy(np.array(grads[key]))
        assert (other - own.grad.squeeze(0)).norm() < 1e-4 * own.grad.norm(), key


def test_useful_operations_are_those_that_torch_counts(benchmarks) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    eager_peer, roofline = map(benchmarks, ("eager_peer", "roofline"))
    assert (roofline.useful_flops(20, 2, 2), roofline.recompute_flops(20, 2, 2)) == (29_560, 39_520)
    coordinates, hidden = 6, 7
    rule = eager_peer.EagerLSTM(hidden)
    for input_gradient in (False, True):
        state = tuple(torch.randn(coordinates, hidden, requires_grad=True) for _ in range(4))
        grad = torch.randn(coordinates, requires_grad=input_gradient)
        with FlopCounterMode(display=False) as counter:
            update, _ = rule(grad, state)
            update.sum().backward()
        counted = counter.get_total_flops() / coordinates
        assert counted == roofline.useful_flops(hidden, 2, 2, input_gradient)


def test_peak_is_what_a_repetition_used_beyond_what_was_there(benchmarks) -> None:
    worker = benchmarks("worker")
    kept = bytearray(80_000_000)

    def step() -> float:
        # Fresh zeros would need no memory before they are written; and from 32 MB on, the allocator never
        # takes what it still holds from before.
        written = b"x" * 40_000_000
        return float(len(bytearray(written)))

    step()
    result = worker.repeat(step, 0.0)
    assert result["calls"] == 1
    assert 75e6 < result["peak_bytes"] < 90e6  # what was written, and its copy
    assert len(kept) == 80_000_000


@pytest.fixture
def child(benchmarks, tmp_path: Path):
    """Starts a measuring process from the body of its ``prepare``."""
    with contextlib.ExitStack() as stack:

        def start(body: str):
            script = tmp_path / "child.py"
            head = (
                f"import os, sys\nsys.path.insert(0, {str(ROOT / 'scripts/benchmarks')!r})\nimport worker\n"
            )
            indented = textwrap.indent(textwrap.dedent(body), "    ")
            script.write_text(f"{head}def prepare():\n{indented}\nworker.serve(prepare)\n")
            started = benchmarks("children").Child([sys.executable, str(script)])
            stack.callback(started.close)
            return started

        yield start


def test_a_child_does_a_repetition_whenever_it_is_asked(child) -> None:
    started = child("print('noise')\nreturn worker.Candidate('it', lambda: 0.25, {'more': 1})")
    assert started.ready() == {"description": "it", "more": 1}
    assert (started.repeat(0).calls, started.repeat(0).loss) == (1, 0.25)
    started.release()
    long = started.repeat(0.05)
    assert long.calls > 1
    assert 0.05 <= long.wall < 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no compiler\\nmore')", "^no compiler$"),
        ("raise KeyError('x')", "^KeyError: 'x'$"),
        ("os.kill(os.getpid(), 9)", "too little memory"),
        ("os.write(2, b'bad luck'); os._exit(3)", "code 3: bad luck"),
    ],
)
def test_a_child_that_cannot_says_why(benchmarks, child, body: str, message: str) -> None:
    with pytest.raises(benchmarks("children").UnavailableError, match=message):
        child(body).ready()


class FakeChild:
    """Notes what it is asked."""

    calls: list[str]

    def __init__(self, command: list[str]) -> None:
        self.backend = command[command.index("--backend") + 1]

    def ready(self):
        return {"description": self.backend, "workload": "fake"}

    def repeat(self, seconds: float):
        self.calls.append(f"{self.backend} {seconds}")
        repetition = sys.modules["children"].Repetition
        wall = {"eager": 0.4, "fused": 0.1, "peer": 3.0}[self.backend]
        return repetition(calls=2, wall=wall, cpu=wall / 2, loss=1.0, peak_bytes=4000)

    def release(self) -> None:
        self.calls.append(f"{self.backend} release")

    def close(self) -> None:
        self.calls.append(f"{self.backend} close")


@pytest.fixture
def race(benchmarks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Measures eager and others on S=1 with fake children; returns results, calls, and who was ticked off."""

    def run(others: list[str], **changes):
        measure, backends = map(benchmarks, ("measure", "backends"))
        FakeChild.calls, ticks = [], []
        monkeypatch.setattr(measure, "Child", FakeChild)
        settings = measure.Settings(
            **{
                "rounds": 2,
                "min_seconds": 0.1,
                "deadline": math.inf,
                "jax_python": "",
                "folder": tmp_path,
                **changes,
            }
        )
        entrants = [backends.Entrant(name, 1) for name in ["eager", *others]]
        results = measure.Race("S=1", entrants, settings, ticks.append).run()
        return results, FakeChild.calls, sorted(ticks)

    return run


def test_rounds_are_interleaved_and_ratios_are_taken_round_by_round(benchmarks, race) -> None:
    results, calls, ticks = race(["fused"])
    assert calls[:6] == ["eager 0", "fused 0", "eager 0.1", "fused 0.1", "eager 0.1", "fused 0.1"]
    assert ticks == sorted(results)
    machine = benchmarks("roofline").Machine(flops=29_560 * 1e6, bandwidth=1.0, vectors="")
    entries = benchmarks("report").plain(results, {1: machine})
    fused = entries["fused"]
    work = 10 * 20
    assert fused["coordinate_steps_per_s"] == pytest.approx(
        dict.fromkeys(("median", "min", "max"), 20 * work)
    )
    assert fused["ratio"]["per_second"]["median"] == pytest.approx(4)
    assert (fused["peak_bytes"], fused["bytes_per_coordinate_step"]) == (4000, 20)
    assert fused["share_of_peak"] == pytest.approx(2 / 0.05 * work / 1e6)


def test_sweeps_and_numbers_of_threads_are_reported_together(benchmarks, race, tmp_path: Path) -> None:
    plot, report = benchmarks("plot"), benchmarks("report")
    machine = benchmarks("roofline").Machine(flops=1e11, bandwidth=1e10, vectors="")
    one, _, _ = race(["fused"])
    faster = {
        entrant._replace(threads=2): replace(
            result, rounds=[each._replace(wall=each.wall / 1.5) for each in result.rounds]
        )
        for entrant, result in one.items()
    }
    swept, machines = {"S=1": one, "S=2": {**one, **faster}}, {1: machine, 2: machine}
    content = report.document(swept, machines, [0.0, 0.0, 0.0])
    fused = content["results"]["S=2"]["fused"]
    assert fused["threads"] == 1
    assert fused["other_threads"]["2"]["speed_up"]["median"] == pytest.approx(1.5)
    assert plot.draw(content, tmp_path / "new.png").stat().st_size > 10_000
    assert report.sweep_table(swept, machines).row_count == 2 + 4
    assert "fused, 2 threads: 1.50 times as fast" in report.table("S=2", swept["S=2"], machines).caption


def test_a_long_first_meta_step_counts_as_a_round(race) -> None:
    results, calls, _ = race(["peer"])
    assert [call for call in calls if "peer" in call] == ["peer 0", "peer 0.1", "peer close"]
    assert all(len(result.rounds) == 2 for result in results.values())


def test_what_would_end_after_the_deadline_or_not_fit_is_left_out(benchmarks, race, monkeypatch) -> None:
    results, calls, ticks = race(["fused"], deadline=-math.inf)
    assert calls == []
    assert ticks == sorted(results)
    assert all("are left of --minutes" in result.missing for result in results.values())
    monkeypatch.setattr(benchmarks("measure"), "available_bytes", lambda: 50_000)
    results, calls, _ = race(["fused"])
    missing = {entrant.backend: result.missing for entrant, result in results.items()}
    assert missing["fused"] is None
    assert "needs about 0 GB" in missing["eager"]
    assert not any("eager" in call for call in calls)
    entries = benchmarks("report").plain(results, {1: benchmarks("roofline").Machine(1.0, 1.0, "")})
    assert entries["eager"] == {"not_available": missing["eager"]}


def test_memory_that_idle_children_keep_is_taken_back_when_it_is_short(benchmarks, race, monkeypatch) -> None:
    def free() -> int:
        kept = "eager 0" in FakeChild.calls and "eager release" not in FakeChild.calls
        return 1000 if kept else 10**9

    monkeypatch.setattr(benchmarks("measure"), "available_bytes", free)
    results, calls, _ = race(["fused"])
    assert [call for call in calls if "release" in call] == ["eager release", "fused release"]
    assert all(result.missing is None for result in results.values())


def test_backends_that_start_from_different_meta_losses_are_no_peers(benchmarks, race) -> None:
    measure, backends = map(benchmarks, ("measure", "backends"))

    def results(**losses: float):
        return {
            backends.Entrant(name.replace("_", "-"), 1): measure.Result(
                work=1, first=measure.Repetition(1, 1.0, 1.0, loss, 0)
            )
            for name, loss in losses.items()
        }

    measure.check_agreement(results(eager=1.0, peer=1.00001, fused_bf16=1.001))
    with pytest.raises(SystemExit, match=r"eager, 1 thread: 1, peer, 1 thread: 1\.001"):
        measure.check_agreement(results(eager=1.0, peer=1.001, fused=1.0))


def test_benchmark_measures_in_one_run_and_writes_json_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "new" / "speed.json"
    arguments = "--workloads S=2 --backends eager,peer --rounds 2 --threads 1 --min_seconds 0"
    command = [sys.executable, ROOT / "scripts/benchmarks", *arguments.split(), "--json", out]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    content = json.loads(out.read_text())
    own = content["results"]["S=2"]
    assert [*own] == ["eager", "peer"]
    for entry in own.values():
        speed = entry["coordinate_steps_per_s"]
        assert 0 < speed["min"] <= speed["median"] <= speed["max"]
        assert entry["peak_bytes"] >= 0
        assert entry["meta_loss"] == pytest.approx(own["peer"]["meta_loss"], rel=1e-4)
    assert content["threads"] == 1
    assert content["machine"]["peaks"]["1"]["flops"] > 1e9
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "2 quadratics of 10 coordinates" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workloads W1,W4", r"--workloads \(W4\) must be W1, W2, W3, N=<coordinates> or S=<tasks>"),
        ("--workloads N=0", r"--workloads \(N=0\)"),
        ("--backends eager,fast", r"--backends \(fast\) must be eager, compiled, fused"),
        ("--sweep K", r"--sweep \(K\) must be N or S"),
        ("--threads 0", r"--threads \(0\) must be 1 to"),
        ("--rounds 0", r"--rounds \(0\) must be at least 1"),
    ],
)
def test_what_does_not_exist_is_refused(benchmarks, monkeypatch, capsys, arguments: str, message) -> None:
    main = load_main(monkeypatch, arguments)
    with pytest.raises(SystemExit):
        main.arguments()
    assert re.search(message, capsys.readouterr().err)


def load_main(monkeypatch: pytest.MonkeyPatch, arguments: str):
    """The main module, with a command line."""
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments.split()])
    path = ROOT / "scripts/benchmarks/__main__.py"
    spec = importlib.util.spec_from_file_location("benchmark_main", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_jax_its_rows_are_left_out_with_one_line(benchmarks, monkeypatch) -> None:
    from rich.console import Console

    arguments = "--workloads W1 --backends eager,jax-tuned --threads 1,2,1 --jax_python /no/python"
    main = load_main(monkeypatch, arguments)
    console = Console(record=True, width=200)
    (job,) = main.plan(main.arguments(), console)
    assert [(entrant.backend, entrant.threads) for entrant in job.entrants] == [("eager", 1), ("eager", 2)]
    assert console.export_text().count("\n") == 1


def test_by_default_everything_is_measured_within_the_time(benchmarks, monkeypatch) -> None:
    from rich.console import Console

    main, measure = load_main(monkeypatch, ""), benchmarks("measure")
    monkeypatch.setattr(benchmarks("backends"), "has_jax", lambda python: True)
    args = main.arguments()
    jobs = main.plan(args, Console())
    assert {job.workload[:2] for job in jobs} == {"W1", "W2", "W3", "S=", "N="}
    settings = measure.Settings(
        rounds=None, min_seconds=args.min_seconds, deadline=0, jax_python="", folder=ROOT
    )
    fits = [(e, job.workload) for job in jobs for e in job.entrants if e.bytes(job.workload) < 24e9]
    assert sum(settings.expected(*pair) for pair in fits) < 60 * args.minutes


def test_rules_whose_coordinates_hear_of_each_other_are_compared_among_themselves(benchmarks) -> None:
    backends, measure = benchmarks("backends"), benchmarks("measure")
    assert [backends.rule_of(name) for name in ("eager", "fused-true", "fused-ntm", "eager-gac")] == [
        *("lstm", "lstm", "ntm", "gac")
    ]
    assert not any(backends.rule_of(name) != "lstm" for name in backends.FULL)
    entrants = [backends.Entrant(name, 1) for name in ("eager", "eager-ntm", "fused-ntm")]

    def results(*losses):
        first = [SimpleNamespace(first=SimpleNamespace(loss=loss)) for loss in losses]
        return dict(zip(entrants, first, strict=True))

    measure.check_agreement(results(1.0, 5.0, 5.0))
    with pytest.raises(SystemExit, match="different meta-losses"):
        measure.check_agreement(results(1.0, 5.0, 5.1))
