"""The ways of doing one meta-step that are compared; each is a function without arguments.

A meta-step is the window forward, backward to φ, and Adam on φ. Drawing the window is not part of it for
any method (its cost is a row of its own), nor is the trainer around it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from eager_peer import LOG_SCALE, OUTPUT_SCALE, EagerLSTM, meta_loss
from workloads import Workload

from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.optimizers import CoordinatewiseLSTM, LogSign, ScaledLinear
from l2l_scale.unroll import begin

MetaStep = Callable[[], float]
"""Does one meta-step and returns the meta-loss before it."""

LEARNING_RATE = 1e-3
REFERENCE = "eager PyTorch by hand"
_TOLERANCE = 1e-4  # relative, for float32


def all_methods(workload: Workload) -> dict[str, MetaStep]:
    """All methods by name, the reference first; all start with the same φ."""
    torch.manual_seed(0)
    peer = EagerLSTM()
    return {
        REFERENCE: eager(workload, copy.deepcopy(peer)),
        "l2l_scale, first order": ours(workload, peer, second_order=False),
        "l2l_scale, true gradient": ours(workload, peer, second_order=True),
    }


def check_agreement(steps: dict[str, MetaStep]) -> None:
    """Do one meta-step with each; all must start from the same meta-loss, else they are no peers."""
    values = {name: step() for name, step in steps.items()}
    for name, value in values.items():
        assert math.isclose(value, values[REFERENCE], rel_tol=_TOLERANCE), (name, values)


def eager(workload: Workload, peer: EagerLSTM) -> MetaStep:
    """The peer of :mod:`eager_peer`."""
    batch = workload.batch
    adam = torch.optim.Adam(peer.parameters(), LEARNING_RATE)

    def step() -> float:
        adam.zero_grad()
        total = meta_loss(peer, workload.loss, batch.theta0, batch.task, batch.data, batch.window_length)
        total.backward()
        adam.step()
        return total.item()

    return step


def ours(workload: Workload, peer: EagerLSTM, second_order: bool) -> MetaStep:
    """The calls that training makes, from the peer's weights."""
    batch, family = workload.batch, workload.family
    rule = rule_like(peer)
    estimator = TruncatedBPTT(second_order)
    adam = torch.optim.Adam(rule.parameters(), LEARNING_RATE)
    # Every window starts at the same point, but goes through the restart of slots as in training.
    carry = begin(rule, batch, None)

    def step() -> float:
        adam.zero_grad()
        estimate = estimator(rule, family, begin(rule, batch, carry), batch)
        estimate.surrogate.backward()
        adam.step()
        return estimate.surrogate.item()

    return step


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


def reorder_gates(weight: torch.Tensor) -> torch.Tensor:
    """From torch's gate order (input, forget, candidate, output) to ours, with the candidate last."""
    i, f, g, o = weight.chunk(4)
    return torch.cat([i, f, o, g])
