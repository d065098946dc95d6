"""Training on several families, and on several windows in one meta-step: through Lightning, as in a run."""

import csv
import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from test_meta_training import FAMILY, Stop, fit, make_data, make_module

from l2l_scale.cli.fit import check_rhythm
from l2l_scale.estimators import LogLoss, TruncatedBPTT
from l2l_scale.evaluation import HeldOut, loss_curves
from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.rng import Split
from l2l_scale.tasks import ImageClassifier, Member, Mixture, Quadratic
from l2l_scale.training import MetaTraining, TrajectoryMetrics, WindowData
from l2l_scale.training.validation import validation_metrics, weighted_mean
from l2l_scale.tree import tree_leaves, tree_map
from l2l_scale.unroll import begin

FAMILIES = {"quadratics": Quadratic(dimension=4), "digits": ImageClassifier(hidden=(3,), batch_size=8)}
WEIGHTS = {"quadratics": 0.25, "digits": 0.75}
SHARES = {"quadratics": 3.0, "digits": 1.0}


def make_mixture():
    return Mixture(
        members={
            name: Member(family=family, weight=WEIGHTS[name], share=SHARES[name])
            for name, family in FAMILIES.items()
        }
    )


def mixed_module():
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(hidden_size=4, layers=1)
    return MetaTraining(rule, make_mixture(), TruncatedBPTT(meta_loss=LogLoss()))


def mixed_data(**kwargs):
    settings = {"horizon": 20, "window": 5, "slots": 8, "windows_per_epoch": 4, "valid_tasks": 4, **kwargs}
    return WindowData(make_mixture(), **settings)


def phi_of(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.rule.parameters()])


