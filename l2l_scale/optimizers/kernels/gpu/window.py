"""Device code: a window's steps computed again, with what every step starts from kept in a scratch.

The scratch of a program has K + 1 slots. Slot k holds, for every layer, the joint inputs of step k (its
inputs and h before the step, side by side) and c before the step. Rows are coordinates there, as in the
tiles.
"""

# mypy: ignore-errors
# See features.py for the conventions of device code.

import triton
import triton.language as tl

from l2l_scale.optimizers.kernels.gpu.features import feature_outputs
from l2l_scale.optimizers.kernels.gpu.lstm import gates, tanh
from l2l_scale.optimizers.kernels.gpu.step import feature_state, load, rows_place, store
from l2l_scale.optimizers.kernels.gpu.weights import HIDDEN, INPUTS, biases, hold, operand


@triton.jit
def joint_places(
    k,
    start: tl.constexpr,
    count: tl.constexpr,
    padded: tl.constexpr,
    layer: tl.constexpr,
    bn: tl.constexpr,
    spec: tl.constexpr,
):
    """Where ``count`` joint inputs from ``start`` on, padded, of a layer's step k lie, (BN, padded)."""
    column = tl.arange(0, padded)[None, :]
    row = tl.arange(0, bn)[:, None] * spec.joints[layer]
    first = (k * spec.columns + spec.joint_columns[layer]) * bn + start
    return first + row + column, column < count


@triton.jit
def x_place(k, layer: tl.constexpr, bn: tl.constexpr, spec: tl.constexpr):
    """Where a layer's inputs (BN, W) of step k lie."""
    return joint_places(k, 0, spec.inputs[layer], spec.widths[layer], layer, bn, spec)


@triton.jit
def h_place(k, layer: tl.constexpr, bn: tl.constexpr, spec: tl.constexpr):
    """Where h (BN, U) of a layer before step k lies."""
    return joint_places(k, spec.inputs[layer], spec.hidden, spec.units, layer, bn, spec)


@triton.jit
def c_place(k, layer: tl.constexpr, bn: tl.constexpr, spec: tl.constexpr):
    """Where c (BN, U) of a layer before step k lies."""
    unit = tl.arange(0, spec.units)[None, :]
    row = tl.arange(0, bn)[:, None] * spec.units
    first = (k * spec.columns + spec.joint_columns[layer] + spec.joints[layer]) * bn
    return first + row + unit, unit < spec.hidden


@triton.jit
def joint_input(scratch, k, layer: tl.constexpr, bn: tl.constexpr, dtype: tl.constexpr, spec: tl.constexpr):
    """The joint inputs (BN, J) of a layer's step k, as an operand."""
    end: tl.constexpr = spec.inputs[layer] + spec.hidden
    column = tl.arange(0, spec.joints[layer])[None, :]
    joint = load(scratch, joint_places(k, 0, end, spec.joints[layer], layer, bn, spec), dtype)
    return operand(tl.where(column == end, 1.0, joint), spec)


@triton.jit
def features_up(
    grads, state, scratch, coordinate, total, blocks, steps, bn: tl.constexpr, spec: tl.constexpr
):
    """Features of all steps, one feature after the other."""
    dtype: tl.constexpr = grads.dtype.element_ty
    lane = tl.arange(0, bn)
    for n in tl.static_range(len(spec.features)):
        m, v, step = feature_state(state, coordinate, blocks, n, dtype, spec)
        for k in range(steps):
            grad = tl.load(grads + k * total + coordinate, mask=coordinate < total, other=0.0)
            first, second, third, m, v, step = feature_outputs(n, grad, m, v, step, spec)
            place = k * spec.columns * bn + lane * spec.joints[0] + spec.features[n].column
            everywhere = lane < bn
            store(scratch, (place, everywhere), first)
            if spec.features[n].size > 1:
                store(scratch, (place + 1, everywhere), second)
            if spec.features[n].size > 2:
                store(scratch, (place + 2, everywhere), third)


@triton.jit
def layer_up(
    phi, state, scratch, coordinate, blocks, steps, layer: tl.constexpr, bn: tl.constexpr, spec: tl.constexpr
):
    """All steps of a layer."""
    dtype: tl.constexpr = phi.dtype.element_ty
    w_x, w_h = hold(phi, INPUTS, layer, spec), hold(phi, HIDDEN, layer, spec)
    bias = biases(phi, layer, spec)
    h = load(state, rows_place(coordinate, blocks, spec.h_rows[layer], spec), dtype)
    c = load(state, rows_place(coordinate, blocks, spec.h_rows[layer] + spec.hidden, spec), dtype)
    store(scratch, h_place(0, layer, bn, spec), h)
    store(scratch, c_place(0, layer, bn, spec), c)
    for k in range(steps):
        x = operand(load(scratch, x_place(k, layer, bn, spec), dtype), spec)
        parts = ((x, w_x), (operand(h, spec), w_h))
        i, f, o, g = gates(parts, bias, phi, layer, spec)
        c = f * c + i * g
        h = o * tanh(c, spec)
        store(scratch, h_place(k + 1, layer, bn, spec), h)
        store(scratch, c_place(k + 1, layer, bn, spec), c)
        if layer + 1 < spec.layers:
            store(scratch, x_place(k, layer + 1, bn, spec), h)


@triton.jit
def tile_up(
    phi, grads, state, scratch, coordinate, total, blocks, steps, bn: tl.constexpr, spec: tl.constexpr
):
    """Run a window on a tile. Threads read what others wrote, hence the barriers."""
    features_up(grads, state, scratch, coordinate, total, blocks, steps, bn, spec)
    tl.debug_barrier()
    layers: tl.constexpr = spec.layers
    for layer in tl.static_range(layers):
        layer_up(phi, state, scratch, coordinate, blocks, steps, layer, bn, spec)
        tl.debug_barrier()
