"""CompiledFamily: the same tasks, losses and gradients; first order only."""

from __future__ import annotations

import pickle

import pytest
import torch
from conftest import Regression, draw_windows, phi_gradient, small_lstm

from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.rng import Channel, Split, stream
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import CompiledFamily, ImageClassifier, MixedPrecision, Quadratic, TaskFamily
from l2l_scale.training import MetaTraining
from l2l_scale.unroll import InnerGradient, begin, unroll


def rng():
    return stream(0, Split.TRAIN, Channel.DATA, 0)


@pytest.fixture(scope="module", params=[Regression(), Quadratic(dimension=4)], ids=lambda f: type(f).__name__)
def pair(request: pytest.FixtureRequest) -> tuple[TaskFamily, CompiledFamily]:
    """A family, once by autograd through mapped losses and once by formula; and itself compiled."""
    return request.param, CompiledFamily(request.param)


def test_compiled_windows_equal_eager_ones(pair, double):
    rule = small_lstm()
    (batch,) = draw_windows(pair[0], Schedule(horizon=4, window=4), 1, range(3))
    estimates = [TruncatedBPTT()(rule, family, begin(rule, batch, None), batch) for family in pair]
    eager, compiled = (estimate.rollout for estimate in estimates)
    assert (compiled.losses - eager.losses).abs().max() <= 1e-12
    assert (compiled.carry.theta - eager.carry.theta).abs().max() <= 1e-12
    expected, gradient = (phi_gradient(rule, estimate.surrogate) for estimate in estimates)
    assert (gradient - expected).norm() <= 1e-12 * expected.norm()
    without = unroll(rule, pair[1], begin(rule, batch, None), batch, InnerGradient.NONE)
    assert torch.equal(without.losses, compiled.losses)


def test_compiled_results_have_no_graph(pair, double):
    (batch,) = draw_windows(pair[0], Schedule(horizon=4, window=4), 1, range(3))
    data = {name: leaf[0] for name, leaf in batch.data.items()}
    results = pair[1].losses_and_gradients(batch.theta0, batch.task, data, create_graph=False)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize(
    "family",
    [Quadratic(dimension=10, theta0_scale=1.0), Regression(8), ImageClassifier(initialisation="torch")],
    ids=lambda f: type(f).__name__,
)
@pytest.mark.parametrize("inside", [True, False])
def test_mixed_precision_compiles_in_either_order(family, inside):
    wrapped = CompiledFamily(MixedPrecision(family)) if inside else MixedPrecision(CompiledFamily(family))
    (batch,) = draw_windows(family, Schedule(horizon=1, window=1), 1, range(3), torch.float32)
    theta, data = batch.theta0, {name: leaf[0] for name, leaf in batch.data.items()}
    exact = family.losses_and_gradients(theta, batch.task, data, create_graph=False)
    results = wrapped.losses_and_gradients(theta, batch.task, data, create_graph=False)
    for got, want in zip(results, exact, strict=True):
        # Errors of rounding to bfloat16, 2^-8 each, a few in a row; compiled code leaves some of them out.
        assert 0 < (got - want).norm() <= 8 * 2**-8 * want.norm()
        assert got.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = wrapped.losses_and_gradients(theta, batch.task, data, create_graph=False)
    assert all(map(torch.equal, again, results))


@pytest.mark.parametrize("family", [Quadratic(dimension=3), ImageClassifier(batch_size=4)])
def test_tasks_are_those_of_the_family(family):
    compiled = CompiledFamily(family)
    assert compiled.spec == family.spec
    assert compiled.has_data == family.has_data
    task = family.sample_task(rng())
    for name, value in compiled.sample_task(rng()).items():
        assert (value == task[name]).all()
    assert (compiled.sample_init(rng(), task) == family.sample_init(rng(), task)).all()
    for name, value in compiled.sample_data(rng(), task).items():
        assert (value == family.sample_data(rng(), task)[name]).all()
    assert compiled.for_split(Split.TUNE) == CompiledFamily(family.for_split(Split.TUNE))


def test_compiled_families_travel_between_processes(pair, double):
    assert pickle.loads(pickle.dumps(CompiledFamily(Quadratic(dimension=3)))).family == Quadratic(dimension=3)
    (batch,) = draw_windows(pair[0], Schedule(horizon=4, window=4), 1, range(3))
    data = {name: leaf[0] for name, leaf in batch.data.items()}
    pair[1].losses_and_gradients(batch.theta0, batch.task, data, create_graph=False)
    assert pickle.loads(pickle.dumps(pair[1])) == pair[1]  # with compiled code in it


def test_the_true_meta_gradient_is_refused():
    family = CompiledFamily(Quadratic(dimension=3))
    (batch,) = draw_windows(family, Schedule(horizon=4, window=4), 1)
    with pytest.raises(ValueError, match=r"compiled tasks have no second derivatives .* or first order"):
        family.losses_and_gradients(batch.theta0, batch.task, {}, create_graph=True)


def test_meta_training_compiles_the_training_tasks_in_first_order_only():
    rule, family = CoordinatewiseLSTM(hidden_size=4, layers=1), Quadratic(dimension=3)
    module = MetaTraining(rule, family, compile_tasks=True)
    assert module.families == {"": CompiledFamily(family)}
    assert module.valid_families == MetaTraining(rule, family).families == {"": family}
    with pytest.raises(ValueError, match=r"compile_tasks \(True\) must be False with second_order"):
        MetaTraining(rule, family, TruncatedBPTT(second_order=True), compile_tasks=True)
