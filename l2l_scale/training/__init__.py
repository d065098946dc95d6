"""The Lightning side: module, data and callbacks (floor 5; the only floor that imports lightning)."""

from l2l_scale.training.checkpoints import CheckpointError, Checkpoints, DamagedError
from l2l_scale.training.data import WindowData
from l2l_scale.training.metrics import MetaStepBar, TrajectoryMetrics
from l2l_scale.training.module import DivergedError, MetaTraining
from l2l_scale.training.pace import PaceReport
from l2l_scale.training.preemption import Reason, Stopped
from l2l_scale.training.trainer import Trainer
from l2l_scale.training.validation_curves import ValidationCurves
from l2l_scale.training.wandb_run import WandbRun

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "DamagedError",
    "DivergedError",
    "MetaStepBar",
    "MetaTraining",
    "PaceReport",
    "Reason",
    "Stopped",
    "Trainer",
    "TrajectoryMetrics",
    "ValidationCurves",
    "WandbRun",
    "WindowData",
]
