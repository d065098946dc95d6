"""Device code: one layer of a tile backwards through all steps, and the features backwards through one.

Names as in lstm.py and window.py.
"""

# mypy: ignore-errors
# ruff: noqa: RET505
# See features.py for the conventions of device code.

import triton
import triton.language as tl

from l2l_scale.optimizers.kernels.gpu.features import feature_gradient
from l2l_scale.optimizers.kernels.gpu.lstm import (
    column_sum,
    gates,
    gates_gradient,
    head_gradient,
    inputs_gradient,
    outer,
    row_sum,
    tanh,
)
from l2l_scale.optimizers.kernels.gpu.step import (
    LANES,
    feature_state,
    load,
    rows_place,
    store,
    store_feature_state,
)
from l2l_scale.optimizers.kernels.gpu.weights import (
    HIDDEN,
    INPUTS,
    JOINT,
    add,
    bias_place,
    biases,
    hold,
    joint_place,
    output_place,
    read,
)
from l2l_scale.optimizers.kernels.gpu.window import c_place, joint_input


@triton.jit
def column_of(x, at: tl.constexpr):
    """One column (BN,) of a tile; zero if there is no such column."""
    return row_sum(tl.where(tl.arange(0, x.shape[1])[None, :] == at, x, 0.0))


@triton.jit
def add_column_sums(totals, d):
    """Add the biases' gradients of one step."""
    return (
        totals[0] + column_sum(d[0].to(totals[0].dtype)),
        totals[1] + column_sum(d[1].to(totals[1].dtype)),
        totals[2] + column_sum(d[2].to(totals[2].dtype)),
        totals[3] + column_sum(d[3].to(totals[3].dtype)),
    )


@triton.jit
def flush_layer(sums, d_weights, d_bias, layer: tl.constexpr, spec: tl.constexpr):
    """Add a layer's weight gradients to the program's sums."""
    for gate in tl.static_range(4):
        add(sums, joint_place(gate, layer, spec), d_weights[gate])
        if spec.inputs[layer] + spec.hidden == spec.joints[layer]:
            add(sums, bias_place(gate, layer, spec), d_bias[gate])


@triton.jit
def flush_output(sums, d_first, d_second, first_sum, second_sum, spec: tl.constexpr):
    """Add the output layer's gradients, kept per coordinate until here."""
    bias = sums + spec.offsets[spec.layers] + spec.outputs * spec.hidden
    add(sums, output_place(0, spec), column_sum(d_first))
    tl.store(bias, tl.load(bias) + column_sum(first_sum))
    if spec.outputs == 2:
        add(sums, output_place(1, spec), column_sum(d_second))
        tl.store(bias + 1, tl.load(bias + 1) + column_sum(second_sum))


@triton.jit
def zeros4(rows: tl.constexpr, columns: tl.constexpr, dtype: tl.constexpr):
    """Four tiles of zeros."""
    zero = tl.full((rows, columns), 0.0, dtype)
    return zero, zero, zero, zero


