"""Features against their formulas, written again in numpy; and their derivatives."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from l2l_scale.optimizers import (
    Concatenate,
    Identity,
    InnerStep,
    LogMagnitude,
    LogSign,
    LogSignClamp,
    RNNprop,
)
from l2l_scale.tree import tree_leaves, tree_map

FEATURES = [
    Identity(0.5),
    LogSign(10),
    LogSign(2.5),
    LogSignClamp(5),
    LogMagnitude(10, 2),
    RNNprop(),
    RNNprop(0.5, 0.9, log_scale=True),
    Concatenate([Identity(), RNNprop(log_scale=True), LogMagnitude(), InnerStep(), LogSign()]),
]
GRADIENTS = [0.0, -0.0, 1e-40, -1e-30, 3e-8, -1e-6, 1e-5, 5e-5, -1e-3, 0.02, -0.7, 1.0, 8.0, -1e4, 1e12]

every_feature = pytest.mark.parametrize("feature", FEATURES, ids=lambda f: type(f).__name__)


def apply(feature, grads):
    """Features of one gradient after another, from a fresh state."""
    state, outputs = feature.init_state(grads[0]), []
    for grad in grads:
        output, state = feature(grad, state)
        outputs.append(output)
    return outputs


def draw(*shape, seed=0, dtype=torch.float64):
    """Gradients of many magnitudes and both signs."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-1, 1], shape) * np.exp(rng.uniform(-20, 5, shape))
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [2.0, 10.0])
def test_log_sign_is_the_papers_two_branches(p, dtype):
    threshold = math.exp(-p)
    grads = torch.tensor([*GRADIENTS, 0.5 * threshold, -0.99 * threshold, 1.01 * threshold], dtype=dtype)
    (got,) = apply(LogSign(p), [grads])
    for grad, pair in zip(grads.tolist(), got.tolist(), strict=True):
        if abs(grad) >= threshold:
            expected = (math.log(abs(grad)) / p, math.copysign(1, grad))
        else:
            expected = (-1.0, math.exp(p) * grad)
        assert pair == pytest.approx(expected, abs=1e-6 if dtype == torch.float32 else 1e-14)


def test_log_sign_takes_the_upper_branch_at_the_threshold_itself():
    threshold = torch.tensor([math.exp(-10.0), -math.exp(-10.0)], dtype=torch.float64)
    (got,) = apply(LogSign(10.0), [threshold])
    assert torch.equal(got[:, 1], torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert torch.allclose(got[:, 0], torch.full((2,), -1.0, dtype=torch.float64), rtol=0, atol=1e-15)


def test_log_sign_has_no_jump_at_the_threshold():
    around = math.exp(-10.0) * torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=torch.float64)
    (got,) = apply(LogSign(10.0), [around])
    assert (got[0] - got[1]).abs().max() <= 1e-8


@pytest.mark.parametrize("k", [1.0, 5.0])
def test_log_sign_clamp_is_the_released_codes_formula(k):
    grads = torch.tensor(GRADIENTS, dtype=torch.float64)
    (got,) = apply(LogSignClamp(k), [grads])
    g, epsilon = grads.numpy(), np.finfo(np.float64).eps
    log = np.maximum(np.log(np.abs(g) + epsilon) / k, -1)
    sign = np.clip(g * np.exp(k), -1, 1)
    assert np.abs(got.numpy() - np.stack([log, sign], -1)).max() <= 1e-14


def test_log_magnitude_is_clamped_and_has_no_sign():
    grads = torch.tensor([0.0, 1e-40, -1e-3, 1e-3, 1.0, -1e12], dtype=torch.float64)
    (got,) = apply(LogMagnitude(p=10, limit=2), [grads])
    expected = [-2, -2, math.log(1e-3) / 10, math.log(1e-3) / 10, 0, 2]
    assert got.squeeze(-1).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize(("beta1", "beta2"), [(0.95, 0.95), (0.0, 0.9), (0.9, 0.999)])
def test_rnnprop_equals_a_loop_in_numpy(beta1, beta2, log_scale):
    grads = [draw(3, 4, seed=t) for t in range(30)]
    outputs = apply(RNNprop(beta1, beta2, 1e-8, log_scale), grads)
    m, v = np.zeros((3, 4)), np.zeros((3, 4))
    for t, (grad, output) in enumerate(zip(grads, outputs, strict=True), start=1):
        g = grad.numpy()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        root = np.sqrt(v / (1 - beta2**t))
        parts = [m / (1 - beta1**t) / (root + 1e-8), g / (root + 1e-8)]
        if log_scale:
            parts.append(np.clip(np.log(root) / 10, -2, 2))
        assert np.abs(output.numpy() - np.stack(parts, -1)).max() <= 1e-12


