import copy
import csv
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from l2l_scale.deploy import load_rule, save_rule
from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.evaluation import HeldOut, loss_curves
from l2l_scale.optimizers import CoordinatewiseLSTM, GlobalAveraging, SharedMemory, SteeredMemory
from l2l_scale.optimizers.backend import accelerate
from l2l_scale.rng import Split
from l2l_scale.tasks import ImageClassifier, Quadratic
from l2l_scale.training import DivergedError, MetaTraining, TrajectoryMetrics, WindowData
from l2l_scale.tree import tree_leaves
from l2l_scale.unroll import begin

FAMILY = Quadratic(dimension=3)


def make_module(**kwargs):
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, layers=1)
    return MetaTraining(rule, FAMILY, estimator=TruncatedBPTT(second_order=True), **kwargs)


def make_data(**kwargs):
    settings = {"horizon": 20, "window": 5, "slots": 6, "windows_per_epoch": 4, "valid_tasks": 8, **kwargs}
    return WindowData(FAMILY, **settings)


def make_trainer(folder, max_steps, callbacks=(), **kwargs):
    return L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=kwargs.pop("logger", False),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **kwargs,
    )


def fit(folder, max_steps, module=None, ckpt_path=None, callbacks=(), data=None, **kwargs):
    module = module or make_module()
    trainer = make_trainer(folder, max_steps, callbacks, **kwargs)
    trainer.fit(module, datamodule=data or make_data(), ckpt_path=ckpt_path)
    return module, trainer


class Stop(Callback):
    """Ends a run in the middle of an epoch, as a crash right after a checkpoint would."""

    def __init__(self, after: int, path: Path) -> None:
        self.after, self.path = after, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


RULES = {
    "LSTM": lambda: CoordinatewiseLSTM(hidden_size=4, layers=1),
    "NTM-BFGS": lambda: SharedMemory(4, 1),
    "NTM-L-BFGS": lambda: SharedMemory(4, 1, storage="window", window=2),
    "steered memory": lambda: SteeredMemory(4),
}


