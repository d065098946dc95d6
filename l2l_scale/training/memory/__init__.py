"""How much memory a run will need, predicted before anything is allocated."""

from l2l_scale.training.memory.advice import check_memory, human, refusal
from l2l_scale.training.memory.prediction import Machine, Prediction, Usage, predict

__all__ = ["Machine", "Prediction", "Usage", "check_memory", "human", "predict", "refusal"]