def test_rnnprop_does_not_see_the_scale_of_the_loss():
    grads = [draw(5, seed=t) for t in range(10)]
    plain = apply(RNNprop(epsilon=1e-30), grads)
    scaled = apply(RNNprop(epsilon=1e-30), [1e6 * grad for grad in grads])
    assert all((a - b).abs().max() <= 1e-9 for a, b in zip(plain, scaled, strict=True))


def test_first_rnnprop_features_are_signs():
    (got,) = apply(RNNprop(), [torch.tensor([3.0, -0.2, 0.0])])
    expected = torch.tensor([1.0, -1.0, 0.0]).unsqueeze(-1).expand(3, 2)
    assert (got - expected).abs().max() <= 1e-6


def test_inner_step_tells_the_time_whatever_the_gradient():
    outputs = apply(InnerStep(20.0), [draw(3, 4, seed=t) for t in range(50)])
    for t, output in enumerate(outputs):
        assert output.unique().tolist() == [pytest.approx(math.tanh(t / 20 - 1), abs=1e-14)]


def test_concatenate_puts_features_side_by_side_with_their_own_states():
    parts = [Identity(2.0), RNNprop(), LogSign()]
    grads = [draw(2, 3, seed=t) for t in range(4)]
    together = apply(Concatenate(parts), grads)
    apart = [torch.cat(outputs, -1) for outputs in zip(*(apply(p, grads) for p in parts), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert Concatenate(parts).size == 5


@every_feature
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("size", [1, 5])
def test_shapes_of_features_and_states(feature, leading, size):
    grad = draw(*leading, size)
    state = feature.init_state(grad)
    output, new = feature(grad, state)
    assert output.shape == (*leading, size, feature.size)
    shapes = [leaf.shape for leaf in tree_leaves(state)]
    assert shapes == [leaf.shape for leaf in tree_leaves(new)]
    assert all(shape in ((*leading, size), (*leading, 1)) for shape in shapes)


@every_feature
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_finite_and_keep_the_precision(feature, dtype):
    grads = [torch.tensor(GRADIENTS, dtype=dtype), torch.zeros(len(GRADIENTS), dtype=dtype)]
    for output in apply(feature, [*grads, *grads]):
        assert output.dtype == dtype
        assert output.isfinite().all()


@every_feature
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_are_finite_at_zero_and_at_tiny_gradients(feature, dtype):
    steps = [torch.tensor(GRADIENTS[:-2], dtype=dtype, requires_grad=True) for _ in range(3)]
    zero = torch.zeros(4, dtype=dtype, requires_grad=True)
    for grads in (steps, [zero, zero, zero]):
        derivatives = torch.autograd.grad(sum(o.sum() for o in apply(feature, grads)), set(grads))
        assert all(derivative.isfinite().all() for derivative in derivatives)


@every_feature
def test_derivatives_equal_finite_differences_away_from_kinks(feature):
    values = torch.tensor([0.3, -0.05, 1.7, -0.4], dtype=torch.float64)
    grads = [(values * factor).requires_grad_() for factor in (1.0, -0.8, 2.0)]
    assert gradcheck(lambda *grads: tuple(apply(feature, grads)), grads, eps=1e-7, atol=1e-5)


@every_feature
def test_features_are_pure_and_coordinatewise(feature):
    grads = [draw(2, 6, seed=t) for t in range(3)]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    before = tree_map(torch.clone, grads)
    outputs = apply(feature, grads)
    permuted = apply(feature, [grad[:, order] for grad in grads])
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))
    assert all(torch.equal(a[:, order], b) for a, b in zip(outputs, permuted, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Identity(0.0), r"scale \(0.0\) must be"),
        (lambda: LogSign(-1.0), r"p \(-1.0\) must be"),
        (lambda: LogSign(float("nan")), r"p \(nan\) must be"),
        (lambda: LogSignClamp(0.0), r"k \(0.0\) must be"),
        (lambda: LogMagnitude(limit=-2.0), r"limit \(-2.0\) must be"),
        (lambda: LogMagnitude(p=float("inf")), r"p \(inf\) must be"),
        (lambda: RNNprop(beta1=1.0), r"beta1 \(1.0\) must be in \[0, 1\)"),
        (lambda: RNNprop(beta2=-0.1), r"beta2 \(-0.1\) must be in \[0, 1\)"),
        (lambda: RNNprop(epsilon=0.0), r"epsilon \(0.0\) must be"),
        (lambda: InnerStep(0.0), r"timescale \(0.0\) must be"),
        (lambda: Concatenate([]), r"parts \(\[\]\) must name at least one feature"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
