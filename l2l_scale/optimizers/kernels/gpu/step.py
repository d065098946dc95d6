"""Device code: one inner step forward.

M coordinates in B blocks of BLOCK = 32; a tile of BN of them, a power of two, is one program's work. R rows
of the packed state (B, R, BLOCK), see layout.py.
"""

# mypy: ignore-errors
# See features.py for the conventions of device code.

import triton
import triton.language as tl

from l2l_scale.optimizers.kernels.gpu.features import feature_outputs
from l2l_scale.optimizers.kernels.gpu.lstm import gates, head, tanh
from l2l_scale.optimizers.kernels.gpu.weights import HIDDEN, INPUTS, biases, hold, operand
from l2l_scale.optimizers.kernels.layout import BLOCK

LANES = tl.constexpr(BLOCK)


@triton.jit
def tile_coordinates(tile, bn: tl.constexpr):
    """The numbers (BN,) of a tile's coordinates; in 64 bits, as the state of 10⁸ needs."""
    return tl.cast(tile, tl.int64) * bn + tl.arange(0, bn)


@triton.jit
def row_place(coordinate, blocks, row: tl.constexpr, spec: tl.constexpr):
    """Where one row of the packed state lies for some coordinates: offsets and mask (BN,)."""
    offset = coordinate // LANES * (spec.rows * LANES) + row * LANES + coordinate % LANES
    return offset, coordinate < blocks * LANES


@triton.jit
def rows_place(coordinate, blocks, row: tl.constexpr, spec: tl.constexpr):
    """Where H rows of the packed state from ``row`` on lie: offsets and mask (BN, U)."""
    unit = tl.arange(0, spec.units)[None, :]
    offset, mask = row_place(coordinate, blocks, row, spec)
    return offset[:, None] + unit * LANES, mask[:, None] & (unit < spec.hidden)


@triton.jit
def load(pointer, place, dtype: tl.constexpr):
    """Read, zero where the mask is off, in the precision of the arithmetic."""
    return tl.load(pointer + place[0], mask=place[1], other=0.0).to(dtype)


@triton.jit
def store(pointer, place, value):
    """Write where the mask is on, in the precision of the memory."""
    tl.store(pointer + place[0], value.to(pointer.dtype.element_ty), mask=place[1])


@triton.jit
def feature_state(pointer, coordinate, blocks, n: tl.constexpr, dtype: tl.constexpr, spec: tl.constexpr):
    """The n-th feature's m, v and step: its last row is the step. Zeros for what it has not."""
    feature: tl.constexpr = spec.features[n]
    m, v = tl.full(coordinate.shape, 0.0, dtype), tl.full(coordinate.shape, 0.0, dtype)
    step = tl.full(coordinate.shape, 0.0, dtype)
    if feature.state_rows == 3:
        m = load(pointer, row_place(coordinate, blocks, feature.row, spec), dtype)
        v = load(pointer, row_place(coordinate, blocks, feature.row + 1, spec), dtype)
    if feature.state_rows > 0:
        step = load(pointer, row_place(coordinate, blocks, feature.row + feature.state_rows - 1, spec), dtype)
    return m, v, step


@triton.jit
def store_feature_state(pointer, coordinate, blocks, n: tl.constexpr, m, v, step, spec: tl.constexpr):
    """Write what :func:`feature_state` reads."""
    feature: tl.constexpr = spec.features[n]
    if feature.state_rows == 3:
        store(pointer, row_place(coordinate, blocks, feature.row, spec), m)
        store(pointer, row_place(coordinate, blocks, feature.row + 1, spec), v)
    if feature.state_rows > 0:
        store(pointer, row_place(coordinate, blocks, feature.row + feature.state_rows - 1, spec), step)


@triton.jit
def with_column(x, column, at: tl.constexpr, width: tl.constexpr):
    """Set one column (BN,) of a tile (BN, width)."""
    return tl.where(tl.arange(0, width)[None, :] == at, column[:, None], x)


@triton.jit
def features_step(grad, state, out, coordinate, blocks, spec: tl.constexpr):
    """All features (BN, W) of a gradient (BN,); their state goes from ``state`` to ``out``."""
    dtype: tl.constexpr = grad.dtype
    x = tl.full((grad.shape[0], spec.widths[0]), 0.0, dtype)
    for n in tl.static_range(len(spec.features)):
        m, v, step = feature_state(state, coordinate, blocks, n, dtype, spec)
        first, second, third, m, v, step = feature_outputs(n, grad, m, v, step, spec)
        x = with_column(x, first, spec.features[n].column, spec.widths[0])
        if spec.features[n].size > 1:
            x = with_column(x, second, spec.features[n].column + 1, spec.widths[0])
        if spec.features[n].size > 2:
            x = with_column(x, third, spec.features[n].column + 2, spec.widths[0])
        if spec.features[n].state_rows > 0:
            tl.debug_barrier()  # every thread has read, before one writes
            store_feature_state(out, coordinate, blocks, n, m, v, step, spec)
    return x


@triton.jit(do_not_specialize=["total", "blocks"])
def step_kernel(phi, grad, state, out, update, total, blocks, spec: tl.constexpr, bn: tl.constexpr):
    """One inner step of one tile; ``out`` may be ``state``: every number is read before it is written."""
    coordinate = tile_coordinates(tl.program_id(0), bn)
    dtype: tl.constexpr = phi.dtype.element_ty
    grad_tile = tl.load(grad + coordinate, mask=coordinate < total, other=0.0)
    x = features_step(grad_tile, state, out, coordinate, blocks, spec)
    layers: tl.constexpr = spec.layers
    for layer in tl.static_range(layers):
        h_place = rows_place(coordinate, blocks, spec.h_rows[layer], spec)
        c_place = rows_place(coordinate, blocks, spec.h_rows[layer] + spec.hidden, spec)
        h = operand(load(state, h_place, dtype), spec)
        c = load(state, c_place, dtype)
        from_x = (operand(x, spec), hold(phi, INPUTS, layer, spec))
        from_h = (h, hold(phi, HIDDEN, layer, spec))
        i, f, o, g = gates((from_x, from_h), biases(phi, layer, spec), phi, layer, spec)
        c = f * c + i * g
        x = o * tanh(c, spec)
        tl.debug_barrier()
        store(out, h_place, x)
        store(out, c_place, c)
    tl.store(update + coordinate, head(x, phi, spec), mask=coordinate < total)


INTERPRETED = not isinstance(step_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this module was imported."""
