"""Task families: distributions over optimization problems (floor 1)."""

from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors
from l2l_scale.tasks.quadratic import Quadratic

__all__ = ["Arrays", "Quadratic", "TaskFamily", "Tensors"]
