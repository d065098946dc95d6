"""Device code: where a rule's weights lie in φ, and reading them as operands of matrix products.

Names as in lstm.py. Sums of weight gradients lie as φ does, so the places serve both ways.
"""

# mypy: ignore-errors
# ruff: noqa: RET505
# See features.py for the conventions of device code.

import triton
import triton.language as tl

INPUTS, HIDDEN, JOINT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def operand(x, spec: tl.constexpr):
    """A tile in the precision in which products take it."""
    if spec.product == "bf16":
        return x.to(tl.bfloat16)
    elif (
        spec.product == "rounded"
    ):  # the interpreter has no products of bfloat16, but exact ones of its values
        return x.to(tl.bfloat16).to(tl.float32)
    else:
        return x


@triton.jit
def weight_place(row, gate: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr):
    """Where a gate's weights of joint inputs ``row`` (rows, 1), transposed, lie in φ: offsets and mask."""
    hidden: tl.constexpr = spec.hidden
    inputs: tl.constexpr = spec.inputs[layer]
    unit = gate * hidden + tl.arange(0, spec.units)[None, :]
    recurrent = 4 * hidden * inputs + unit * hidden + row - inputs
    bias = 4 * hidden * (inputs + hidden) + unit
    offset = tl.where(row < inputs, unit * inputs + row, tl.where(row < inputs + hidden, recurrent, bias))
    return spec.offsets[layer] + offset, (row <= inputs + hidden) & (unit < (gate + 1) * hidden)


@triton.jit
def joint_place(gate: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr):
    """Where those (J, U) of all joint inputs lie."""
    return weight_place(tl.arange(0, spec.joints[layer])[:, None], gate, layer, spec)


@triton.jit
def input_place(gate: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr):
    """Where those (W, U) of the layer's inputs lie."""
    row = tl.arange(0, spec.widths[layer])[:, None]
    offset, mask = weight_place(row, gate, layer, spec)
    return offset, mask & (row < spec.inputs[layer])


@triton.jit
def hidden_place(gate: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr):
    """Where those (U, U) of h lie."""
    row = tl.arange(0, spec.units)[:, None]
    offset, mask = weight_place(row + spec.inputs[layer], gate, layer, spec)
    return offset, mask & (row < spec.hidden)


@triton.jit
def bias_place(gate: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr):
    """Where a gate's bias (U,) lies."""
    hidden: tl.constexpr = spec.hidden
    unit = tl.arange(0, spec.units)
    return spec.offsets[layer] + 4 * hidden * (
        spec.inputs[layer] + hidden
    ) + gate * hidden + unit, unit < hidden


@triton.jit
def output_place(output: tl.constexpr, spec: tl.constexpr):
    """Where the output layer's weights (U,) for one output lie."""
    unit = tl.arange(0, spec.units)
    return spec.offsets[spec.layers] + output * spec.hidden + unit, unit < spec.hidden


@triton.jit
def read(pointer, place):
    """Read from φ; zero where the mask is off."""
    return tl.load(pointer + place[0], mask=place[1], other=0.0)


@triton.jit
def read_now(pointer, place):
    """Read from φ here and nowhere else: the compiler would read ahead, and keep all in shared memory."""
    return tl.load(pointer + place[0], mask=place[1], other=0.0, volatile=True)


@triton.jit
def add(pointer, place, value):
    """Add to a sum that no other program touches."""
    tl.store(pointer + place[0], tl.load(pointer + place[0], mask=place[1], other=0.0) + value, mask=place[1])


@triton.jit
def part_place(part: tl.constexpr, gate: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr):
    """Where one gate's weights of one part of the joint inputs, or of all, lie."""
    if part == INPUTS:
        return input_place(gate, layer, spec)
    elif part == HIDDEN:
        return hidden_place(gate, layer, spec)
    else:
        return joint_place(gate, layer, spec)


@triton.jit
def hold(phi, part: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr):
    """All gates' weights of a part for all steps; only φ if shared memory is too small for them."""
    if spec.resident:
        return (
            operand(read(phi, part_place(part, 0, layer, spec)), spec),
            operand(read(phi, part_place(part, 1, layer, spec)), spec),
            operand(read(phi, part_place(part, 2, layer, spec)), spec),
            operand(read(phi, part_place(part, 3, layer, spec)), spec),
        )
    else:
        return phi


@triton.jit
def held(weights, phi, part: tl.constexpr, gate: tl.constexpr, layer: tl.constexpr, spec: tl.constexpr):
    """One gate of what :func:`hold` returned; read now if that was only φ."""
    if spec.resident:
        return weights[gate]
    else:
        return operand(read_now(phi, part_place(part, gate, layer, spec)), spec)


@triton.jit
def biases(phi, layer: tl.constexpr, spec: tl.constexpr):
    """A layer's biases (U,) of four gates."""
    return (
        read(phi, bias_place(0, layer, spec)),
        read(phi, bias_place(1, layer, spec)),
        read(phi, bias_place(2, layer, spec)),
        read(phi, bias_place(3, layer, spec)),
    )
