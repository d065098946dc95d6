"""Meta-training of a grouped rule: both rules learn, a resumed run is the same, memory is predicted."""

import torch
from conftest import small_lstm
from test_meta_training import Stop, fit

from l2l_scale.deploy import load_rule, save_rule
from l2l_scale.evaluation import HeldOut, loss_curves
from l2l_scale.optimizers import SGD, Grouped
from l2l_scale.rng import Split
from l2l_scale.tasks import ConvClassifier
from l2l_scale.training import MetaTraining, WindowData
from l2l_scale.training.memory import Machine, predict
from l2l_scale.tree import tree_leaves

FAMILY = ConvClassifier(channels=(2,), kernel=3, hidden=(), batch_size=8, initialisation="torch")
GROUPS = {"conv": ["conv"], "linear": ["linear", "bias", "norm"]}


def module():
    rules = {name: small_lstm(seed) for seed, name in enumerate(GROUPS)}
    return MetaTraining(Grouped(rules, GROUPS), FAMILY)


def data(family=FAMILY):
    return WindowData(family, horizon=20, window=5, slots=2, windows_per_epoch=2, valid_tasks=2)


def test_both_rules_are_trained_and_a_resumed_run_is_the_same(tmp_path):
    before = module()
    straight, _ = fit(tmp_path, 4, module(), data=data())
    for old, new in zip(before.parameters(), straight.parameters(), strict=True):
        assert not torch.equal(old, new)
    path = tmp_path / "stopped.ckpt"
    fit(tmp_path, 4, module(), data=data(), callbacks=[Stop(3, path)])
    resumed, _ = fit(tmp_path, 4, module(), ckpt_path=path, data=data())
    pairs = (
        [straight.parameters(), resumed.parameters()],
        [tree_leaves(one.carries) for one in (straight, resumed)],
    )
    for one, other in pairs:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_evaluation_binds_learned_and_hand_designed_rules(tmp_path):
    learned = load_rule(save_rule(module().rule, tmp_path / "rule.safetensors"))
    sgd = Grouped({"a": SGD(0.0), "b": SGD(0.1)}, {"a": ["conv"], "b": ["*"]})
    held_out = HeldOut(family=FAMILY, seed=0, split=Split.TEST, num_tasks=2, inner_steps=5)
    for rule in (learned, sgd):
        curves = loss_curves(rule, held_out)
        assert curves.shape == (6, 2)
        assert curves.isfinite().all()
        assert not torch.equal(curves[0], curves[-1])


def test_memory_is_predicted():
    model, source = module(), data()
    for backend, words in (("fused", "conv: fused, linear: fused"), ("eager", "eager")):
        prediction = predict(model, source, Machine(device=torch.device("cpu")), backend)
        assert prediction.backend == words
        assert prediction.fits
