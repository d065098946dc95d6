"""Use a learned rule in any training loop: needs torch and safetensors, nothing of the training floors."""

from l2l_scale.deploy.description import build_rule, classes_of, describe_rule
from l2l_scale.deploy.files import load_rule, read_header, save_rule, take_over
from l2l_scale.deploy.guard import Guard
from l2l_scale.deploy.hub import pull_rule, push_rule
from l2l_scale.deploy.kinds import parameter_groups
from l2l_scale.deploy.pretrained import pretrained_folder, pretrained_names
from l2l_scale.deploy.torch_optim import LearnedOptimizer

__all__ = [
    "Guard",
    "LearnedOptimizer",
    "build_rule",
    "classes_of",
    "describe_rule",
    "load_rule",
    "parameter_groups",
    "pretrained_folder",
    "pretrained_names",
    "pull_rule",
    "push_rule",
    "read_header",
    "save_rule",
    "take_over",
]
