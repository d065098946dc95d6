"""A quasi-Newton memory that a network steers: what is written is what BFGS writes, how much is learned."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from l2l_scale.checks import check_count, check_positive, check_range
from l2l_scale.optimizers import safeguards
from l2l_scale.optimizers.cells import Computing, GlobalAveraging
from l2l_scale.optimizers.memory import Storage, check_storage, is_dense
from l2l_scale.optimizers.network_rule import NetworkRule, check_network
from l2l_scale.optimizers.quasi_newton import (
    DenseSecantMemory,
    SecantMemory,
    WindowedSecantMemory,
    dot,
    norm,
    reciprocal,
)
from l2l_scale.optimizers.safeguards import (
    Lengths,
    Offer,
    Trial,
    correction,
    has_curvature,
    judge,
    next_lengths,
    start_again,
)
from l2l_scale.optimizers.steering import Observations, Steering, SteeringNetwork
from l2l_scale.tree import Tree

_VECTORS, _NUMBERS = 3, 10
"""What the network sees, see :meth:`SteeredMemory._observe`."""


class SteeredState(NamedTuple):
    """What the rule remembers; numbers are (*, 1)."""

    network: Tree
    memory: Tree
    anchor: Tensor
    """(*, N): the best point so far, from which steps start."""
    gradient: Tensor
    """(*, N): ∇f there."""
    lengths: Lengths
    steepness: Tensor
    directions: Tensor
    """How many directions have become known since the memory was cleared."""
    started: Tensor
    """One, or zero before the first step."""


class SteeredMemory(NetworkRule):
    """Quasi-Newton steps from a memory of the rule's own steps s and gradient changes y, steered by an LSTM.

    With M = K + γ P D Pᵀ as in :mod:`quasi_newton`, the trial point is anchor − κ K ∇ − γ P D Pᵀ ∇. At the
    next gradient the trial is judged (:mod:`safeguards`): the better of the two points becomes the anchor;
    the part of (s, y) that is conjugate to what is known, or else the pair itself, is written as BFGS writes
    it if its curvature is more than rounding; γ follows the measured corrections. On quadratics this is
    conjugate gradients with one gradient per step instead of a line search.

    The network sees the gradient, s and y relative to their norms, and some numbers of the problem. It sets
    D, factors on γ and κ, and how pairs are damped: all within bounds, so that it cannot switch the
    safeguards off. Before training its outputs are near zero, and the rule is the hand-designed method.

    Args:
        hidden_size: H, units per layer.
        layers: LSTM layers.
        sharing: global averaging cells; 2 per layer if not given.
        first_step: length of the first step relative to the gradient, where training starts; it is learned.
        newness: share of the curvature sᵀy that must lie in unknown directions for a conjugate pair to be
            written instead of the pair itself. Low values rest on the memory of a quadratic, high ones renew
            it.
        patience: failures in a row after which the memory is cleared.
        freedom: the largest factor by which the network can lengthen or shorten a step.
        storage: of the memory: "dense" is (N, N), "window" the last pairs; "auto" is dense up to
            ``max_dense``.
        window: pairs that a window holds.
        max_dense: largest N of a dense memory if the storage is "auto".
        precision: of the memory and of sums over coordinates. "double" costs little for small problems, and
            in ill-conditioned ones rounding in M is what ends progress; "same" is that of θ.
        forget_bias: initial bias of the forget gates.
        output_scale: factor on the initial weights of the output layer.
        chunk: how many coordinates the network computes at once, to save memory; all if not given.

    Raises:
        ValueError: if a number or choice is out of range.
    """

    safeguarded = True

    def __init__(
        self,
        hidden_size: int = 20,
        layers: int = 1,
        sharing: GlobalAveraging | None = None,
        first_step: float = 0.01,
        newness: float = 0.01,
        patience: int = 5,
        freedom: float = 4.0,
        storage: Storage = "auto",
        window: int = 10,
        max_dense: int = 256,
        precision: Literal["double", "same"] = "double",
        forget_bias: float = 1.0,
        output_scale: float = 0.1,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        check_network(hidden_size, layers, forget_bias, output_scale, chunk)
        check_storage(storage, window, max_dense)
        check_count("patience", patience)
        check_positive("first_step", first_step)
        check_range("newness", newness, 0, 1)
        check_range("freedom", freedom, 1, 100)
        if precision not in ("double", "same"):
            raise ValueError(f"precision ({precision!r}) must be 'double' or 'same'")
        self.hidden_size, self.layers = hidden_size, layers
        self.sharing: GlobalAveraging = GlobalAveraging() if sharing is None else sharing
        self.first_step, self.newness, self.patience, self.freedom = first_step, newness, patience, freedom
        self.storage, self.window, self.max_dense, self.precision = storage, window, max_dense, precision
        self.forget_bias, self.output_scale, self.chunk = forget_bias, output_scale, chunk
        self.computing = Computing(chunk=chunk)
        self.log_first_step = nn.Parameter(torch.tensor(math.log(first_step)))
        self.network = SteeringNetwork(
            _VECTORS, _NUMBERS, hidden_size, layers, self.sharing, freedom, forget_bias, output_scale
        )

    def memory_of(self, size: int) -> SecantMemory:
        """The storage for problems of ``size`` coordinates."""
        dense = is_dense(self.storage, size, self.max_dense)
        return DenseSecantMemory() if dense else WindowedSecantMemory(self.window)

    def storage_for(self, size: int) -> str:
        """How the memory of problems of ``size`` coordinates is stored, for the log."""
        if is_dense(self.storage, size, self.max_dense):
            return f"dense quasi-Newton memory, two matrices of {size} × {size}"
        return f"quasi-Newton memory of the last {self.window} pairs"

    def init_state(self, theta: Tensor) -> SteeredState:
        """An empty memory at ``theta`` (*, N)."""
        work = theta.double() if self.precision == "double" else theta
        zero = torch.zeros_like(work[..., :1])
        return SteeredState(
            self.network.init_state(theta),
            self.memory_of(theta.shape[-1]).init(work),
            anchor=work,
            gradient=torch.zeros_like(work),
            lengths=Lengths(explore=zero, trust=zero + 1, failures=zero),
            steepness=zero,
            directions=zero,
            started=zero,
        )

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step: judge the last one, write what it taught, and try the next."""
        memory, eps = self.memory_of(theta.shape[-1]), torch.finfo(grad.dtype).eps
        point, gradient = theta.to(state.anchor), grad.to(state.anchor)
        state = self._begin(state, gradient)
        trial = judge(point, gradient, state.anchor, state.gradient, state.steepness, eps)
        offer = self._select(memory, state, trial)
        seen = self._observe(state, trial, offer)
        steering, network = self.network(seen, state.network, self.computing)
        state, offer = self._write(memory, state, trial, offer, steering)
        state = self._adapt(memory, state, trial, offer)._replace(network=network)
        converged = norm(state.gradient) <= trial.noise / 2
        step = self._step(memory, state, steering).masked_fill(converged, 0.0)
        update = (state.anchor - step - point).to(theta.dtype)
        started = torch.maximum(state.started, gradient.isfinite().all(-1, keepdim=True).to(state.started))
        return update, state._replace(started=started)

    def _begin(self, state: SteeredState, gradient: Tensor) -> SteeredState:
        """The first finite gradient is that of the anchor, and the first step length is the learned one."""
        started, first = state.started > 0, self.log_first_step.exp().to(gradient)
        finite = gradient.isfinite().all(-1, keepdim=True)
        explore = torch.where(started, state.lengths.explore, first)
        return state._replace(
            gradient=torch.where(started, state.gradient, torch.where(finite, gradient, 0.0)),
            lengths=state.lengths._replace(explore=explore),
        )

    def _select(self, memory: SecantMemory, state: SteeredState, trial: Trial) -> Offer:
        """What a trial offers to the memory: its part in unknown directions, or all of it, or nothing."""
        s, y = memory.unknown(state.memory, trial.s), memory.unknown_transposed(state.memory, trial.y)
        unknown = ~self._complete(memory, state.directions, trial)
        share = dot(s, y) > self.newness * dot(trial.s, trial.y)
        new = has_curvature(s, y, trial.noise) & share & unknown
        surprise = norm(trial.s - self._expected(memory, state, trial.y))
        surprised = surprise > safeguards.DISCREPANCY * norm(trial.s)
        whole = has_curvature(trial.s, trial.y, trial.noise) & surprised & ~new
        square = dot(y, y)
        scale = dot(s, y) * reciprocal(square, square > 0)
        return Offer(s, y, new, whole, scale, correction(s, y, state.gradient))

    def _expected(self, memory: SecantMemory, state: SteeredState, y: Tensor) -> Tensor:
        """The step that memory expects to cause a change y of the gradient, M y."""
        rest = memory.unknown(state.memory, memory.unknown_transposed(state.memory, y))
        return memory.known(state.memory, y) + state.lengths.explore * rest

    def _observe(self, state: SteeredState, trial: Trial, offer: Offer) -> Observations:
        """What the network sees of a trial."""
        vectors = (state.gradient + trial.y, trial.s, trial.y)
        sizes = (norm(state.gradient), norm(trial.y), norm(trial.s), *state.lengths[:2])
        flags = (trial.improved, offer.new, offer.whole)
        return Observations(vectors, (*sizes, offer.correction, offer.scale), flags)

    def _write(
        self, memory: SecantMemory, state: SteeredState, trial: Trial, offer: Offer, steering: Steering
    ) -> tuple[SteeredState, Offer]:
        """Write the pair as the network wants it, and say what was written; the anchor moves if it can."""
        toward = steering.conjugate * offer.new
        s, y = (raw + toward * (part - raw) for raw, part in ((trial.s, offer.s), (trial.y, offer.y)))
        s = s + (1 - steering.accept) * (self._expected(memory, state, y) - s)
        curvature = dot(s, y)
        where = (offer.new | offer.whole) & (reciprocal(curvature, curvature > 0) > 0)
        state = state._replace(
            memory=memory.write(state.memory, s, y, where),
            anchor=torch.where(trial.improved, state.anchor + trial.s, state.anchor),
            gradient=torch.where(trial.improved, state.gradient + trial.y, state.gradient),
        )
        return state, offer._replace(new=offer.new & where, whole=offer.whole & where)

    def _adapt(self, memory: SecantMemory, state: SteeredState, trial: Trial, offer: Offer) -> SteeredState:
        """Lengths for the next trial; what failed too often starts again from an empty memory."""
        lengths = next_lengths(state.lengths, trial, offer, state.directions == 0)
        directions, again = state.directions + offer.new, lengths.failures >= self.patience
        return state._replace(
            memory=memory.clear(state.memory, self._complete(memory, directions, trial), again),
            lengths=start_again(lengths, again, trial.steepness),
            directions=directions.masked_fill(again, 0.0),
            steepness=trial.steepness,
        )

    def _complete(self, memory: SecantMemory, directions: Tensor, trial: Trial) -> Tensor:
        """Whether every direction is known; a window that forgets pairs never knows them all."""
        size = trial.s.shape[-1]
        return (directions >= size) & memory.holds_all(size)

    def _step(self, memory: SecantMemory, state: SteeredState, steering: Steering) -> Tensor:
        """κ K ∇ + γ P D Pᵀ ∇ at the anchor."""
        known = state.lengths.trust * steering.trust * memory.known(state.memory, state.gradient)
        rest = steering.coordinates * memory.unknown_transposed(state.memory, state.gradient)
        explore = state.lengths.explore * steering.explore
        return known + explore * memory.unknown(state.memory, rest)
