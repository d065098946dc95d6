"""Two ranks train what one trains, with families side by side or apart; they are forked, which is fast.

Run by test_two_ranks.py in a process of its own: what forks must have neither threads nor connections.
"""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from test_meta_training import FAMILY, Stop, make_data, make_module, make_trainer

from l2l_scale.estimators import LogLoss, TruncatedBPTT
from l2l_scale.evaluation import HeldOut, loss_curves
from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.rng import Split
from l2l_scale.tasks import ImageClassifier, Member, Mixture, Quadratic
from l2l_scale.training import MetaTraining, WindowData

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

FAMILIES = {"quadratics": Quadratic(dimension=4), "digits": ImageClassifier(hidden=(3,), batch_size=8)}


def train(folder, max_steps, ranks=2, mixture=None, callbacks=(), ckpt_path=None, init=0, **settings):
    """φ at the end, and the trainer. ``init`` is the seed of φ at the start."""
    if mixture is None:
        module, data = make_module(final_fraction=1.0), make_data(**settings)
    else:
        torch.manual_seed(init)
        rule = CoordinatewiseLSTM(hidden_size=4, layers=1)
        module = MetaTraining(rule, mixture, TruncatedBPTT(meta_loss=LogLoss()), final_fraction=1.0)
        shape = {"horizon": 20, "window": 5, "slots": 8, "windows_per_epoch": 4, "valid_tasks": 3}
        data = WindowData(mixture, **{**shape, **settings})
    options = {"devices": ranks, "strategy": "ddp_fork" if ranks > 1 else "auto"}
    trainer = make_trainer(folder, max_steps, callbacks, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return torch.cat([parameter.detach().flatten() for parameter in module.rule.parameters()]), trainer


def mixture(placement, weight=2.0):
    members = {
        "quadratics": Member(family=FAMILIES["quadratics"], weight=weight),
        "digits": Member(family=FAMILIES["digits"]),
    }
    shares = {name: Member(family=m.family, weight=m.weight, share=1.0) for name, m in members.items()}
    return Mixture(members=shares, placement=placement)


def test_two_ranks_train_like_one_and_the_same_every_time(tmp_path):
    (one, _), (two, trainer), (again, _) = (train(tmp_path, 20, ranks) for ranks in (1, 2, 2))
    assert torch.equal(two, again)
    assert (one - two).abs().max() <= 1e-6
    assert (one - train(tmp_path, 20, 1, seed=1)[0]).abs().max() > 1e-2
    assert trainer.callback_metrics["valid/final"] > 0


@pytest.mark.parametrize("placement", ["every_rank", "rank_groups"])
def test_a_mixture_on_two_ranks_is_the_mixture_on_one(tmp_path, placement):
    alone, _ = train(tmp_path, 20, 1, mixture("every_rank"))
    together, trainer = train(tmp_path, 20, 2, mixture(placement))
    assert (alone - together).abs().max() <= 1e-6
    assert (alone - train(tmp_path, 20, 1, mixture("every_rank", 1.0))[0]).abs().max() > 1e-4
    for name in FAMILIES:  # all validation tasks were seen, whoever holds the family in training
        assert trainer.callback_metrics[f"valid/final/{name}"] > 0


@pytest.mark.parametrize("placement", ["every_rank", "rank_groups"])
def test_resumed_run_on_two_ranks_equals_undisturbed_run_bit_for_bit(tmp_path, placement):
    source, path = mixture(placement), tmp_path / "stop.ckpt"
    straight, _ = train(tmp_path, 9, 2, source)
    train(tmp_path, 9, 2, source, callbacks=[Stop(6, path)])
    carries = torch.load(path, weights_only=True)["l2l_scale"]["carries"]
    assert {name: len(leaves[0]) for name, leaves in carries.items()} == {"quadratics": 4, "digits": 4}
    resumed, _ = train(tmp_path, 9, 2, source, ckpt_path=path, init=1)
    assert torch.equal(straight, resumed)


def test_the_number_of_ranks_may_change_between_a_checkpoint_and_the_run_that_goes_on(tmp_path):
    source, path = mixture("every_rank"), tmp_path / "stop.ckpt"
    straight, _ = train(tmp_path, 12, 1, source)
    for before, after in ((1, 2), (2, 1)):
        train(tmp_path, 12, before, source, callbacks=[Stop(6, path)])
        resumed, _ = train(tmp_path, 12, after, source, ckpt_path=path, init=1)
        assert (straight - resumed).abs().max() <= 1e-6


def test_ranks_validate_on_the_same_tasks_as_one_though_they_do_not_come_out_even(tmp_path):
    module = make_module(final_fraction=1.0)
    trainer = make_trainer(tmp_path, 4, devices=2, strategy="ddp_fork")
    trainer.fit(module, datamodule=make_data(valid_tasks=7))
    held_out = HeldOut(family=FAMILY, seed=0, split=Split.VALID, num_tasks=7, inner_steps=20, window=5)
    expected = float(loss_curves(module.rule, held_out)[-1].mean())
    assert float(trainer.callback_metrics["valid/final"]) == pytest.approx(expected, rel=1e-6)


class Fault(Callback):
    """Flips the last bit of a parameter on one rank, as broken memory would."""

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            largest = max(module.parameters(), key=lambda parameter: parameter.abs().max()).data.view(-1)
            largest.view(torch.int32)[largest.abs().argmax()] ^= 1


def test_a_rank_that_went_its_own_way_stops_the_run_at_the_next_validation(tmp_path):
    with pytest.raises(Exception, match=r"φ on rank\(s\) 1 is not that of rank 0 at meta-step 4"):
        train(tmp_path, 8, callbacks=[Fault()])


def test_slots_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(Exception, match=r"slots \(7\) must be a multiple of the ranks that share them \(2\)"):
        train(tmp_path, 4, slots=7)


def test_one_rank_alone_has_too_few_groups(tmp_path):
    with pytest.raises(ValueError, match=r"number of ranks \(1\) must be at least the number of families"):
        train(tmp_path, 4, 1, mixture("rank_groups"))
    assert not list(Path(tmp_path).rglob("*.ckpt"))
