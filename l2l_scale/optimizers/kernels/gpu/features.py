"""Device code: the features of ``optimizers/features.py`` and their derivatives, coordinate by coordinate.

Vectors are (BN,), a tile of coordinates. Constants go through :func:`constant` where a plain Python number
would be rounded to float32 in the float64 that tests use.
"""

# mypy: ignore-errors
# ruff: noqa: RET505
# Device code is compiled by Triton: its arguments are tensors, pointers and compile-time constants.
# No `from __future__ import annotations`: Triton reads the annotations.

import triton
import triton.language as tl

from l2l_scale.optimizers.kernels.program import FeatureKind

IDENTITY = tl.constexpr(int(FeatureKind.IDENTITY))
LOG_SIGN = tl.constexpr(int(FeatureKind.LOG_SIGN))
LOG_SIGN_CLAMP = tl.constexpr(int(FeatureKind.LOG_SIGN_CLAMP))
LOG_MAGNITUDE = tl.constexpr(int(FeatureKind.LOG_MAGNITUDE))
RNNPROP = tl.constexpr(int(FeatureKind.RNNPROP))
INNER_STEP = tl.constexpr(int(FeatureKind.INNER_STEP))
TINY = tl.constexpr(1e-30)  # as in features.py


@triton.jit
def constant(x, value: tl.constexpr):
    """A tensor like x filled with a number, in x's full precision."""
    return tl.full(x.shape, value, x.dtype)


@triton.jit
def sign(x):
    """sign(±0) = 0, NaN stays NaN."""
    return tl.where(x > 0, constant(x, 1.0), tl.where(x < 0, constant(x, -1.0), x))


@triton.jit
def at_least(x, low: tl.constexpr):
    """max(x, LOW), NaN stays NaN."""
    return tl.where(x < constant(x, low), constant(x, low), x)


@triton.jit
def clip(x, low: tl.constexpr, high: tl.constexpr):
    """NaN stays NaN."""
    return tl.where(x > constant(x, high), constant(x, high), at_least(x, low))


@triton.jit
def inside(x, low: tl.constexpr, high: tl.constexpr):
    """Whether a clip lets x through."""
    return (x >= constant(x, low)) & (x <= constant(x, high))


@triton.jit
def epsilon(x):
    """The precision's machine epsilon."""
    if x.dtype == tl.float64:
        return constant(x, 2.220446049250313e-16)
    else:
        return constant(x, 1.1920928955078125e-07)


@triton.jit
def one_minus_power(step, log_beta: tl.constexpr):
    """1 − β^step. The difference would lose digits for β near one, so float32 takes the series of −expm1."""
    y = step * log_beta
    plain = 1.0 - tl.exp(y)
    if step.dtype == tl.float64:
        return plain
    else:
        series = y / 9.0 + 1.0
        for n in tl.static_range(8, 1, -1):
            series = series * y / n + 1.0
        return tl.where(y > -0.5, -y * series, plain)


@triton.jit
def moments(feature: tl.constexpr, grad, m, v, step):
    """RNNprop: m, v and step after this step, and what its outputs and derivative share."""
    step = step + 1.0
    m = feature.a * m + (1.0 - feature.a) * grad
    v = feature.b * v + (1.0 - feature.b) * grad * grad
    correction1 = one_minus_power(step, feature.log_a)
    correction2 = one_minus_power(step, feature.log_b)
    unbiased = v / correction2
    root = tl.sqrt(at_least(unbiased, TINY))
    inverse = 1.0 / (root + feature.c)
    return m, v, step, correction1, correction2, unbiased, root, inverse


@triton.jit
def feature_outputs(n: tl.constexpr, grad, m, v, step, spec: tl.constexpr):
    """Up to three outputs of the n-th feature, and its state after the step (as given if it has none)."""
    feature: tl.constexpr = spec.features[n]
    magnitude = tl.abs(grad)
    first, second, third = grad, grad, grad
    if feature.kind == IDENTITY:
        first = feature.a * grad
    elif feature.kind == LOG_SIGN:
        first = tl.log(at_least(magnitude, feature.threshold)) / feature.a
        large = magnitude >= constant(grad, feature.threshold)
        second = tl.where(large, sign(grad), grad * feature.gain)
    elif feature.kind == LOG_SIGN_CLAMP:
        first = at_least(tl.log(magnitude + epsilon(grad)) / feature.a, -1.0)
        second = clip(grad * feature.gain, -1.0, 1.0)
    elif feature.kind == LOG_MAGNITUDE:
        first = clip(tl.log(at_least(magnitude, TINY)) / feature.a, -feature.b, feature.b)
    elif feature.kind == INNER_STEP:
        first = 1.0 - 2.0 / (tl.exp(2.0 * (step / feature.a - 1.0)) + 1.0)
        step = step + 1.0
    else:
        m, v, step, correction1, _, _, root, inverse = moments(feature, grad, m, v, step)
        first = m / correction1 * inverse
        second = grad * inverse
        third = clip(tl.log(root) / 10.0, -2.0, 2.0)
    return first, second, third, m, v, step


@triton.jit
def feature_gradient(n: tl.constexpr, grad, state, d_outputs, d_m, d_v, spec: tl.constexpr):
    """Adjoints of the gradient, m, v before a step from those of the n-th feature's outputs, m, v after."""
    feature: tl.constexpr = spec.features[n]
    m, v, step = state
    d_first, d_second, d_third = d_outputs
    magnitude = tl.abs(grad)
    zero = constant(grad, 0.0)
    d_grad = zero
    if feature.kind == IDENTITY:
        d_grad = feature.a * d_first
    elif feature.kind == LOG_SIGN:
        large = magnitude >= constant(grad, feature.threshold)
        d_grad = tl.where(large, d_first / (feature.a * grad), feature.gain * d_second)
    elif feature.kind == LOG_SIGN_CLAMP:
        shifted = magnitude + epsilon(grad)
        passes = tl.log(shifted) / feature.a >= -1.0
        d_grad = tl.where(passes, sign(grad) * d_first / (feature.a * shifted), zero)
        d_grad += tl.where(inside(grad * feature.gain, -1.0, 1.0), feature.gain * d_second, zero)
    elif feature.kind == LOG_MAGNITUDE:
        passes = inside(tl.log(at_least(magnitude, TINY)) / feature.a, -feature.b, feature.b)
        passes = passes & (magnitude >= constant(grad, TINY))
        d_grad = tl.where(passes, d_first / (feature.a * grad), zero)
    elif feature.kind == RNNPROP:
        m, _, _, correction1, correction2, unbiased, root, inverse = moments(feature, grad, m, v, step)
        d_m += d_first * inverse / correction1
        d_root = -(d_first * m / correction1 + d_second * grad) * inverse * inverse
        if feature.size == 3:
            passes = inside(tl.log(root) / 10.0, -2.0, 2.0)
            d_root += tl.where(passes, d_third / (10.0 * root), zero)
        below = unbiased < constant(grad, TINY)
        d_v += tl.where(below, zero, d_root / (2.0 * root * correction2))
        d_grad = d_second * inverse + (1.0 - feature.a) * d_m + 2.0 * (1.0 - feature.b) * grad * d_v
        d_m = feature.a * d_m
        d_v = feature.b * d_v
    return d_grad, d_m, d_v
