"""Task families: distributions over optimization problems (floor 1)."""

from l2l_scale.tasks.architectures import random_networks
from l2l_scale.tasks.augmentation import Augmentation
from l2l_scale.tasks.base import Arrays, TaskFamily, Tensors
from l2l_scale.tasks.compiled import CompiledFamily
from l2l_scale.tasks.convolution import ConvClassifier
from l2l_scale.tasks.extractor import Extractor
from l2l_scale.tasks.image import ImageClassifier
from l2l_scale.tasks.mixture import Member, Mixture
from l2l_scale.tasks.module import ModuleTask
from l2l_scale.tasks.neural_art import NeuralArt
from l2l_scale.tasks.precision import MixedPrecision
from l2l_scale.tasks.quadratic import Quadratic
from l2l_scale.tasks.scaling import RandomScaling
from l2l_scale.tasks.test_functions import TestFunction

__all__ = [
    "Arrays",
    "Augmentation",
    "CompiledFamily",
    "ConvClassifier",
    "Extractor",
    "ImageClassifier",
    "Member",
    "MixedPrecision",
    "Mixture",
    "ModuleTask",
    "NeuralArt",
    "Quadratic",
    "RandomScaling",
    "TaskFamily",
    "Tensors",
    "TestFunction",
    "random_networks",
]
