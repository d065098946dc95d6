"""Imitation: the errors of a rule's updates along a teacher's way, and their gradient."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Regression, phi_gradient, small_lstm

from l2l_scale.estimators import Imitation, TruncatedBPTT
from l2l_scale.optimizers import SGD, Adam, Grouped
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule, Teacher, WindowSampler
from l2l_scale.tasks import ImageClassifier, Quadratic, TaskFamily
from l2l_scale.training import MetaTraining, WindowData
from l2l_scale.unroll import WindowBatch, begin

SCHEDULE = Schedule(horizon=6, window=3)


def windows(family: TaskFamily, teacher: Teacher, count: int = 2) -> list[WindowBatch]:
    sampler = WindowSampler(family, SCHEDULE, 0, Split.TRAIN, teacher)
    return [sampler(index, range(4)).to_batch() for index in range(count)]


@pytest.mark.parametrize("family", [Quadratic(dimension=4), Regression()], ids=["quadratic", "minibatches"])
def test_a_rule_that_is_the_teacher_imitates_it_perfectly(family: TaskFamily) -> None:
    rule = SGD(learning_rate=0.01)
    carry = None
    for batch in windows(family, Teacher(rule, iterates=True), 4):
        carry = begin(rule, batch, carry)
        estimate = Imitation()(rule, family, carry, batch)
        assert float(estimate.surrogate) <= 1e-6  # θ + update rounds in float32
        assert torch.equal(estimate.rollout.losses, batch.teacher["losses"])
        carry = estimate.rollout.carry
        assert torch.equal(carry.theta, batch.teacher["theta"][-1])


def test_a_rule_without_updates_has_log_two_per_inner_step() -> None:
    family, rule = Quadratic(dimension=4), SGD(learning_rate=0.0)
    (batch,) = windows(family, Teacher(SGD(learning_rate=0.01), iterates=True), 1)
    estimate = Imitation()(rule, family, begin(rule, batch, None), batch)
    assert float(estimate.surrogate) == pytest.approx(3 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("factor", [0.0, 3.0, 1000.0])
def test_it_is_the_mean_over_groups_of_the_log_of_one_plus_the_relative_error(factor: float) -> None:
    family, teacher = ImageClassifier(dataset="digits", hidden=(4,), batch_size=8), SGD(learning_rate=0.01)
    apart = {"linear": SGD(learning_rate=0.01), "bias": SGD(learning_rate=0.01 * factor)}
    rule = Grouped(groups={"linear": ["linear"], "bias": ["bias"]}, rules=apart).for_spec(family.spec)
    (batch,) = windows(family, Teacher(teacher, iterates=True), 1)
    value = float(Imitation()(rule, family, begin(rule, batch, None), batch).surrogate)
    assert value == pytest.approx(
        3 * math.log(1 + (factor - 1) ** 2) / 2, rel=1e-3
    )  # two groups, three steps


def test_the_gradient_is_that_of_finite_differences(double: torch.dtype) -> None:
    family, rule = Quadratic(dimension=3), small_lstm()
    sampler = WindowSampler(family, SCHEDULE, 0, Split.TRAIN, Teacher(Adam(learning_rate=0.1), iterates=True))
    batch = sampler(1, range(4)).to_batch(torch.float64)

    def value() -> torch.Tensor:
        return Imitation()(rule, family, begin(rule, batch, None), batch).surrogate

    gradient, step, position = phi_gradient(rule, value()), 1e-6, 0
    for parameter in rule.parameters():
        flat = parameter.data.view(-1)
        for entry in (0, len(flat) - 1):
            before, values = float(flat[entry]), []
            for sign in (1, -1):
                flat[entry] = before + sign * step
                values.append(float(value().detach()))
            flat[entry] = before
            slope = (values[0] - values[1]) / (2 * step)
            assert slope == pytest.approx(float(gradient[position + entry]), rel=1e-5, abs=1e-8)
        position += len(flat)


def test_slots_in_which_the_teacher_diverged_teach_nothing() -> None:
    family, rule = Quadratic(dimension=4), small_lstm().float()
    (batch,) = windows(family, Teacher(SGD(learning_rate=0.01), iterates=True), 1)
    alone = Imitation()(rule, family, begin(rule, batch, None), batch)
    batch.teacher["theta"][2, 1] = torch.inf
    estimate = Imitation()(rule, family, begin(rule, batch, None), batch)
    assert estimate.rollout.carry.diverged.tolist() == [False, True, False, False]
    assert phi_gradient(rule, estimate.surrogate).isfinite().all()
    assert float(estimate.surrogate.detach()) < float(alone.surrogate.detach())


def test_what_it_needs_is_asked_for_by_name() -> None:
    for gives in (frozenset[str](), frozenset({"losses"})):
        with pytest.raises(ValueError, match=r"data\.teacher_iterates=true"):
            Imitation().check_teacher(gives)
    Imitation().check_teacher(Teacher(SGD(), iterates=True).gives)
    TruncatedBPTT().check_teacher(frozenset())
    with pytest.raises(ValueError, match="epsilon"):
        Imitation(epsilon=0.0)


def test_a_rule_learns_what_the_teacher_does() -> None:
    family = Quadratic(dimension=4)
    torch.manual_seed(0)
    module = MetaTraining(small_lstm().float(), family, Imitation(), learning_rate=0.02, final_fraction=1.0)
    data = WindowData(family, 20, 10, slots=8, teacher=Adam(learning_rate=0.05), teacher_iterates=True)
    adam, values = torch.optim.Adam(module.parameters(), 0.02), []
    batches = data.train_dataloader()
    for index, batch in zip(range(60), batches, strict=False):
        loss = module.training_step(batch, index)["loss"]
        values.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert sum(values[-10:]) < 0.5 * sum(values[:10])
