"""Checkpoints that are there as a whole or not at all, with what all ranks have in flight."""

from l2l_scale.training.checkpoints.callback import Checkpoints
from l2l_scale.training.checkpoints.folder import DamagedError
from l2l_scale.training.checkpoints.store import CheckpointError, CheckpointFolders

__all__ = ["CheckpointError", "CheckpointFolders", "Checkpoints", "DamagedError"]