@pytest.mark.parametrize(
    ("name", "after"),
    [("LSTM", 3), ("LSTM", 4), ("LSTM", 6), *((name, 3) for name in RULES if name != "LSTM")],
)
def test_resumed_run_equals_undisturbed_run_bit_for_bit(tmp_path, name, after):
    def start():
        torch.manual_seed(0)
        return MetaTraining(RULES[name](), FAMILY, estimator=TruncatedBPTT(second_order=True))

    straight, trainer = fit(tmp_path, 11, start())
    fit(tmp_path, 11, start(), callbacks=[Stop(after, tmp_path / "stop.ckpt")])
    resumed, again = fit(tmp_path, 11, start(), ckpt_path=tmp_path / "stop.ckpt")
    assert trainer.global_step == again.global_step == 11
    assert resumed.next_window == straight.next_window == 11
    for a, b in zip(straight.rule.parameters(), resumed.rule.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(tree_leaves(straight.carries), tree_leaves(resumed.carries), strict=True):
        assert torch.equal(a, b)
    adam, adam_again = (t.optimizers[0].state_dict()["state"] for t in (trainer, again))
    for key in adam:
        assert all(torch.equal(adam[key][name], adam_again[key][name]) for name in adam[key])


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_differ(tmp_path):
    first, second, other = (fit(tmp_path, 5, data=make_data(seed=seed))[0] for seed in (0, 0, 1))
    weights = [
        torch.cat([p.flatten() for p in module.rule.parameters()]) for module in (first, second, other)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_checkpoint_of_another_rule_is_refused_by_the_name_of_the_difference(tmp_path):
    fit(tmp_path, 5, callbacks=[Stop(3, tmp_path / "stop.ckpt")])
    other = MetaTraining(CoordinatewiseLSTM(hidden_size=5, layers=1), FAMILY)
    with pytest.raises(ValueError, match=r"hidden_size is 4 there and 5 here"):
        fit(tmp_path, 5, module=other, ckpt_path=tmp_path / "stop.ckpt")


def test_checkpoint_loads_without_executing_anything(tmp_path):
    fit(tmp_path, 5, callbacks=[Stop(3, tmp_path / "stop.ckpt")])
    content = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    assert content["l2l_scale"]["next_window"] == 3
    assert content["l2l_scale"]["family"] == repr(FAMILY)


def test_gradient_that_is_not_finite_leaves_phi_and_adam_alone(tmp_path):
    class Poison(Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == 2:
                self.before = copy.deepcopy(module.rule.state_dict())
                next(iter(module.rule.parameters())).grad[0] = math.nan

        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 3:
                self.after = copy.deepcopy(module.rule.state_dict())

    poison = Poison()
    module, _ = fit(tmp_path, 5, callbacks=[poison])
    assert all(torch.equal(poison.before[name], poison.after[name]) for name in poison.before)
    assert all(p.isfinite().all() for p in module.rule.parameters())
    assert module.num_skipped == 1


def test_run_in_which_all_tasks_diverge_stops_and_says_what_to_change(tmp_path):
    module = make_module(divergence_patience=3)
    with torch.no_grad():
        module.rule.output.bias.fill_(math.inf)
    with pytest.raises(
        DivergedError, match=r"last 3 windows.*output_scale.*data\.window.*model\.learning_rate"
    ):
        fit(tmp_path, 50, module=module)


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_trajectory_metrics_are_logged_by_phase(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, 8, callbacks=[TrajectoryMetrics()], log_every_n_steps=1, logger=logger)
    rows = [row for row in rows_of(tmp_path) if row["train/loss"]]
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    for step in (5, 10, 15, 20):
        assert float(rows[-1][f"train/loss_at/{step}"]) > 0
    assert all(float(row["train/diverged"]) == float(row["train/num_skipped"]) == 0 for row in rows)
    assert all(float(row["train/grad_norm"]) > 0 for row in rows)


def test_metrics_of_a_resumed_run_go_on_at_the_right_meta_step(tmp_path):
    fit(tmp_path, 8, callbacks=[Stop(4, tmp_path / "stop.ckpt")])
    logger = CSVLogger(tmp_path, name="", version="")
    options = {"callbacks": [TrajectoryMetrics()], "log_every_n_steps": 3, "logger": logger}
    fit(tmp_path, 12, ckpt_path=tmp_path / "stop.ckpt", **options)
    rows = rows_of(tmp_path)
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [6, 9, 12]
    assert [int(row["step"]) for row in rows if row["valid/sum"]] == [8, 12]


def test_validation_is_on_held_out_tasks_and_equal_to_evaluation(tmp_path):
    module, trainer = fit(tmp_path, 4)
    held_out = HeldOut(family=FAMILY, seed=0, split=Split.VALID, num_tasks=8, inner_steps=20, window=5)
    curves = loss_curves(module.rule, held_out)
    assert torch.equal(trainer.callback_metrics["valid/final"], curves[-1].mean())
    assert torch.equal(trainer.callback_metrics["valid/sum"], curves[1:].sum(0).mean())


def test_learning_rate_falls_along_a_cosine_to_its_final_fraction(tmp_path):
    _, trainer = fit(tmp_path, 8, module=make_module(learning_rate=0.1, final_fraction=0.1))
    assert trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", math.nan),
        ("final_fraction", 2.0),
        ("divergence_patience", 0),
    ],
)
def test_bad_settings_of_the_module_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        make_module(**{name: value})


@pytest.mark.parametrize("name", ["slots", "valid_tasks", "windows_per_epoch", "horizon", "window"])
def test_bad_settings_of_the_data_are_named(name):
    with pytest.raises(ValueError, match=name):
        make_data(**{name: 0})


def test_falling_rate_needs_a_number_of_meta_steps(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_steps \(-1\)"):
        fit(tmp_path, -1)


@pytest.mark.parametrize(
    "family", [FAMILY, ImageClassifier(hidden=(5,), batch_size=16)], ids=["quadratic", "digits"]
)
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_loss_in_training_and_in_evaluation_agree_on_the_same_tasks(family, backend):
    data = WindowData(family, horizon=20, window=5, slots=6, staggered=False)
    ((_, _, batch),) = next(iter(data.train_dataloader()))
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, layers=1)
    trained = accelerate(rule, backend, torch.device("cpu"), torch.float32).rule
    estimate = TruncatedBPTT()(trained, family, begin(rule, batch, None), batch)
    held_out = HeldOut(
        family=family, seed=0, split=Split.TRAIN, num_tasks=6, inner_steps=20, window=5, backend=backend
    )
    curves = loss_curves(rule, held_out)
    assert torch.equal(curves[1:6], estimate.rollout.losses)
    assert float(estimate.surrogate.detach()) == pytest.approx(float(curves[1:6].sum(0).mean()), rel=1e-6)


def test_rules_are_bound_to_the_parameter_groups_of_the_family(tmp_path):
    family = ImageClassifier(hidden=(3,), batch_size=4)
    rule = SharedMemory(4, 1, sharing=GlobalAveraging(1, over="group"))
    module = MetaTraining(rule, family)
    settings = {"horizon": 4, "window": 2, "slots": 1, "windows_per_epoch": 2, "valid_tasks": 1}
    fit(tmp_path, 2, module, data=WindowData(family, **settings))
    values = torch.arange(family.spec.size, dtype=torch.float32)[:, None]
    held_out = HeldOut(family=family, seed=0, split=Split.TUNE, num_tasks=1, inner_steps=1)
    for bound in (module.accelerated[""].rule, held_out.accelerate(rule)):
        means = bound.computing.mean(values).flatten()
        weights = torch.cat([means[part] for part in family.spec.groups["linear"]])
        biases = torch.cat([means[part] for part in family.spec.groups["bias"]])
        assert len(weights.unique()) == len(biases.unique()) == 1
        assert weights[0] != biases[0]


def test_training_starts_from_a_rule(tmp_path):
    torch.manual_seed(1)
    path = save_rule(CoordinatewiseLSTM(4, 1), tmp_path / "rule.safetensors")
    torch.manual_seed(2)
    module = MetaTraining(CoordinatewiseLSTM(4, 1), Quadratic(dimension=2), start_from=str(path))
    expected = load_rule(path).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.rule.state_dict().items())
    with pytest.raises(ValueError, match="form of the one to start from"):
        MetaTraining(CoordinatewiseLSTM(5, 1), Quadratic(dimension=2), start_from=str(path))
