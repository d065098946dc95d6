"""Held-out tasks, tuned baselines, reports (floor 4)."""

from l2l_scale.evaluation.baselines import BASELINES, Baseline
from l2l_scale.evaluation.curves import HeldOut, loss_curves
from l2l_scale.evaluation.evaluate import evaluate, tune_baselines
from l2l_scale.evaluation.references import ReferenceMethod, reference_curves
from l2l_scale.evaluation.schema import Report, validate
from l2l_scale.evaluation.settings import Evaluation

__all__ = [
    "BASELINES",
    "Baseline",
    "Evaluation",
    "HeldOut",
    "ReferenceMethod",
    "Report",
    "evaluate",
    "loss_curves",
    "reference_curves",
    "tune_baselines",
    "validate",
]
