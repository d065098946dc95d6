"""Training with horizons that change, and with a teacher: through Lightning, as in a run."""

import pytest
import torch
from test_meta_training import FAMILY, Stop, fit, make_data

from l2l_scale.estimators import LastLoss, LogLoss, NormalizedLoss, RelativeLoss, SumLoss, TruncatedBPTT
from l2l_scale.evaluation import HeldOut, loss_curves
from l2l_scale.optimizers import SGD, CoordinatewiseLSTM
from l2l_scale.rng import Split
from l2l_scale.sampling import RandomHorizons, StagedHorizons
from l2l_scale.training import MetaTraining
from l2l_scale.tree import tree_leaves

CURRICULA = [StagedHorizons(stages=(10, 20), starts=(0, 6)), RandomHorizons(low=5, high=30, strata=3)]


def module_with(meta_loss):
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, layers=1)
    return MetaTraining(rule, FAMILY, TruncatedBPTT(meta_loss=meta_loss))


@pytest.mark.parametrize("curriculum", CURRICULA, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("after", [3, 8])
def test_resumed_run_with_a_curriculum_equals_undisturbed_run_bit_for_bit(tmp_path, curriculum, after):
    def data():
        return make_data(curriculum=curriculum)

    straight, _ = fit(tmp_path, 12, data=data())
    fit(tmp_path, 12, data=data(), callbacks=[Stop(after, tmp_path / "stop.ckpt")])
    resumed, _ = fit(tmp_path, 12, data=data(), ckpt_path=tmp_path / "stop.ckpt")
    ours, theirs = ([*m.rule.parameters(), *tree_leaves(m.carries)] for m in (straight, resumed))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_curriculum_changes_training_and_leaves_validation_at_the_horizon(tmp_path):
    module, trainer = fit(tmp_path, 8, data=make_data(curriculum=CURRICULA[0]))
    plain, _ = fit(tmp_path, 8)
    assert not torch.equal(next(module.rule.parameters()), next(plain.rule.parameters()))
    held_out = HeldOut(family=FAMILY, seed=0, split=Split.VALID, num_tasks=8, inner_steps=20, window=5)
    assert torch.equal(trainer.callback_metrics["valid/final"], loss_curves(module.rule, held_out)[-1].mean())


def test_last_loss_counts_at_the_end_of_each_trajectory_whatever_its_horizon():
    loss = LastLoss()
    counted = 0
    data = make_data(curriculum=CURRICULA[1], windows_per_epoch=20)
    for ((_, _, window),) in data.train_dataloader():
        losses = torch.ones(5, 6)
        ends = window.inner_step + 5 == window.horizon
        assert torch.equal(loss(losses, losses[0], window), ends.float())
        counted += int(ends.sum())
    assert counted > 20


def test_last_loss_trains_with_a_curriculum(tmp_path):
    module, _ = fit(tmp_path, 8, module_with(LastLoss()), data=make_data(curriculum=CURRICULA[1]))
    assert not torch.equal(next(module.rule.parameters()), next(module_with(LastLoss()).rule.parameters()))


@pytest.mark.parametrize("meta_loss", [SumLoss, LogLoss, NormalizedLoss])
def test_weights_are_refused_with_a_curriculum_of_several_horizons(tmp_path, meta_loss):
    with pytest.raises(ValueError, match=r"weights \(20 numbers\) .* horizon \(10\)"):
        fit(tmp_path, 4, module_with(meta_loss([1.0] * 20)), data=make_data(curriculum=CURRICULA[0]))


def test_checkpoint_of_another_curriculum_is_refused(tmp_path):
    fit(tmp_path, 4, data=make_data(curriculum=CURRICULA[0]), callbacks=[Stop(3, tmp_path / "stop.ckpt")])
    with pytest.raises(ValueError, match=r"data\.curriculum is .*StagedHorizons.* there and .*None.* here"):
        fit(tmp_path, 4, ckpt_path=tmp_path / "stop.ckpt")


@pytest.mark.parametrize(
    ("teacher", "difference"),
    [
        (None, r"data\.teacher is .* there and None here"),
        (SGD(0.02), r"learning_rate is 0\.01 there and 0\.02"),
    ],
)
def test_checkpoint_with_another_teacher_is_refused(tmp_path, teacher, difference):
    taught = make_data(teacher=SGD(0.01))
    fit(tmp_path, 4, module_with(RelativeLoss()), data=taught, callbacks=[Stop(3, tmp_path / "stop.ckpt")])
    with pytest.raises(ValueError, match=difference):
        fit(tmp_path, 4, data=make_data(teacher=teacher), ckpt_path=tmp_path / "stop.ckpt")


def test_relative_loss_without_a_teacher_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.teacher"):
        fit(tmp_path, 4, module_with(RelativeLoss()))


def test_relative_loss_trains_with_a_teacher_and_resumes_bit_for_bit(tmp_path):
    def data():
        return make_data(teacher=SGD(0.02))

    straight, _ = fit(tmp_path, 8, module_with(RelativeLoss()), data=data())
    fit(tmp_path, 8, module_with(RelativeLoss()), data=data(), callbacks=[Stop(5, tmp_path / "stop.ckpt")])
    resumed, _ = fit(tmp_path, 8, module_with(RelativeLoss()), data=data(), ckpt_path=tmp_path / "stop.ckpt")
    summed, _ = fit(tmp_path, 8, module_with(SumLoss()), data=data())
    phi = [torch.cat([p.flatten() for p in one.rule.parameters()]) for one in (straight, resumed, summed)]
    assert torch.equal(phi[0], phi[1])
    assert not torch.equal(phi[0], phi[2])
