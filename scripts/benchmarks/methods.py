"""The ways of doing one meta-step in PyTorch that are compared.

A meta-step is the window forward, backward to φ, and Adam on φ. Drawing the window is not part of it for
any backend (its cost is a number of its own), nor is the trainer around it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from backends import rule_of
from eager_peer import LOG_SCALE, OUTPUT_SCALE, EagerLSTM, meta_loss
from torch import Tensor
from workloads import Workload

from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.optimizers import (
    CoordinatewiseLSTM,
    GlobalAveraging,
    LogSign,
    ScaledLinear,
    SharedMemory,
    SteeredMemory,
    UpdateRule,
)
from l2l_scale.optimizers.backend import Backend, accelerate
from l2l_scale.tree import tree_detach
from l2l_scale.unroll import Carry, begin

LEARNING_RATE = 1e-3
TRUE = "-true"
"""Ends the name of a backend that computes the true meta-gradient instead of the first-order one."""


class Method(Protocol):
    """One way of doing a meta-step."""

    description: str

    def restart(self) -> None:
        """Go back to the first φ."""

    def step(self) -> float:
        """One meta-step; returns the meta-loss before it."""


def make(backend: str, workload: Workload) -> Method:
    """The method of a backend; all start with the same φ."""
    if backend == "peer":
        return Peer(workload, first_weights())
    name, rule = backend.removesuffix(TRUE), rule_of(backend)
    name = cast("Backend", name.removesuffix(f"-{rule}"))
    return Training(workload, make_rule(rule), name, second_order=backend.endswith(TRUE))


def make_rule(name: str) -> UpdateRule:
    """A rule of its first φ: the peer's LSTM, or one whose coordinates hear of each other."""
    if name == "lstm":
        return rule_like(first_weights())
    torch.manual_seed(0)
    features, head = LogSign(LOG_SCALE), ScaledLinear(OUTPUT_SCALE)
    if name == "gac":
        return CoordinatewiseLSTM(features=features, head=head, sharing=GlobalAveraging())
    return SharedMemory(features=features, head=head) if name == "ntm" else SteeredMemory()


def first_weights() -> EagerLSTM:
    """The φ that all start with."""
    torch.manual_seed(0)
    return EagerLSTM()


def plain_weights() -> dict[str, Tensor]:
    """The same for peers in other libraries: per layer input, hidden (4H, ·), bias (4H,); output (H,), ()."""
    peer = first_weights()
    weights = {"output": peer.output.weight[0], "output_bias": peer.output.bias[0]}
    for name, cell in (("lower", peer.lower), ("upper", peer.upper)):
        weights[f"{name}_input"], weights[f"{name}_hidden"] = cell.weight_ih, cell.weight_hh
        weights[f"{name}_bias"] = cell.bias_ih + cell.bias_hh
    return {name: weight.detach() for name, weight in weights.items()}


class Peer:
    """Plain PyTorch written by hand, of :mod:`eager_peer`."""

    description = f"plain PyTorch {torch.__version__}"

    def __init__(self, workload: Workload, peer: EagerLSTM) -> None:
        self.workload, self.peer = workload, peer
        self.start = copy.deepcopy(peer.state_dict())
        self.restart()

    def restart(self) -> None:
        """Go back to the first φ."""
        self.peer.load_state_dict(self.start)
        self.adam = torch.optim.Adam(self.peer.parameters(), LEARNING_RATE)

    def step(self) -> float:
        """One meta-step; returns the meta-loss before it."""
        batch = self.workload.batch
        self.adam.zero_grad()
        data = batch.theta0, batch.task, batch.data, batch.window_length
        total = meta_loss(self.peer, self.workload.loss, *data)
        total.backward()
        self.adam.step()
        return total.item()


class Training:
    """The calls that ``MetaTraining.training_step`` makes."""

    def __init__(self, workload: Workload, rule: UpdateRule, backend: Backend, second_order: bool) -> None:
        self.workload, self.rule = workload, rule
        self.estimator = TruncatedBPTT(second_order)
        # With the restart of slots as in training; in this first window all slots start, every time.
        self.carry: Carry | None = None
        batch = workload.batch
        self.accelerated = accelerate(self.rule, backend, batch.theta0.device, batch.theta0.dtype)
        self.description = self.accelerated.description
        self.start: Mapping[str, Any] = copy.deepcopy(self.rule.state_dict())
        self.restart()

    def restart(self) -> None:
        """Go back to the first φ."""
        self.carry = None
        self.rule.load_state_dict(self.start)
        self.adam = torch.optim.Adam(self.rule.parameters(), LEARNING_RATE)

    def step(self) -> float:
        """One meta-step; returns the meta-loss before it."""
        batch, family = self.workload.batch, self.workload.family
        carry, self.carry = begin(self.rule, batch, self.carry), None
        estimate = self.estimator(self.accelerated.rule, family, carry, batch)
        self.carry = tree_detach(estimate.rollout).carry
        self.adam.zero_grad()
        estimate.surrogate.backward()
        self.adam.step()
        return estimate.surrogate.item()


def rule_like(peer: EagerLSTM) -> CoordinatewiseLSTM:
    """Our rule with the peer's weights, so that both must find the same meta-loss and meta-gradient."""
    rule = CoordinatewiseLSTM(
        peer.hidden_size, layers=2, features=LogSign(LOG_SCALE), head=ScaledLinear(OUTPUT_SCALE)
    ).to(peer.output.weight.dtype)
    with torch.no_grad():
        for ours, theirs in zip(rule.network.cells, (peer.lower, peer.upper), strict=True):
            ours.weight_input.copy_(reorder_gates(theirs.weight_ih))
            ours.weight_hidden.copy_(reorder_gates(theirs.weight_hh))
            ours.bias.copy_(reorder_gates(theirs.bias_ih + theirs.bias_hh))
    rule.output.load_state_dict(peer.output.state_dict())
    return rule


def reorder_gates(weight: Tensor) -> Tensor:
    """From torch's gate order (input, forget, candidate, output) to ours, with the candidate last."""
    i, f, g, o = weight.chunk(4)
    return torch.cat([i, f, o, g])
