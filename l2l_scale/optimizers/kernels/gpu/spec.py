"""A rule in compile-time constants for the Triton kernels: sizes, padded sizes, where everything lies.

H units padded to U, I inputs of a layer padded to W, inputs and h side by side padded to J. Products take
powers of two from 16 on; on Hopper's tensor cores, results of 64 rows at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from l2l_scale.optimizers.kernels.program import FeatureCode, FeatureKind, Program

Product: TypeAlias = Literal["ieee", "tf32x3", "bf16", "rounded"]
"""How matrix products are computed: in float32; in three passes of tf32; in bfloat16 with sums in float32; in
float32 with operands rounded to bfloat16, for the interpreter."""


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """One feature."""

    kind: int
    size: int
    column: int
    """Of its first output among all features' outputs."""
    row: int
    """Of its state among the rows of the packed state."""
    state_rows: int
    """One or three if it has a state."""
    a: float
    b: float
    c: float
    threshold: float
    """e^-a, where the feature has such a threshold."""
    gain: float
    """e^a"""
    log_a: float
    """log β1 of RNNprop."""
    log_b: float
    """log β2 of RNNprop."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A program, see :mod:`program`."""

    hidden: int
    units: int
    """U."""
    layers: int
    inputs: tuple[int, ...]
    """I of each layer."""
    widths: tuple[int, ...]
    """W of each layer."""
    joints: tuple[int, ...]
    """J of each layer; J > I + H leaves a column for the bias."""
    features: tuple[FeatureSpec, ...]
    outputs: int
    """Linear outputs per coordinate."""
    scale: float
    exp_scale: float
    rows: int
    """R, of the packed state."""
    h_rows: tuple[int, ...]
    """First row of each layer's h; c follows."""
    columns: int
    """Numbers per coordinate in one slot of the scratch."""
    joint_columns: tuple[int, ...]
    """First column of each layer's joint inputs in a slot; c follows, J columns later."""
    offsets: tuple[int, ...]
    """Where in φ each layer's weights start, and then the output layer's."""
    weights: int
    """Length of φ."""
    product: Product
    resident: bool
    """Whether a layer's weights stay in shared memory for all steps; wide layers in float32 do not fit."""
    fast: bool
    """Take the GPU's own tanh, good to 2^-11."""


def make_spec(program: Program, product: Product, fast: bool = False) -> Spec:
    """Work out everything."""
    h, layers = program.hidden_size, range(program.layers)
    units = _padded(h)
    inputs = tuple(program.feature_size if layer == 0 else h for layer in layers)
    least = 16 if product in ("ieee", "rounded") else 64
    joints = tuple(_padded(size + h, least) for size in inputs)
    offsets = [0]
    for size in inputs:
        offsets.append(offsets[-1] + 4 * h * (size + h + 1))
    columns = [0]
    for joint in joints:
        columns.append(columns[-1] + joint + units)
    return Spec(
        hidden=h,
        units=units,
        layers=program.layers,
        inputs=inputs,
        widths=tuple(_padded(size) for size in inputs),
        joints=joints,
        features=tuple(_feature_specs(program.features)),
        outputs=program.head_size,
        scale=program.scale,
        exp_scale=program.exp_scale,
        rows=program.state_rows,
        h_rows=tuple(program.feature_rows + 2 * layer * h for layer in layers),
        columns=columns[-1],
        joint_columns=tuple(columns[:-1]),
        offsets=tuple(offsets),
        weights=offsets[-1] + program.head_size * (h + 1),
        product=product,
        resident=product == "bf16" or units <= 32,
        fast=fast,
    )


def _feature_specs(codes: tuple[FeatureCode, ...]) -> list[FeatureSpec]:
    specs: list[FeatureSpec] = []
    column = row = 0
    for code in codes:
        a, b, c = code.numbers
        bounded = code.kind in (FeatureKind.LOG_SIGN, FeatureKind.LOG_SIGN_CLAMP)
        moving = code.kind is FeatureKind.RNNPROP
        spec = FeatureSpec(
            kind=int(code.kind),
            size=code.size,
            column=column,
            row=row,
            state_rows=code.state_rows,
            a=a,
            b=b,
            c=c,
            threshold=math.exp(-a) if bounded else 0.0,
            gain=math.exp(a) if bounded else 0.0,
            log_a=_log(a) if moving else 0.0,
            log_b=_log(b) if moving else 0.0,
        )
        specs.append(spec)
        column, row = column + code.size, row + code.state_rows
    return specs


def _log(beta: float) -> float:
    """log β; −∞ for 0, whose powers are then 0 too."""
    return math.log(beta) if beta > 0 else -math.inf


def _padded(size: int, least: int = 16) -> int:
    return max(least, 1 << (size - 1).bit_length())