@triton.jit
def d_update_at(given, d_update, coordinate, total, k, first_order: tl.constexpr):
    """∂L/∂update_k: given, or in first order the sum that gains one term per step on the way down."""
    live = coordinate < total
    if first_order:
        grads, loss_weights, per_problem, problems = given
        weight = tl.load(loss_weights + k * problems + coordinate // per_problem, mask=live, other=0.0)
        return d_update + weight * tl.load(grads + (k + 1) * total + coordinate, mask=live, other=0.0)
    else:
        return tl.load(given[0] + coordinate, mask=live, other=0.0)


@triton.jit
def layer_down(
    phi,
    given,
    d_after,
    scratch,
    sums,
    coordinate,
    total,
    blocks,
    steps,
    layer: tl.constexpr,
    first_order: tl.constexpr,
    bn: tl.constexpr,
    spec: tl.constexpr,
):
    """All steps of a layer backwards; adds its weight gradients, leaves its inputs' adjoints in the scratch.

    Returns:
        the adjoints of h and c at the start (BN, U), and of the inputs of the first step (BN, W).
    """
    dtype: tl.constexpr = phi.dtype.element_ty
    top: tl.constexpr = layer == spec.layers - 1
    w_x, w_h = hold(phi, INPUTS, layer, spec), hold(phi, HIDDEN, layer, spec)
    w_joint = hold(phi, JOINT, layer, spec)
    # The column of ones, where there is one, brings the bias.
    has_one: tl.constexpr = spec.inputs[layer] + spec.hidden < spec.joints[layer]
    zero = tl.full((spec.units,), 0.0, dtype)
    bias = (zero, zero, zero, zero)
    if not has_one:
        bias = biases(phi, layer, spec)
    dh, dc, d_first, d_second = zeros4(bn, spec.units, dtype)
    if not first_order:
        offset, mask = rows_place(coordinate, blocks, spec.h_rows[layer], spec)
        mask = mask & (coordinate < total)[:, None]
        dh = load(d_after, (offset, mask), dtype)
        dc = load(d_after, (offset + spec.hidden * LANES, mask), dtype)
    d_update = tl.full((bn,), 0.0, dtype)
    first_sum, second_sum = d_update, d_update
    d_weights = zeros4(spec.joints[layer], spec.units, dtype)
    d_bias = (zero, zero, zero, zero)
    dx = tl.full((bn, spec.widths[layer]), 0.0, dtype)
    for down in range(steps):
        k = steps - 1 - down
        joint = joint_input(scratch, k, layer, bn, dtype, spec)
        c_before = load(scratch, c_place(k, layer, bn, spec), dtype)
        gate = gates(((joint, w_joint),), bias, phi, layer, spec)
        tanh_c = tanh(gate[1] * c_before + gate[0] * gate[3], spec)
        if top:
            h = gate[2] * tanh_c
            d_update = d_update_at(given, d_update, coordinate, total, k, first_order)
            first, second = head_gradient(h, phi, d_update, spec)
            dh += first[:, None] * read(phi, output_place(0, spec))[None, :]
            d_first += first[:, None] * h
            first_sum += first
            if spec.outputs == 2:
                dh += second[:, None] * read(phi, output_place(1, spec))[None, :]
                d_second += second[:, None] * h
                second_sum += second
        else:
            dh += load(scratch, c_place(k + 1, layer + 1, bn, spec), dtype)
        d, dc = gates_gradient(gate, c_before, tanh_c, dh, dc, spec)
        d_weights = outer(tl.trans(joint), d, d_weights, spec)
        if not has_one:
            d_bias = add_column_sums(d_bias, d)
        dh = inputs_gradient(d, w_h, phi, HIDDEN, spec.units, layer, spec)
        if layer > 0 or not first_order:
            dx = inputs_gradient(d, w_x, phi, INPUTS, spec.widths[layer], layer, spec)
        if layer > 0:
            # Every warp has read what was here, c before step k + 1: since then they have met in the products
            # over coordinates, which go through shared memory.
            store(scratch, c_place(k + 1, layer, bn, spec), dx)
    flush_layer(sums, d_weights, d_bias, layer, spec)
    if top:
        flush_output(sums, d_first, d_second, first_sum, second_sum, spec)
    return dh, dc, dx


@triton.jit
def features_down(grads, state, d_after, d_state, d_grads, dx, coordinate, total, blocks, spec: tl.constexpr):
    """The adjoints of the gradient and of the features' state, from those (BN, W) of the features."""
    dtype: tl.constexpr = dx.dtype
    live = coordinate < total
    grad = tl.load(grads + coordinate, mask=live, other=0.0)
    d_grad = tl.full(coordinate.shape, 0.0, dtype)
    for n in tl.static_range(len(spec.features)):
        before = feature_state(state, coordinate, blocks, n, dtype, spec)
        d_m, d_v, d_step = feature_state(d_after, coordinate, blocks, n, dtype, spec)
        first = column_of(dx, spec.features[n].column)
        second = column_of(dx, spec.features[n].column + 1)
        third = column_of(dx, spec.features[n].column + 2)
        d, d_m, d_v = feature_gradient(n, grad, before, (first, second, third), d_m, d_v, spec)
        d_grad += d
        store_feature_state(d_state, coordinate, blocks, n, d_m, d_v, d_step, spec)
    tl.store(d_grads + coordinate, d_grad, mask=live)
