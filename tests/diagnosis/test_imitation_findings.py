"""How near a teacher an imitator comes is measured, by parameter group and phase, and said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from l2l_scale.diagnosis import Finding, Subject
from l2l_scale.diagnosis.diagnose import findings_of
from l2l_scale.diagnosis.examination import examine
from l2l_scale.diagnosis.imitation import imitation
from l2l_scale.diagnosis.subject import follow
from l2l_scale.estimators import Imitation, TruncatedBPTT
from l2l_scale.optimizers import SGD, UpdateRule
from l2l_scale.sampling import Schedule, Teacher
from l2l_scale.tasks import ImageClassifier, Quadratic

RATE = 0.02


class Forgetful(UpdateRule):
    """θ ← θ − φ ∇, times a factor from some inner step on."""

    def __init__(self, factor: float, since: int = 0) -> None:
        super().__init__()
        self.factor, self.since = factor, since
        self.rate = nn.Parameter(torch.tensor(RATE))

    def init_state(self, theta):
        return torch.zeros_like(theta[..., :1])

    def forward(self, grad, theta, state):
        factor = torch.where(state >= self.since, self.factor, 1.0)
        return -self.rate * factor * grad, state + 1


def subject(rule: UpdateRule, teacher_rate: float = RATE, iterates: bool = True, **kwargs) -> Subject:
    settings = {
        "family": Quadratic(dimension=3),
        "schedule": Schedule(horizon=20, window=5),
        "estimator": Imitation(),
        "num_tasks": 3,
        "slots_per_meta_step": 2,
        "backend": "eager",
        "teacher": Teacher(SGD(learning_rate=teacher_rate), iterates=iterates),
    }
    return Subject(rule=rule, **{**settings, **kwargs})


def found(one: Subject) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings_of(examine(one), clip=1.0)}


@pytest.mark.parametrize("factor", [1.0, 0.0, 3.0])
def test_errors_are_those_of_the_step_size_and_losses_the_teachers(factor):
    family = ImageClassifier(dataset="digits", hidden=(4,), batch_size=8)
    for one in (subject(Forgetful(factor)), subject(Forgetful(factor), family=family)):
        seen = imitation(one)
        assert seen.groups == tuple(one.family.spec.groups)
        expected = torch.full((20, len(seen.groups), 3), (factor - 1) ** 2).double()
        torch.testing.assert_close(seen.errors, expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(seen.medians, expected[..., 0], rtol=1e-3, atol=1e-6)
        assert seen.by_phase.shape == (10, len(seen.groups))
        alone = follow(Forgetful(1.0), one.split_family, one.windows())
        torch.testing.assert_close(seen.losses, alone[1:].detach().double(), rtol=1e-4, atol=1e-6)


def test_a_perfect_imitator_is_well():
    said = found(subject(Forgetful(1.0)))
    assert said["imitation"].severity == said["own way"].severity == "ok"
    assert said["own way"].text.startswith("alone the rule ends at 1 × the teacher's loss")


def test_a_forgotten_phase_is_named_with_the_stagger_that_shows_all_phases():
    said = found(subject(Forgetful(3.0, since=18)))
    assert said["imitation"].severity == "problem"
    assert "at most 4 in inner steps 18–19" in said["imitation"].text
    assert "data.staggered 2;" in said["imitation"].advice  # four windows, two slots
    spread = Schedule(horizon=20, window=5, staggered=2)
    again = found(subject(Forgetful(3.0, since=18), schedule=spread))
    assert "data.staggered" not in again["imitation"].advice
    assert found(subject(Forgetful(0.4, since=18)))["imitation"].severity == "look"  # (1 − 0.4)²


def test_a_rule_that_ends_elsewhere_is_told():
    said = found(subject(Forgetful(0.1)))["own way"]
    assert said.severity == "look"
    assert "model.start_from" in said.advice


def test_a_teacher_that_diverges_is_a_problem():
    said = found(subject(Forgetful(1.0), teacher_rate=1e30))
    assert said["imitation"].severity == "problem"
    assert "the teacher diverges" in said["imitation"].text
    assert "own way" not in said


def test_without_a_teachers_points_it_is_left_out_and_other_estimators_do_not_imitate():
    one = examine(subject(Forgetful(1.0), iterates=False))
    assert one.imitated is None
    assert "teacher_iterates" in one.left_out["meta-gradient"]
    other = examine(subject(Forgetful(1.0), estimator=TruncatedBPTT()))
    assert other.imitated is None
    assert other.left_out == {}
    assert not math.isnan(other.meta_gradient.signal_to_noise)
