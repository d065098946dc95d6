"""Findings about a rule's insides: gates, units and the head."""

from __future__ import annotations

from collections.abc import Iterator

from l2l_scale.diagnosis.finding import Finding, graded
from l2l_scale.diagnosis.saturation import Gate, Insides
from l2l_scale.diagnosis.thresholds import GATES_LOOK, GATES_PROBLEM, HEAD_LOOK, STILL_LOOK, STILL_PROBLEM


def of_insides(inside: Insides) -> Iterator[Finding]:
    """Gates, units that say nothing, and the head."""
    if not inside.gates:
        yield Finding("ok", "gates", "the rule has no cells that are known here; nothing was measured")
    else:
        yield from _of_gates(inside.gates)
        yield from _of_still_units(inside.still_units)
    if inside.head is not None:
        text = f"{inside.head:.1%} of tanh(o₁) saturated"
        advice = "updates are signs: lower output_scale, or train with less model.learning_rate"
        bad = inside.head > HEAD_LOOK
        yield Finding("look" if bad else "ok", "head", text, advice if bad else "")


def _of_gates(gates: tuple[Gate, ...]) -> Iterator[Finding]:
    advice = (
        "inputs are too large or weights have grown: scale the features (RNNprop, LogSign), lower "
        "model.learning_rate, or set forget_bias (keep_bias) nearer to 1"
    )
    fine = True
    for gate in gates:
        severity = graded(gate.saturated, GATES_LOOK, GATES_PROBLEM)
        keeps = gate.name in ("forget", "update") and gate.high > gate.low
        if severity == "ok" or (keeps and severity == "look"):
            continue
        fine = False
        where = f"{gate.name} {'units' if gate.name == 'unit' else 'gate'} of layer {gate.place}"
        shares = f"{gate.low:.0%} closed, {gate.high:.0%} open"
        yield Finding(severity, "gates", f"{where} saturated: {shares}", advice)
    if fine:
        worst = max(gates, key=lambda gate: gate.saturated)
        where = f"{worst.name} of layer {worst.place}, {worst.saturated:.0%}"
        yield Finding("ok", "gates", f"no gate is stuck; most at their limits: {where}")


def _of_still_units(shares: dict[str, float]) -> Iterator[Finding]:
    for layer, share in shares.items():
        severity = graded(share, STILL_LOOK, STILL_PROBLEM)
        if severity != "ok":
            text = f"{share:.0%} of the units of layer {layer} never change"
            advice = "the layer says nothing: look at gates and at the features' scale; use fewer units"
            yield Finding(severity, "units", text, advice)
