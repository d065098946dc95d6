"""bf16-mixed: the tasks compute in 16 bits, all else as ever; other precisions are refused."""

from dataclasses import dataclass

import pytest
import torch
from test_meta_training import make_trainer

from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.tasks import MixedPrecision, Quadratic
from l2l_scale.tasks.wrapped import WrappedFamily
from l2l_scale.training import MetaTraining, WindowData
from l2l_scale.training.precision import check_precision
from l2l_scale.tree import tree_leaves

FAMILY = Quadratic(dimension=4)
SEEN = {"rule": [], "tasks": []}
"""Whether autocast was on, at every call."""


class RecordingRule(CoordinatewiseLSTM):
    """An LSTM that notices autocast."""

    def forward(self, grad, theta, state):
        SEEN["rule"].append(torch.is_autocast_enabled("cpu"))
        assert grad.dtype is theta.dtype is torch.float32
        return super().forward(grad, theta, state)


@dataclass(frozen=True)
class RecordingFamily(WrappedFamily):
    """Tasks that notice autocast."""

    def losses_and_gradients(self, theta, task, data, create_graph):
        SEEN["tasks"].append(torch.is_autocast_enabled("cpu"))
        return self.family.losses_and_gradients(theta, task, data, create_graph)


def train(folder, precision, family=FAMILY, rule=CoordinatewiseLSTM, max_steps=6):
    torch.manual_seed(0)
    module = MetaTraining(rule(hidden_size=4, layers=1), family, backend="eager")
    trainer = make_trainer(folder, max_steps, precision=precision)
    data = WindowData(family, horizon=20, window=5, slots=6, windows_per_epoch=3, valid_tasks=8)
    trainer.fit(module, datamodule=data)
    return module, trainer


def test_everything_but_the_tasks_stays_in_single_precision(tmp_path):
    for seen in SEEN.values():
        seen.clear()
    module, trainer = train(tmp_path, "bf16-mixed", RecordingFamily(family=FAMILY), RecordingRule)
    assert len(SEEN["rule"]) == (6 + 2 * 4) * 5  # windows of training, and of two validations
    assert not any(SEEN["rule"])
    assert len(SEEN["tasks"]) == (6 + 2 * 4) * 6
    assert all(SEEN["tasks"])
    floats = [leaf for leaf in tree_leaves(module.carries) if leaf.is_floating_point()]
    adam = [leaf for state in trainer.optimizers[0].state.values() for leaf in state.values()]
    assert {leaf.dtype for leaf in [*floats, *module.parameters(), *adam]} == {torch.float32}


def test_losses_are_near_those_of_single_precision_and_not_the_same(tmp_path):
    mixed, single = (train(tmp_path, name)[1].callback_metrics for name in ("bf16-mixed", "32-true"))
    for name in ("valid/sum", "valid/final"):
        assert mixed[name] != single[name]
        assert float(mixed[name]) == pytest.approx(float(single[name]), rel=0.05)


def test_single_precision_knows_no_autocast(tmp_path):
    for seen in SEEN.values():
        seen.clear()
    train(tmp_path, "32-true", RecordingFamily(family=FAMILY), RecordingRule)
    assert len(SEEN["tasks"]) > 0
    assert not any(SEEN["rule"] + SEEN["tasks"])


def test_setting_up_twice_wraps_once(tmp_path):
    module, _ = train(tmp_path, "bf16-mixed", max_steps=3)
    module.setup("fit")
    for families in (module.families, module.valid_families):
        assert isinstance(families[""], MixedPrecision)
        assert not isinstance(families[""].family, MixedPrecision)


@pytest.mark.parametrize(
    "precision", ["16-mixed", "16-true", "bf16-true", 16, "16", "transformer-engine", "half", 8]
)
def test_precisions_that_lose_what_is_learned_from_are_refused(precision):
    message = (
        rf"trainer.precision \({precision}\) must be one of 32-true, 64-true, bf16-mixed: inner gradients"
    )
    with pytest.raises(ValueError, match=message):
        check_precision(precision)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_they_are_refused_before_anything_is_computed(tmp_path, precision):
    with pytest.raises(ValueError, match=rf"trainer.precision \({precision}\)"):
        train(tmp_path, precision)


@pytest.mark.parametrize("precision", [32, 64, "32", "64", "bf16", None, "32-true", "64-true", "bf16-mixed"])
def test_precisions_that_work_pass_in_every_spelling_of_lightning(precision):
    check_precision(precision)


def test_double_precision_is_double_throughout(tmp_path):
    module, _ = train(tmp_path, "64-true")
    floats = [leaf for leaf in tree_leaves(module.carries) if leaf.is_floating_point()]
    assert {leaf.dtype for leaf in [*floats, *module.parameters()]} == {torch.float64}
