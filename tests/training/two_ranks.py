"""Two ranks train what one trains, with families side by side or apart; they are forked, which is fast.

Run by test_two_ranks.py in a process of its own: what forks must have neither threads nor connections.
"""

import os
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from test_checkpoints import differences
from test_meta_training import FAMILY, Stop, make_data, make_module

from l2l_scale.estimators import LogLoss, TruncatedBPTT
from l2l_scale.evaluation import HeldOut, loss_curves
from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.rng import Split
from l2l_scale.tasks import ImageClassifier, Member, Mixture, Quadratic
from l2l_scale.training import Checkpoints, MetaTraining, Trainer, WindowData
from l2l_scale.training.checkpoints import shelf
from l2l_scale.training.checkpoints.folder import read_manifest, read_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SLOTS = ("slots-00000-of-00002.pt", "slots-00001-of-00002.pt")
FAMILIES = {"quadratics": Quadratic(dimension=4), "digits": ImageClassifier(hidden=(3,), batch_size=8)}


def make_trainer(folder, max_steps, callbacks=(), kind=Trainer, **kwargs):
    return kind(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **kwargs,
    )


def train(
    folder, max_steps, ranks=2, mixture=None, callbacks=(), ckpt_path=None, init=0, kind=Trainer, **settings
):
    """φ at the end, and the trainer. ``init`` is the seed of φ at the start."""
    if mixture is None:
        module, data = make_module(final_fraction=1.0), make_data(**settings)
        torch.manual_seed(init)
        if init:
            torch.nn.init.normal_(next(module.parameters()))
    else:
        torch.manual_seed(init)
        rule = CoordinatewiseLSTM(hidden_size=4, layers=1)
        module = MetaTraining(rule, mixture, TruncatedBPTT(meta_loss=LogLoss()), final_fraction=1.0)
        shape = {"horizon": 20, "window": 5, "slots": 8, "windows_per_epoch": 4, "valid_tasks": 3}
        data = WindowData(mixture, **{**shape, **settings})
    options = {"devices": ranks, "strategy": "ddp_fork" if ranks > 1 else "auto"}
    trainer = make_trainer(folder, max_steps, callbacks, kind, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return torch.cat([parameter.detach().flatten() for parameter in module.rule.parameters()]), trainer


def keep_all(folder):
    """A checkpoint after every meta-step."""
    return Checkpoints(dirpath=str(folder / "checkpoints"), every_n_meta_steps=1, keep_last=999)


def stopped(source, target, step):
    """The checkpoints of a run as if it had been stopped after a meta-step."""
    shutil.copytree(source / "checkpoints", target / "checkpoints", symlinks=True)
    for path in shelf.checkpoints_in(target / "checkpoints"):
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)
    return target / "checkpoints" / "last"


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
    source, straight, again = mixture(placement), tmp_path / "straight", tmp_path / "again"
    phi, _ = train(straight, 9, 2, source, [keep_all(straight)])
    for step in (3, 6):
        last = stopped(straight, again / str(step), step)
        resumed, _ = train(
            again / str(step), 9, 2, source, [keep_all(again / str(step))], ckpt_path=last, init=1
        )
        assert torch.equal(phi, resumed)
        end = "checkpoints/step-00000009"
        assert differences(straight / end, again / str(step) / end) == []  # Adam and slots as well


def test_each_rank_writes_a_file_of_its_own_slots(tmp_path):
    train(tmp_path, 4, 2, mixture("every_rank"), [keep_all(tmp_path)])
    train(tmp_path / "groups", 4, 2, mixture("rank_groups"), [keep_all(tmp_path / "groups")])
    for where, slots in (
        (tmp_path, [{"quadratics": (0, 2), "digits": (0, 2)}, {"quadratics": (2, 2), "digits": (2, 2)}]),
        (tmp_path / "groups", [{"quadratics": (0, 4)}, {"digits": (0, 4)}]),
    ):
        path = where / "checkpoints" / "step-00000004"
        manifest = read_manifest(path)
        assert manifest["ranks"] == 2
        assert sorted(manifest["files"]) == [*SLOTS, "training.pt"]
        for name, expected in zip(SLOTS, slots, strict=True):
            (own,) = read_tensors(path / name)
            assert {
                family: (piece["first"], len(piece["leaves"][0])) for family, piece in own.items()
            } == expected


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_the_number_of_ranks_may_change_between_a_checkpoint_and_the_run_that_goes_on(
    tmp_path, before, after
):
    source, straight, changed = mixture("every_rank"), tmp_path / "straight", tmp_path / "changed"
    phi, _ = train(straight, 106, before, source, [keep_all(straight)])
    last = stopped(straight, changed, 6)
    resumed, _ = train(changed, 106, after, source, [keep_all(changed)], ckpt_path=last, init=1)
    difference = float((phi - resumed).abs().max())
    print(f"{before} -> {after} ranks, 100 meta-steps: largest difference in φ {difference:.2g}")
    assert difference <= 1e-6
    one, other = (read_manifest(where / "checkpoints" / "step-00000106") for where in (straight, changed))
    assert (one["ranks"], other["ranks"], one["next_window"]) == (before, after, other["next_window"])


def test_the_number_of_slots_must_not_change(tmp_path):
    straight, again = tmp_path / "straight", tmp_path / "again"
    phi, _ = train(straight, 8, 2, callbacks=[keep_all(straight)])
    last = stopped(straight, again, 5)
    with pytest.raises(Exception, match=r"data\.slots is 6 there and 8 here\. Resume with .* config\.yaml"):
        train(again, 8, 2, callbacks=[keep_all(again)], ckpt_path=last, slots=8)
    resumed, _ = train(again, 8, 2, callbacks=[keep_all(again)], ckpt_path=last, init=1)
    assert torch.equal(phi, resumed)


def test_lightnings_own_trainer_saves_the_slots_of_one_rank_and_that_is_said(tmp_path):
    path = tmp_path / "stop.ckpt"
    straight, _ = train(tmp_path, 8, 1, kind=L.Trainer)
    train(tmp_path, 8, 1, callbacks=[Stop(5, path)], kind=L.Trainer)
    resumed, _ = train(tmp_path, 8, 1, ckpt_path=path, init=1, kind=L.Trainer)
    assert torch.equal(straight, resumed)
    train(tmp_path, 8, 2, callbacks=[Stop(5, path)], kind=L.Trainer)
    with pytest.raises(
        ValueError, match=r"slots up to 3 only, not those from 0 to 6.*l2l_scale\.training\.Trainer"
    ):
        train(tmp_path, 8, 1, ckpt_path=path, kind=L.Trainer)
    with pytest.raises(Exception, match=r"written by one of several ranks.*l2l_scale\.training\.Trainer"):
        train(tmp_path, 8, 2, ckpt_path=path, kind=L.Trainer)


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
    assert not list(tmp_path.rglob("step-*"))
