"""How far the gates of recurrent cells and the head are driven to their limits.

H hidden units of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l2l_scale.diagnosis.thresholds import GATE_CLOSED, GATE_OPEN, HEAD_SATURATED, STILL
from l2l_scale.optimizers import CoordinatewiseLSTM, SharedMemory, TanhExp, UpdateRule
from l2l_scale.optimizers.cells import LSTMCell, lstm_gates
from l2l_scale.optimizers.grouped import BoundGroups
from l2l_scale.optimizers.recurrent import CoordinatewiseRecurrent, GRUCell, RNNCell


class Gate(NamedTuple):
    """One gate of one layer, over all units, coordinates, tasks and inner steps."""

    layer: int
    """Counted from 1."""
    name: str
    """input, forget, output; reset, update; candidate or unit, which are tanh and counted by their size."""
    low: float
    """Share of activations below GATE_CLOSED."""
    high: float
    """Share of activations above GATE_OPEN."""
    part: str = ""
    """The rule's name, if it is one of a grouped rule's."""

    @property
    def place(self) -> str:
        """The layer, with the part's name."""
        return f"{self.part} {self.layer}".strip()

    @property
    def saturated(self) -> float:
        """Share at the limits; near zero a tanh is linear, and not at a limit."""
        return self.high if self.name in ("candidate", "unit") else self.low + self.high


class Insides(NamedTuple):
    """What is known of a rule's insides."""

    gates: tuple[Gate, ...]
    """Empty where the rule has no known cells."""
    still_units: dict[str, float]
    """By :attr:`Gate.place`: share of the units whose activation was always and everywhere the same."""
    head: float | None
    """Share of |tanh(o₁)| above HEAD_SATURATED; None where there is no such head."""


class Tally:
    """Counts values below and above two limits; what is not finite does not count."""

    def __init__(self, low: float, high: float) -> None:
        self.limits = low, high
        self.counts = torch.zeros(3, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count some more."""
        low, high = self.limits
        finite = values.isfinite()
        self.counts += torch.stack([(values < low).sum(), ((values > high) & finite).sum(), finite.sum()])

    @property
    def shares(self) -> tuple[float, float]:
        """Below and above."""
        low, high, count = self.counts.tolist()
        return low / max(count, 1), high / max(count, 1)


class Watch:
    """Gathers what hooks see in some inner steps; :meth:`insides` is the sum.

    Args:
        every: of how many inner steps one is seen, from the first on.
    """

    def __init__(self, every: int = 1) -> None:
        self.every, self.step = every, 0
        self.gates: dict[tuple[str, int, str], Tally] = {}
        self.lowest: dict[tuple[str, int], Tensor] = {}
        self.highest: dict[tuple[str, int], Tensor] = {}
        self.heads = Tally(0.0, HEAD_SATURATED)

    @property
    def sees(self) -> bool:
        """Whether this inner step is seen."""
        return self.step % self.every == 0

    def cell(self, place: tuple[str, int], cell: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """See one step of a layer of a part."""
        x, state = inputs[:2]
        hidden: Tensor = output[0] if isinstance(cell, LSTMCell) else output
        for name, values in gates_of(cell, x, state, hidden).items():
            known = self.gates.setdefault((*place, name), Tally(GATE_CLOSED, GATE_OPEN))
            known.add(values.abs())
        flat = hidden.reshape(-1, hidden.shape[-1]).nan_to_num()
        low, high = flat.amin(0), flat.amax(0)
        self.lowest[place] = torch.minimum(self.lowest.get(place, low), low)
        self.highest[place] = torch.maximum(self.highest.get(place, high), high)

    def insides(self) -> Insides:
        """Everything so far."""
        still = {
            f"{part} {layer}".strip(): float((self.highest[part, layer] - low < STILL).double().mean())
            for (part, layer), low in self.lowest.items()
        }
        gates = [Gate(layer, name, *one.shares, part) for (part, layer, name), one in self.gates.items()]
        return Insides(tuple(gates), still, self.heads.shares[1] if self.heads.counts[2] else None)


def gates_of(cell: nn.Module, x: Tensor, state: Any, hidden: Tensor) -> dict[str, Tensor]:
    """Activations by the gate's name, (*, N, H) each.

    Args:
        cell: an LSTMCell, GRUCell or RNNCell.
        x: its input.
        state: its state before the step.
        hidden: its activation after the step.
    """
    if isinstance(cell, LSTMCell):
        names = ("input", "forget", "output", "candidate")
        return dict(zip(names, lstm_gates(cell, x, state[0]), strict=True))
    if isinstance(cell, GRUCell):
        return dict(zip(("reset", "update", "candidate"), cell.gates(x, state), strict=True))
    return {"unit": hidden}


@contextmanager
def watching(rule: UpdateRule, every: int = 1) -> Iterator[Watch]:
    """Watch the cells and heads of a rule that is computed op by op; nothing of it is changed.

    Args:
        rule: bound to its task.
        every: see one of so many inner steps; who runs the rule counts them in :attr:`Watch.step`.
    """
    watch, handles = Watch(every), []
    for part, one in (rule.parts if isinstance(rule, BoundGroups) else {"": rule}).items():
        cells = [module for module in one.modules() if isinstance(module, LSTMCell | GRUCell | RNNCell)]
        for layer, cell in enumerate(cells, 1):
            handles.append(cell.register_forward_hook(partial(_see_cell, watch, (part, layer))))
        if _has_tanh_head(one):
            handles.append(one.get_submodule("output").register_forward_hook(partial(_see_outputs, watch)))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _see_cell(
    watch: Watch, place: tuple[str, int], cell: nn.Module, inputs: tuple[Any, ...], output: Any
) -> None:
    if watch.sees:
        watch.cell(place, cell, inputs, output)


def _see_outputs(watch: Watch, _: nn.Module, __: Any, outputs: Tensor) -> None:
    if watch.sees:
        watch.heads.add(outputs[..., 0].tanh().abs())


def _has_tanh_head(rule: UpdateRule) -> bool:
    """Whether the first of a rule's linear outputs goes through a tanh."""
    known = isinstance(rule, CoordinatewiseLSTM | CoordinatewiseRecurrent | SharedMemory)
    return known and isinstance(rule.head, TanhExp)
