"""Device code: phase 2 of a window, and the derivative of one step.

A fixed number of programs share the tiles. For each tile a program goes layer by layer: first up, through all
K steps, then down, from the last step to the first, computing the gates again. So only one layer's weights
and their gradients are live at a time. On the way down, the scratch's place of c after a step, no longer
needed, takes the adjoint of what the layer below handed up. Sums of weight gradients are each program's own,
in φ's layout: no two programs add to one number, so results do not depend on timing.
"""

# mypy: ignore-errors
# See features.py for the conventions of device code.

import triton
import triton.language as tl

from l2l_scale.optimizers.kernels.gpu.backward import features_down, layer_down
from l2l_scale.optimizers.kernels.gpu.step import rows_place, store, tile_coordinates
from l2l_scale.optimizers.kernels.gpu.window import tile_up


@triton.jit
def own_memory(scratch, sums, steps, bn: tl.constexpr, spec: tl.constexpr):
    """The program's own part of the scratch and of the sums."""
    program = tl.program_id(0).to(tl.int64)
    return scratch + program * (steps + 1) * spec.columns * bn, sums + program * spec.weights


@triton.jit(do_not_specialize=["total", "per_problem", "problems", "blocks", "steps", "tiles"])
def window_kernel(
    phi,
    grads,
    loss_weights,
    state,
    scratch,
    sums,
    total,
    per_problem,
    problems,
    blocks,
    steps,
    tiles,
    spec: tl.constexpr,
    bn: tl.constexpr,
):
    """Phase 2 of a first-order window: the weight gradients (programs, weights)."""
    scratch, sums = own_memory(scratch, sums, steps, bn, spec)
    total = tl.cast(total, tl.int64)
    layers: tl.constexpr = spec.layers
    given = (grads, loss_weights, per_problem, problems)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = tile_coordinates(tile, bn)
        tile_up(phi, grads, state, scratch, at, total, blocks, steps, bn, spec)
        for layer in tl.static_range(layers - 1, -1, -1):
            layer_down(phi, given, state, scratch, sums, at, total, blocks, steps, layer, True, bn, spec)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["total", "blocks", "steps", "tiles"])
def step_gradient_kernel(
    phi,
    grads,
    d_updates,
    state,
    d_after,
    scratch,
    sums,
    d_state,
    d_grads,
    total,
    blocks,
    steps,
    tiles,
    spec: tl.constexpr,
    bn: tl.constexpr,
):
    """The derivative of one step: as a window of one step, with adjoints that come in and go out.

    ``steps`` is 1. The compiler must not know: it would unroll the loops, and run out of registers.
    """
    scratch, sums = own_memory(scratch, sums, steps, bn, spec)
    total = tl.cast(total, tl.int64)
    layers: tl.constexpr = spec.layers
    given = (d_updates,)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        at = tile_coordinates(tile, bn)
        tile_up(phi, grads, state, scratch, at, total, blocks, steps, bn, spec)
        for layer in tl.static_range(layers - 1, -1, -1):
            dh, dc, dx = layer_down(
                phi, given, d_after, scratch, sums, at, total, blocks, steps, layer, False, bn, spec
            )
            store(d_state, rows_place(at, blocks, spec.h_rows[layer], spec), dh)
            store(d_state, rows_place(at, blocks, spec.h_rows[layer] + spec.hidden, spec), dc)
            if layer == 0:
                features_down(grads, state, d_after, d_state, d_grads, dx, at, total, blocks, spec)
            tl.debug_barrier()