class Gradients(Callback):
    """Keeps φ and its gradient at every meta-step, before clipping."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradient = torch.cat([parameter.grad.flatten() for parameter in module.rule.parameters()])
        self.steps.append((phi_of(module), gradient))


def doubles(window):
    """A window as the trainer makes it for 64-true: drawn in single precision, then cast."""

    def cast(leaf):
        return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, window)


def gradients_by_hand(module, data, phis):
    """{family: gradient of its own meta-loss} for window after window, each at its φ, in float64."""
    carries, found = {}, []
    for phi, batch in zip(phis, data.train_dataloader(), strict=False):
        torch.nn.utils.vector_to_parameters(phi.clone(), module.rule.parameters())
        gradients = {}
        for name, _, window in batch:
            window = doubles(window)
            carry = begin(module.rule, window, carries.get(name))
            estimate = module.estimator(module.rule, module.families[name], carry, window)
            grads = torch.autograd.grad(estimate.surrogate, list(module.rule.parameters()))
            gradients[name] = torch.cat([grad.flatten() for grad in grads])
            carries[name] = tree_map(torch.Tensor.detach, estimate.rollout.carry)
        found.append(gradients)
    return found


def assert_close(ours, theirs):
    assert (ours - theirs).norm() <= 1e-11 * theirs.norm()


def test_gradient_is_the_weighted_sum_of_the_families_gradients(tmp_path):
    seen = Gradients()
    fit(tmp_path, 4, mixed_module(), data=mixed_data(), callbacks=[seen], precision="64-true")
    phis = [phi for phi, _ in seen.steps]
    separate = gradients_by_hand(mixed_module().double(), mixed_data(), phis)
    assert len(separate) == 4
    for (_, ours), of_families in zip(seen.steps, separate, strict=True):
        assert_close(ours, sum(WEIGHTS[name] * gradient for name, gradient in of_families.items()))
        assert all(gradient.norm() > 0 for gradient in of_families.values())


def test_accumulated_gradient_is_the_mean_over_the_windows_at_one_phi(tmp_path):
    seen = Gradients()
    options = {"precision": "64-true", "accumulate_grad_batches": 2}
    module, trainer = fit(tmp_path, 3, mixed_module(), data=mixed_data(), callbacks=[seen], **options)
    assert (trainer.global_step, module.next_window) == (3, 6)
    phis = [phi for phi, _ in seen.steps for _ in range(2)]
    windows = gradients_by_hand(mixed_module().double(), mixed_data(windows_per_epoch=6), phis)
    assert len(windows) == 6
    for step, (_, ours) in enumerate(seen.steps):
        pair = windows[2 * step : 2 * step + 2]
        weighted = [sum(WEIGHTS[name] * gradient for name, gradient in one.items()) for one in pair]
        assert_close(ours, (weighted[0] + weighted[1]) / 2)
        assert (weighted[0] - weighted[1]).norm() > 1e-3 * ours.norm()


def test_resumed_run_with_accumulation_equals_undisturbed_run_bit_for_bit(tmp_path):
    options = {"accumulate_grad_batches": 2}
    straight, _ = fit(tmp_path, 6, **options)
    fit(tmp_path, 6, callbacks=[Stop(4, tmp_path / "stop.ckpt")], **options)
    resumed, _ = fit(tmp_path, 6, ckpt_path=tmp_path / "stop.ckpt", **options)
    assert torch.equal(phi_of(straight), phi_of(resumed))


@pytest.mark.parametrize(
    ("rhythm", "message"),
    [
        (
            (100, 25, 2),
            r"windows_per_epoch \(25\) must be a multiple of trainer.accumulate_grad_batches \(2\)",
        ),
        ((90, 40, 2), r"max_steps \(90\) .*windows_per_epoch / accumulate_grad_batches \(20\).*; 80 is one"),
        ((90, 40, 1), r"max_steps \(90\) must be a multiple of data.windows_per_epoch \(40\).*; 80 is one"),
        ((10, 40, 1), r"; 40 is one"),
    ],
)
def test_meta_steps_that_would_be_in_no_checkpoint_are_refused(rhythm, message):
    with pytest.raises(ValueError, match=message):
        check_rhythm(*rhythm)


@pytest.mark.parametrize("rhythm", [(100, 25, 1), (100, 50, 2), (100, 200, 2), (-1, 25, 1), (100, 50, 50)])
def test_runs_that_end_with_an_epoch_pass(rhythm):
    check_rhythm(*rhythm)


def test_mixture_of_one_family_trains_like_the_family_bit_for_bit(tmp_path):
    alone, plain_trainer = fit(tmp_path, 8)
    mixture = Mixture(members={"only": Member(family=FAMILY, weight=3.0, share=0.5)})
    module = MetaTraining(make_module().rule, mixture, TruncatedBPTT(second_order=True))
    data = WindowData(mixture, horizon=20, window=5, slots=6, windows_per_epoch=4, valid_tasks=8)
    mixed, trainer = fit(tmp_path, 8, module, data=data)
    assert torch.equal(phi_of(alone), phi_of(mixed))
    for a, b in zip(tree_leaves(alone.carries[""]), tree_leaves(mixed.carries["only"]), strict=True):
        assert torch.equal(a, b)
    for name in ("valid/sum", "valid/final", "valid/final_median"):
        assert torch.equal(trainer.callback_metrics[name], plain_trainer.callback_metrics[name])


@pytest.mark.parametrize("after", [3, 4])
def test_resumed_run_with_a_mixture_equals_undisturbed_run_bit_for_bit(tmp_path, after):
    straight, _ = fit(tmp_path, 8, mixed_module(), data=mixed_data())
    fit(tmp_path, 8, mixed_module(), data=mixed_data(), callbacks=[Stop(after, tmp_path / "stop.ckpt")])
    (saved,) = torch.load(tmp_path / "stop.ckpt", weights_only=True)["l2l_scale"]["slots"]
    assert {name: len(one["leaves"][0]) for name, one in saved.items()} == {"quadratics": 6, "digits": 2}
    resumed, _ = fit(tmp_path, 8, mixed_module(), data=mixed_data(), ckpt_path=tmp_path / "stop.ckpt")
    ours, theirs = ([*m.rule.parameters(), *tree_leaves(m.carries)] for m in (straight, resumed))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_checkpoint_of_another_mixture_is_refused(tmp_path):
    fit(tmp_path, 4, mixed_module(), data=mixed_data(), callbacks=[Stop(3, tmp_path / "stop.ckpt")])
    with pytest.raises(ValueError, match=r"data\.family is .*Mixture.* there and .* here"):
        fit(tmp_path, 4, make_module(), data=make_data(slots=8), ckpt_path=tmp_path / "stop.ckpt")


def test_every_family_has_metrics_of_its_own(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    options = {"callbacks": [TrajectoryMetrics()], "log_every_n_steps": 1, "logger": logger}
    module, trainer = fit(tmp_path, 4, mixed_module(), data=mixed_data(), **options)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    trained, validated = rows[:4], rows[4]
    for name in FAMILIES:
        assert all(float(row[f"train/loss/{name}"]) > 0 for row in trained)
        assert all(float(row[f"train/diverged/{name}"]) == 0 for row in trained)
        assert any(row[f"train/loss_at/20/{name}"] for row in trained)
    assert not {"train/loss", "train/diverged", "train/loss_at/20"} & set(rows[0])
    curves = {}
    for name, family in FAMILIES.items():
        held_out = HeldOut(family=family, seed=0, split=Split.VALID, num_tasks=4, inner_steps=20, window=5)
        curves[name] = loss_curves(module.rule, held_out)
        assert torch.equal(trainer.callback_metrics[f"valid/final/{name}"], curves[name][-1].mean())
        assert torch.equal(trainer.callback_metrics[f"valid/sum/{name}"], curves[name][1:].sum(0).mean())
    finals = {name: float(curve[-1].mean()) for name, curve in curves.items()}
    expected = math.exp(sum(WEIGHTS[name] * math.log(final) for name, final in finals.items()))
    assert float(validated["valid/final"]) == pytest.approx(expected, rel=1e-5)


CURVES = {
    "a": torch.tensor([[1.0, 3.0, 5.0], [2.0, 4.0, 9.0]]),
    "b": torch.tensor([[8.0, 8.0, 8.0], [1.0, 2.0, 3.0]]),
}


def test_validation_metrics_of_one_family_are_plain_means():
    plain = {
        "valid/sum": torch.tensor(8.0),
        "valid/final": torch.tensor(5.0),
        "valid/final_median": torch.tensor(4.0),
    }
    assert validation_metrics({"": CURVES["a"]}, {"": 1.0}) == plain
    named = {f"{name}/a": value for name, value in plain.items()}
    assert validation_metrics({"a": CURVES["a"]}, {"a": 1.0}) == plain | named


def test_validation_metrics_of_several_families_are_each_and_their_weighted_geometric_mean():
    metrics = validation_metrics(CURVES, {"a": 0.75, "b": 0.25})
    assert float(metrics["valid/sum/a"]) == 8.0
    assert float(metrics["valid/sum/b"]) == 10.0
    assert float(metrics["valid/final_median/b"]) == 2.0
    assert float(metrics["valid/sum"]) == pytest.approx(8**0.75 * 10**0.25, rel=1e-6)
    assert float(metrics["valid/final"]) == pytest.approx(5**0.75 * 2**0.25, rel=1e-6)
    assert len(metrics) == 9


@pytest.mark.parametrize(("values", "expected"), [((4.0, -2.0), 2.5), ((4.0, 0.0), 3.0)])
def test_weighted_mean_is_arithmetic_where_a_value_is_not_positive(values, expected):
    named = {name: torch.tensor(value) for name, value in zip("ab", values, strict=True)}
    assert float(weighted_mean(named, {"a": 0.75, "b": 0.25})) == expected


def test_weighted_mean_shows_a_family_that_went_astray():
    named = {"a": torch.tensor(1.0), "b": torch.tensor(math.inf)}
    assert float(weighted_mean(named, {"a": 0.99, "b": 0.01})) == math.inf
