"""Findings about an imitator: errors by parameter group and phase, and where it ends alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from l2l_scale.diagnosis.finding import Finding, graded
from l2l_scale.diagnosis.imitation import Imitated
from l2l_scale.diagnosis.sensitivity import compare
from l2l_scale.diagnosis.thresholds import ASTRAY_LOOK, IMITATION_LOOK, IMITATION_PROBLEM


def of_imitation(seen: Imitated, losses: Tensor) -> Iterator[Finding]:
    """How near the teacher the rule comes.

    Args:
        seen: the comparison.
        losses: of the rule alone on the same tasks, f(θ_0) … f(θ_T), (T + 1, S).
    """
    if not bool(seen.losses[-1].isfinite().any()):
        advice = "another data.teacher: l2l-scale tune finds its hyper-parameters"
        yield Finding("problem", "imitation", "the teacher diverges on every task", advice)
        return
    phases, parts = seen.by_phase, torch.arange(len(seen.errors)).tensor_split(len(seen.by_phase))
    shown = []
    for group, errors in zip(seen.groups, phases.unbind(1), strict=True):
        steps = parts[int(errors.argmax())]
        where = f"{float(errors.max()):.2g} in inner steps {int(steps[0])}–{int(steps[-1])}"
        shown.append(f"{group} {float(errors.median()):.2g}, at most {where}")
    text = f"error of its updates by phase (0: the teacher's; 1: none): {'; '.join(shown)}"
    severity = graded(float(phases.max()), IMITATION_LOOK, IMITATION_PROBLEM)
    yield Finding(severity, "imitation", text, "" if severity == "ok" else _advice(seen))
    yield _of_own_way(seen, losses)


def _advice(seen: Imitated) -> str:
    longer = (
        "more meta-steps, a higher model.learning_rate, or features that tell the phases apart (InnerStep)"
    )
    if seen.spread is None:
        return longer
    spread = f"slots that see one phase at a time make φ forget the others: data.staggered {seen.spread}"
    return f"{spread}; {longer}"


def _of_own_way(seen: Imitated, losses: Tensor) -> Finding:
    teacher = torch.cat((losses[:1].double(), seen.losses))
    ratio = compare("rule", 1.0, teacher, losses.double()).ratio
    text = f"alone the rule ends at {ratio:.3g} × the teacher's loss (median over tasks)"
    if ratio <= ASTRAY_LOOK:
        return Finding("ok", "own way", text)
    advice = (
        "off the teacher's way errors add up: bring them down first; then truncated backpropagation may go "
        "on from here (model.start_from)"
    )
    return Finding("look", "own way", text, advice)
