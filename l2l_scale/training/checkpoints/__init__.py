"""Checkpoints that are whole or not there, hold the tasks in flight of all ranks, and never execute anything."""

from l2l_scale.training.checkpoints.callback import Checkpoints
from l2l_scale.training.checkpoints.folder import DamagedError
from l2l_scale.training.checkpoints.store import CheckpointError, CheckpointFolders

__all__ = ["CheckpointError", "CheckpointFolders", "Checkpoints", "DamagedError"]
