"""What the doctor measures is what is there, and what it finds is what is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import Regression, phi_gradient, small_lstm
from torch import nn

from l2l_scale.diagnosis import Subject
from l2l_scale.diagnosis.course import Series, flat_since, read_course
from l2l_scale.diagnosis.course_findings import of_course
from l2l_scale.diagnosis.diagnose import Run, diagnose, findings_of
from l2l_scale.diagnosis.examination import examine
from l2l_scale.diagnosis.finding import graded
from l2l_scale.diagnosis.meta_gradient import MetaGradient, meta_gradient
from l2l_scale.diagnosis.saturation import Gate, Tally
from l2l_scale.diagnosis.sensitivity import Scaled, chaos, compare, sensitivity
from l2l_scale.diagnosis.subject import follow
from l2l_scale.diagnosis.trajectory import observe
from l2l_scale.estimators import Imitation, LogLoss, TruncatedBPTT
from l2l_scale.evaluation.jobs import Runner
from l2l_scale.optimizers import (
    SGD,
    CoordinatewiseGRU,
    CoordinatewiseLSTM,
    CoordinatewiseRNN,
    Grouped,
    SharedMemory,
    SteeredMemory,
    TanhExp,
    UpdateRule,
)
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, WindowSampler
from l2l_scale.tasks import ImageClassifier, Quadratic, TaskFamily
from l2l_scale.unroll import begin


class Descent(UpdateRule):
    """θ ← θ − exp(φ) ∇."""

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate
        self.log_rate = nn.Parameter(torch.tensor(math.log(rate)))

    def init_state(self, theta):
        return torch.zeros_like(theta[..., :0])

    def forward(self, grad, theta, state):
        return -self.log_rate.exp() * grad, state


def subject(rule: UpdateRule, family: TaskFamily | None = None, **kwargs) -> Subject:
    settings = {
        "schedule": Schedule(horizon=20, window=5),
        "estimator": TruncatedBPTT(),
        "num_tasks": 4,
        "backend": "eager",
    }
    return Subject(rule=rule, family=family or Quadratic(dimension=3), **{**settings, **kwargs})


def severities(one: Subject) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for finding in findings_of(examine(one), clip=1.0):
        found.setdefault(finding.subject, set()).add(finding.severity)
    return found


def test_plain_descent_is_well():
    found = severities(subject(Descent(0.02)))
    assert "problem" not in set().union(*found.values())
    assert {"updates", "divergence", "gates", "meta-gradient", "noise", "sensitivity", "chaos"} <= set(found)


def test_a_zero_output_layer_is_dead():
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, layers=1)
    assert "problem" not in severities(subject(rule))["updates"]  # small at first, not dead
    nn.init.zeros_(rule.output.weight)
    (finding,) = [one for one in findings_of(examine(subject(rule)), None) if one.subject == "updates"]
    assert finding.severity == "problem"
    assert "dead" in finding.advice


def test_the_share_that_diverges_is_that_of_the_tasks_whose_curvature_is_too_high():
    settings = {"num_tasks": 32, "schedule": Schedule(horizon=200, window=20)}
    weights = subject(Descent(), **settings).windows()[0].task["w"].double()
    curvature = 2 * torch.linalg.matrix_norm(weights, ord=2).square()  # of ‖Wθ − y‖²
    ordered = curvature.sort().values[8:24]
    gap = int(ordered.diff().argmax())  # so that no task is too near to call
    limit = float(ordered[gap : gap + 2].mean())
    too_high, rate = curvature > limit, 2 / limit
    one = subject(Descent(rate), **settings)
    seen, _ = observe(one)
    assert torch.equal(seen.diverged_at > 0, too_high)
    losses = follow(Descent(rate), one.split_family, one.windows())
    for task in range(32):
        high = ~(losses[1:, task] <= losses[0, task] + 10 * (losses[0, task].abs() + 1))
        assert int(seen.diverged_at[task]) == (int(high.int().argmax()) + 1 if too_high[task] else 0)
    finding = next(one for one in findings_of(examine(one), None) if one.subject == "divergence")
    assert finding.severity == "problem"
    assert f"({int(too_high.sum())} of 32)" in finding.text


def test_a_huge_head_diverges_on_every_task():
    rule = small_lstm()
    nn.init.constant_(rule.output.bias, 1e6)
    found = [one for one in findings_of(examine(subject(rule)), None) if one.subject == "divergence"]
    assert [one.severity for one in found] == ["problem"]
    assert "100% of the tasks (4 of 4) diverge" in found[0].text


@pytest.mark.parametrize(("bias", "shares"), [(20.0, (0.0, 1.0)), (-20.0, (1.0, 0.0)), (0.0, (0.0, 0.0))])
def test_saturation_of_lstm_gates_is_measured(bias, shares):
    rule = CoordinatewiseLSTM(hidden_size=4, layers=2)
    for cell in rule.network.cells:
        for weight in (cell.weight_input, cell.weight_hidden, cell.bias):
            nn.init.zeros_(weight)
        nn.init.constant_(cell.bias[:8], bias)  # input and forget gates
        nn.init.constant_(cell.bias[8:12], 1.0)
        nn.init.constant_(cell.bias[12:], 1.0)
    _, inside = observe(subject(rule))
    for layer in (1, 2):
        gates = {gate.name: (gate.low, gate.high) for gate in inside.gates if gate.layer == layer}
        assert gates == {"input": shares, "forget": shares, "output": (0.0, 0.0), "candidate": (0.0, 0.0)}
    expected = {"problem"} if bias else {"ok"}
    assert severities(subject(rule))["gates"] == expected


def test_saturation_of_gru_and_plain_units_is_measured():
    rule = CoordinatewiseGRU(hidden_size=4, layers=1)
    (cell,) = rule.cells
    for weight in cell.parameters():
        nn.init.zeros_(weight)
    nn.init.constant_(cell.bias[:4], 20.0)
    nn.init.constant_(cell.bias[4:8], -20.0)
    _, inside = observe(subject(rule))
    assert inside.gates == (
        Gate(1, "reset", 0.0, 1.0),
        Gate(1, "update", 1.0, 0.0),
        Gate(1, "candidate", 1.0, 0.0),
    )
    assert inside.still_units == {"1": 1.0}
    plain = CoordinatewiseRNN(hidden_size=4, layers=1)
    for weight in plain.cells.parameters():
        nn.init.zeros_(weight)
    plain.cells[0].bias.data[:] = torch.tensor([20.0, -20.0, 1e-3, 0.5])
    _, inside = observe(subject(plain))
    assert inside.gates == (Gate(1, "unit", 0.25, 0.5),)


def test_saturation_of_the_head_is_measured_and_the_rule_is_left_as_it_was():
    rule = CoordinatewiseLSTM(hidden_size=4, layers=1, head=TanhExp())
    nn.init.zeros_(rule.output.weight)
    for bias, share in ((1.0, 0.0), (3.0, 1.0)):
        nn.init.constant_(rule.output.bias[:1], bias)
        _, inside = observe(subject(rule))
        assert inside.head == share
    assert not any(module._forward_hooks for module in rule.modules())
    assert observe(subject(Descent()))[1].head is None


def test_sizes_and_directions_of_plain_descent():
    seen, inside = observe(subject(Descent(0.02)))
    torch.testing.assert_close(seen.update / seen.gradient, torch.full((20, 4), 0.02).double())
    torch.testing.assert_close(seen.cosine, torch.ones(20, 4).double())
    start = subject(Descent()).windows()[0].theta0.double().square().mean(-1).sqrt()
    torch.testing.assert_close(seen.theta[0], start, rtol=1e-6, atol=0)
    assert inside.gates == ()


@pytest.mark.parametrize("family", [Quadratic(dimension=3), Regression()])
def test_meta_gradients_by_phase_are_those_of_the_estimator(double, family):
    estimator = TruncatedBPTT(second_order=True, meta_loss=LogLoss())
    rule = small_lstm().double()
    one = subject(rule, family, estimator=estimator, split=Split.TRAIN)
    found = meta_gradient(one)
    sampler = WindowSampler(family, Schedule(horizon=20, window=5, staggered=False), 0, Split.TRAIN)
    carry = None
    for place in range(4):
        batch = sampler(place, range(4)).to_batch(torch.float64)
        carry = begin(rule, batch, carry)
        estimate = estimator(rule, family, carry, batch)
        by_hand, carry = phi_gradient(rule, estimate.surrogate), estimate.rollout.carry
        torch.testing.assert_close(found.gradients[place].mean(0), by_hand, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.mean_norms[place], by_hand.norm(), rtol=1e-9, atol=0)
    assert found.inner_steps == (0, 5, 10, 15)


def test_signal_to_noise_of_gradients_with_known_spread():
    rng = np.random.default_rng(0)
    signal, deviation = 0.3 * np.ones(50), 0.7
    noisy = signal + deviation * rng.standard_normal((4, 200, 50))
    found = MetaGradient((0, 5, 10, 15), torch.from_numpy(noisy), slots_per_meta_step=16)
    expected = 0.3 / deviation * math.sqrt(16)
    assert found.signal_to_noise == pytest.approx(expected, rel=0.03)
    assert found.resolution == pytest.approx(math.sqrt(16 / 800), rel=1e-6)
    nothing = MetaGradient((0,), torch.from_numpy(noisy[:1] - signal), slots_per_meta_step=16)
    assert nothing.signal_to_noise < 2 * nothing.resolution
    assert math.isnan(MetaGradient((0,), torch.ones(1, 1, 3).double(), 16).signal_to_noise)


def test_a_factor_of_one_changes_nothing_and_others_do_what_they_say():
    rule = small_lstm()
    one = subject(rule)
    before = follow(rule, one.split_family, one.windows())
    same = follow(Scaled(rule, update=1.0, gradient=1.0), one.split_family, one.windows())
    assert torch.equal(before, same)
    assert compare("update", 1.0, before, same)[2:] == (1.0, 0.0)
    one = subject(Descent(0.02))
    doubled = follow(Scaled(Descent(0.01), update=2.0), one.split_family, one.windows())
    torch.testing.assert_close(doubled, follow(Descent(0.02), one.split_family, one.windows()))
    changes = {(change.what, change.factor): change for change in sensitivity(one)}
    before = follow(Descent(0.02), one.split_family, one.windows())[-1].double()
    after = follow(Descent(0.04), one.split_family, one.windows())[-1].double()
    ratio = np.median((after / before).detach().numpy())
    assert changes["update", 2.0].ratio == pytest.approx(ratio, rel=1e-4)
    assert changes["gradient", 10.0].diverged > 0


def test_perturbations_grow_as_the_curvature_says():
    one = subject(Descent(0.02), num_tasks=3)
    weights = one.windows(dtype=torch.float64)[0].task["w"]
    growth = chaos(one).growth
    assert growth.shape == (20, 3)
    eye = torch.eye(3, dtype=torch.float64)
    largest = torch.linalg.matrix_norm(eye - 0.04 * weights.mT @ weights, ord=2)
    assert (growth[1] <= largest + 1e-6).all()
    assert torch.equal(growth[0], torch.ones(3).double()) or (growth[0] - 1).abs().max() < 1e-6
    wild = chaos(subject(Descent(0.5), num_tasks=3, schedule=Schedule(horizon=40, window=5)))
    assert wild.exponent > 0.1
    assert severities(subject(Descent(0.5)))["chaos"] <= {"look", "problem"}


@pytest.mark.parametrize(
    "rule",
    [
        SharedMemory(hidden_size=4, layers=1, head=TanhExp()),
        SteeredMemory(hidden_size=4),
        CoordinatewiseGRU(hidden_size=4),
        SGD(learning_rate=0.01),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_every_rule_can_be_looked_at(rule):
    diagnosis = diagnose({"": subject(rule, num_tasks=2)}, Run(course={}))
    left_out = diagnosis.examinations[""].left_out
    assert left_out == ({"meta-gradient": "the rule has no φ"} if isinstance(rule, SGD) else {})
    assert not any("SGD" in finding.text for finding in diagnosis.findings)


GROUPED = Grouped(
    rules={"linear": CoordinatewiseLSTM(hidden_size=4, layers=1, head=TanhExp()), "bias": Descent()},
    groups={"linear": ["linear"], "bias": ["bias"]},
)
DIGITS = ImageClassifier(dataset="digits", hidden=(4,), batch_size=8)


def test_of_a_grouped_rule_everything_is_measured_part_by_part():
    one = examine(subject(GROUPED, DIGITS, num_tasks=2))
    assert one.left_out == {}
    assert bool(one.meta_gradient.norms.isfinite().all())
    assert {gate.place for gate in one.insides.gates} == {"linear 1"}
    assert one.insides.still_units.keys() == {"linear 1"}
    assert one.insides.head is not None


def test_processes_change_nothing():
    subjects = {"a": subject(GROUPED, DIGITS, num_tasks=2), "b": subject(SGD(learning_rate=0.01))}
    here = diagnose(subjects, Run(course={}))
    there = diagnose(subjects, Run(course={}), Runner(num_workers=2))
    assert here.findings == there.findings
    for name in subjects:
        assert torch.equal(
            here.examinations[name].trajectory.losses, there.examinations[name].trajectory.losses
        )


def test_of_much_work_fewer_steps_are_watched_and_the_start_is_followed(monkeypatch):
    rule, seen = small_lstm(), []
    monkeypatch.setattr(Tally, "add", lambda self, values: seen.append(values))
    observe(subject(rule))
    assert len(seen) == 20 * 2 * 4  # inner steps, layers, gates
    seen.clear()
    monkeypatch.setattr("l2l_scale.diagnosis.trajectory.WATCHED", subject(rule).work // 3)
    observe(subject(rule))
    assert len(seen) == 7 * 2 * 4  # 0, 3, …, 18
    whole = chaos(subject(rule)).growth
    monkeypatch.setattr("l2l_scale.diagnosis.sensitivity.FOLLOWED", subject(rule).work // 2)
    assert torch.equal(chaos(subject(rule)).growth, whole[:10])
    monkeypatch.setattr("l2l_scale.diagnosis.sensitivity.FOLLOWED", 1)
    assert torch.equal(chaos(subject(rule)).growth, whole[:5])  # a window is the least


def test_an_estimator_that_does_not_fit_is_left_out():
    one = examine(subject(Descent(0.02), estimator=Imitation()))
    assert "teacher" in one.left_out["meta-gradient"]


def test_phi_that_is_not_finite_is_a_problem():
    rule = Descent()
    rule.log_rate.data.fill_(math.nan)
    diagnosis = diagnose({"": subject(rule)}, Run(course={}))
    assert {"φ", "divergence", "meta-gradient"} <= {
        f.subject for f in diagnosis.findings if f.severity == "problem"
    }


def test_the_course_of_a_resumed_run_is_read_once(tmp_path):
    (tmp_path / "metrics-1.csv").write_text("step,valid/sum,train/loss\n10,5,\n20,4,1\n30,nan,1\n")
    (tmp_path / "metrics-2.csv").write_text("step,valid/sum\n20,3\n30,2.5\n")
    (tmp_path / "metrics.csv").write_text("step,valid/sum\n40,2\n")
    course = read_course(tmp_path)
    assert course["valid/sum"].steps.tolist() == [10, 20, 30, 40]
    assert course["valid/sum"].values.tolist() == [5, 3, 2.5, 2]
    assert "train/loss" not in course
    (tmp_path / "metrics.csv").write_text("stp,valid/sum\n40,2\n")
    with pytest.raises(ValueError, match="is damaged"):
        read_course(tmp_path)
    assert read_course(tmp_path / "nowhere") == {}


def series(*values: float) -> Series:
    return Series(np.arange(1, len(values) + 1) * 10, np.array(values, dtype=float))


def test_a_course_is_judged():
    falling = {"valid/sum": series(10, 8, 6, 4, 3, 2, 1.5, 1)}
    flat = {"valid/sum": series(10, 2, 1, 1.1, 1, 0.99, 1.2, 1)}
    rising = {"valid/sum": series(1, 2, 3, 4, 5, 6, 7, 8)}
    assert flat_since(flat["valid/sum"], 0.02) == 30
    assert flat_since(rising["valid/sum"], 0.02) is None
    for course, mode, severity in (
        (falling, "min", "ok"),
        (flat, "min", "look"),
        (rising, "min", "problem"),
        (rising, "max", "ok"),
    ):
        (finding,) = of_course(course, "valid/sum", None, mode)
        assert finding.severity == severity
    others = {
        "train/num_skipped": series(0, 0, 1, 2, 0, 4, 4, 4),  # resumed in the middle
        "train/diverged/ackley": series(0, 0, 0, 0, 0, 0, 0.5, 0.4),
        "train/grad_norm": series(1, 1, 1, 1, 1, 1, 90, 80),
    }
    found = {one.subject: one for one in of_course(others, None, 1.0)}
    assert found["skipped"].text.startswith("6 meta-steps (7.5%)")
    assert found["skipped"].severity == "problem"
    assert (found["training"].severity, found["training"].family) == ("problem", "ackley")
    assert found["clipping"].severity == "ok"  # meta-step 60 is part of the last quarter
    assert [graded(value, 1, 2) for value in (0, 1, 2, math.nan)] == ["ok", "look", "problem", "problem"]
