"""NTM-BFGS: an LSTM with global averaging cells and a memory (Andrychowicz et al. 2016, appendix B)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from l2l_scale.checks import check_count, check_positive, check_range
from l2l_scale.optimizers.cells import Computing, GlobalAveraging, StackedLSTM
from l2l_scale.optimizers.features import Feature, Identity
from l2l_scale.optimizers.heads import Head, ScaledLinear
from l2l_scale.optimizers.memory import (
    DenseMemory,
    Memory,
    Storage,
    WindowedMemory,
    check_storage,
    is_dense,
)
from l2l_scale.optimizers.network_rule import NetworkRule, check_network, output_layer
from l2l_scale.optimizers.quasi_newton import norm
from l2l_scale.tree import Tree


class SharedMemoryState(NamedTuple):
    """What the rule remembers."""

    features: Tree
    network: Tree
    memory: Tree
    read: Tensor
    """(*, N, R): the last read result, an input of the controller."""


class SharedMemory(NetworkRule):
    """A controller that acts on every coordinate, and a memory M (N, N) that those of a problem share.

    In every inner step each read head emits r per coordinate, and M r goes back into the controller at the
    next step; each write head emits a and b, and M ← decay · M + Σ a bᵀ. The defaults are the paper's
    construction: 1 read head, 3 write heads and 2 global averaging cells can simulate BFGS. What the paper
    leaves open, its M_0 above all, is an argument here.

    Args:
        hidden_size: H, units per layer of the controller.
        layers: its LSTM layers.
        features: what it sees of the gradient, besides the read results; the gradient itself if not given.
        head: how its outputs become updates; ``ScaledLinear(0.1)`` if not given.
        sharing: its global averaging cells; 2 per layer if not given.
        read_heads: R, at least 1.
        write_heads: W, at least 1.
        initial_memory: M_0 = initial_memory · I. At 1 the first read is r itself, as in BFGS; at 0 nothing
            can be read before something was written.
        decay: share of M that is left after a step; 1 keeps everything, as in the paper.
        normalization: of written vectors. "none" takes them as they are, as in the paper. "mean" divides b
            by N: a read is then a mean over the coordinates instead of a sum, and does not grow with N.
            "unit" makes a and b unit vectors, and the write gate alone says how much is written.
        write_gate: multiply what a head writes by a number in (0, 1) that the coordinates agree upon (the
            mean of their outputs, through a sigmoid).
        gradient_read: add the gradient to the first read head's r, so that M ∇ is there to be used from the
            start. In the paper the controller has to learn r = ∇.
        direct: scale of a direct path from the read results to the update,
            Σ_r direct · tanh(gate_r) · (M r)_r with a gate per coordinate; 0, as in the paper, leaves it out.
        storage: of M. "dense" is (N, N), "window" the last writes; "auto" is dense up to ``max_dense``.
        window: writes that a window holds; older ones are forgotten.
        max_dense: largest N of a dense memory if the storage is "auto".
        forget_bias: initial bias of the forget gates.
        output_scale: factor on the initial weights of the output layer.
        chunk: how many coordinates the controller computes at once, to save memory; all if not given.

    Raises:
        ValueError: if a number or choice is out of range.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        layers: int = 2,
        features: Feature | None = None,
        head: Head | None = None,
        sharing: GlobalAveraging | None = None,
        read_heads: int = 1,
        write_heads: int = 3,
        initial_memory: float = 1.0,
        decay: float = 1.0,
        normalization: Literal["none", "mean", "unit"] = "none",
        write_gate: bool = False,
        gradient_read: bool = False,
        direct: float = 0.0,
        storage: Storage = "auto",
        window: int = 10,
        max_dense: int = 256,
        forget_bias: float = 1.0,
        output_scale: float = 0.1,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        check_network(hidden_size, layers, forget_bias, output_scale, chunk)
        check_storage(storage, window, max_dense)
        check_count("read_heads", read_heads)
        check_count("write_heads", write_heads)
        check_range("initial_memory", initial_memory, -1e6, 1e6)
        check_range("decay", decay, 0, 1)
        check_positive("direct", direct, zero=True)
        if normalization not in ("none", "mean", "unit"):
            raise ValueError(f"normalization ({normalization!r}) must be 'none', 'mean' or 'unit'")
        self.hidden_size, self.layers = hidden_size, layers
        self.features = Identity() if features is None else features
        self.head = ScaledLinear() if head is None else head
        self.sharing: GlobalAveraging = GlobalAveraging() if sharing is None else sharing
        self.read_heads, self.write_heads = read_heads, write_heads
        self.initial_memory, self.decay, self.normalization = initial_memory, decay, normalization
        self.write_gate, self.gradient_read, self.direct = write_gate, gradient_read, direct
        self.storage, self.window, self.max_dense = storage, window, max_dense
        self.forget_bias, self.output_scale, self.chunk = forget_bias, output_scale, chunk
        self.computing = Computing(chunk=chunk)
        inputs = self.features.size + read_heads
        self.network = StackedLSTM(inputs, hidden_size, layers, forget_bias, self.sharing)
        self.output = output_layer(hidden_size, sum(self._sizes()), output_scale)

    def _sizes(self) -> list[int]:
        """How the linear outputs of a coordinate are divided: update, r, a, b, write gates, direct gates."""
        gates = self.write_heads if self.write_gate else 0
        direct = self.read_heads if self.direct else 0
        return [self.head.size, self.read_heads, self.write_heads, self.write_heads, gates, direct]

    def memory_of(self, size: int) -> Memory:
        """The storage for problems of ``size`` coordinates."""
        if is_dense(self.storage, size, self.max_dense):
            return DenseMemory(self.initial_memory)
        return WindowedMemory(self.initial_memory, self.window, self.write_heads)

    def storage_for(self, size: int) -> str:
        """How the memory of problems of ``size`` coordinates is stored, for the log."""
        if is_dense(self.storage, size, self.max_dense):
            return f"dense shared memory, {size} × {size}"
        return f"shared memory as a window of {self.window} writes of {self.write_heads} vectors"

    def init_state(self, theta: Tensor) -> SharedMemoryState:
        """The initial memory, and zeros."""
        return SharedMemoryState(
            self.features.init_state(theta),
            self.network.init_state(theta),
            self.memory_of(theta.shape[-1]).init(theta),
            theta.new_zeros(*theta.shape, self.read_heads),
        )

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step: read, then write; θ itself is not looked at."""
        memory, tree = self.memory_of(grad.shape[-1]), state.memory
        features, feature_state = self.features(grad, state.features)
        inputs = torch.cat((features, state.read), dim=-1)
        hidden, network_state = self.network(inputs, state.network, self.computing)
        outputs, r, a, b, gates, direct = self.output(hidden).split(self._sizes(), dim=-1)
        if self.gradient_read:
            r = torch.cat((r[..., :1] + grad.unsqueeze(-1), r[..., 1:]), dim=-1)
        read = memory.read(tree, r)
        update = self.head(outputs)
        if self.direct:
            update = update + self.direct * (direct.tanh() * read).sum(-1)
        tree = memory.write(tree, *self._written(a, b, gates), self.decay)
        return update, SharedMemoryState(feature_state, network_state, tree, read)

    def _written(self, a: Tensor, b: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors of the outer products, (*, N, W), normalised and gated."""
        if self.normalization == "mean":
            b = b / b.shape[-2]
        if self.normalization == "unit":
            a, b = (v / (norm(v.mT).mT + 1e-6) for v in (a, b))
        return (a * gates.mean(-2, keepdim=True).sigmoid() if self.write_gate else a), b
