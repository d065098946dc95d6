"""Device code: one LSTM layer on a tile of coordinates, its weights, its derivative; and the head.

BN coordinates of a tile; H units padded to U; I inputs of a layer padded to W; inputs, h and, where a column
is to spare, a 1 for the bias side by side, padded to J: the joint inputs. Tiles of activations are (BN, U),
so that on tensor cores the result of one product is, in registers, the operand of the next. Gates come in
tuples of four: input, forget, output, candidate. Padded units are zero before and after, so they add nothing.
"""

# mypy: ignore-errors
# ruff: noqa: RET505
# See features.py for the conventions of device code.

import triton
import triton.language as tl

from l2l_scale.optimizers.kernels.gpu.weights import (
    HIDDEN,
    INPUTS,
    JOINT,
    held,
    operand,
    output_place,
    read,
)


@triton.jit
def product(a, b, total, spec: tl.constexpr):
    """Total + a · b, summed in the precision of ``total``."""
    if spec.product == "bf16":
        return tl.dot(a, b, total)
    elif spec.product == "tf32x3":
        return tl.dot(a, b, total, input_precision="tf32x3", out_dtype=total.dtype)
    else:
        return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def sigmoid(x, spec: tl.constexpr):
    """1 / (1 + e^-x); an overflowing exponential gives 0."""
    if spec.fast:
        return tanh(x * 0.5, spec) * 0.5 + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x, spec: tl.constexpr):
    """The hyperbolic tangent; NaN stays NaN.

    The form with an exponential loses digits near zero, where float32 takes the series instead.
    """
    if spec.fast:
        code: tl.constexpr = "tanh.approx.f32 $0, $1;"
        return tl.inline_asm_elementwise(code, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    decay = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - decay) / (1.0 + decay)
    large = tl.where(x < 0, -size, size)
    if x.dtype == tl.float64:
        return large
    else:
        y = x * x
        series = y * (y * (y * (y * (y * -0.0088632 + 0.0218695) - 0.0539683) + 0.1333333) - 0.3333333)
        return tl.where(tl.abs(x) < 0.4, x + x * series, large)


@triton.jit
def row_sum(x):
    """Sum over columns: tl.sum without its wrapper, which the interpreter wants imported in its own mode."""
    return tl.reduce(x, 1, tl.standard._sum_combine)


@triton.jit
def column_sum(x):
    """Sum over rows."""
    return tl.reduce(x, 0, tl.standard._sum_combine)


@triton.jit
def preactivation(parts, bias, phi, gate: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr):
    """One gate before its sigmoid or tanh, (BN, U); for parts see :func:`gates`."""
    total = tl.full((parts[0][0].shape[0], spec.units), 0.0, bias[gate].dtype) + bias[gate][None, :]
    if len(parts) == 1:
        total = product(parts[0][0], held(parts[0][1], phi, JOINT, gate, layer, spec), total, spec)
    else:
        total = product(parts[0][0], held(parts[0][1], phi, INPUTS, gate, layer, spec), total, spec)
        total = product(parts[1][0], held(parts[1][1], phi, HIDDEN, gate, layer, spec), total, spec)
    # A gradient of ∞ times the zero weights of a padded unit is NaN.
    return tl.where(tl.arange(0, spec.units)[None, :] < spec.hidden, total, 0.0)


@triton.jit
def gates(parts, bias, phi, layer: tl.constexpr, spec: tl.constexpr):
    """The four gates of a layer, (BN, U) each; parts: inputs and h, or all joint inputs, with weights."""
    return (
        sigmoid(preactivation(parts, bias, phi, 0, layer, spec), spec),
        sigmoid(preactivation(parts, bias, phi, 1, layer, spec), spec),
        sigmoid(preactivation(parts, bias, phi, 2, layer, spec), spec),
        tanh(preactivation(parts, bias, phi, 3, layer, spec), spec),
    )


@triton.jit
def gates_gradient(gate, c_before, tanh_c, dh, dc, spec: tl.constexpr):
    """Adjoints of the four preactivations, as operands, and of c before the step."""
    i, f, o, g = gate
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    return (
        operand(dc * g * i * (1.0 - i), spec),
        operand(dc * c_before * f * (1.0 - f), spec),
        operand(dh * tanh_c * o * (1.0 - o), spec),
        operand(dc * i * (1.0 - g * g), spec),
    ), dc * f


@triton.jit
def inputs_gradient(
    d, weights, phi, part: tl.constexpr, width: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr
):
    """From adjoints of the preactivations to those (BN, width) of a part of the joint inputs."""
    total = tl.full((d[0].shape[0], width), 0.0, phi.dtype.element_ty)
    for gate in tl.static_range(4):
        total = product(d[gate], tl.trans(held(weights, phi, part, gate, layer, spec)), total, spec)
    return total


@triton.jit
def outer(transposed, d, totals, spec: tl.constexpr):
    """Add the weights' gradients (J, U) of one step; ``transposed`` is (J, BN)."""
    return (
        product(transposed, d[0], totals[0], spec),
        product(transposed, d[1], totals[1], spec),
        product(transposed, d[2], totals[2], spec),
        product(transposed, d[3], totals[3], spec),
    )


@triton.jit
def linear_output(h, phi, output: tl.constexpr, spec: tl.constexpr):
    """w·h + b, (BN,)."""
    bias = tl.load(phi + spec.offsets[spec.layers] + spec.outputs * spec.hidden + output)
    return row_sum(h * read(phi, output_place(output, spec))[None, :]) + bias


@triton.jit
def head(h, phi, spec: tl.constexpr):
    """The update (BN,), see optimizers/heads.py."""
    first = linear_output(h, phi, 0, spec)
    if spec.outputs == 1:
        return spec.scale * first
    else:
        size = tl.exp(spec.exp_scale * linear_output(h, phi, 1, spec))
        return spec.scale * tanh(first, spec) * size


@triton.jit
def head_gradient(h, phi, d_update, spec: tl.constexpr):
    """From the adjoint of the update to those of the linear outputs, (BN,) each; the second may be unused."""
    d = spec.scale * d_update
    if spec.outputs == 1:
        return d, d
    else:
        direction = tanh(linear_output(h, phi, 0, spec), spec)
        size = tl.exp(spec.exp_scale * linear_output(h, phi, 1, spec))
        return d * size * (1.0 - direction * direction), d * size * direction * spec.exp_scale
