"""The coordinatewise LSTM optimizer of Andrychowicz et al. 2016 (section 2.1)."""

from __future__ import annotations

from torch import Tensor

from l2l_scale.optimizers.cells import Computing, GlobalAveraging, StackedLSTM
from l2l_scale.optimizers.features import Feature, Identity
from l2l_scale.optimizers.heads import Head, ScaledLinear
from l2l_scale.optimizers.network_rule import NetworkRule, check_network, output_layer
from l2l_scale.tree import Tree


class CoordinatewiseLSTM(NetworkRule):
    """One small LSTM, its weights shared by all coordinates, its state each coordinate's own.

    Coordinates hear nothing of each other, unless some cells are global averaging cells ("LSTM+GAC").

    Args:
        hidden_size: H, units per layer; at least 1.
        layers: number of LSTM layers; at least 1.
        features: what the network sees of the gradient; the gradient itself if not given.
        head: how outputs become updates; ``ScaledLinear(0.1)`` if not given.
        forget_bias: initial bias of the forget gates.
        output_scale: factor on the initial weights of the output layer. Small values make the first
            updates small, so that untrained rules do not throw θ far away.
        sharing: global averaging cells; none if not given.
        chunk: how many coordinates are computed at once, to save memory (their gates are computed again in
            backward); all if not given. The result is the same up to rounding.

    Raises:
        ValueError: if a size is below 1, more units are shared than there are, or a scale is not a positive
            finite number.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        layers: int = 2,
        features: Feature | None = None,
        head: Head | None = None,
        forget_bias: float = 1.0,
        output_scale: float = 0.1,
        sharing: GlobalAveraging | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        check_network(hidden_size, layers, forget_bias, output_scale, chunk)
        self.hidden_size, self.layers = hidden_size, layers
        self.forget_bias, self.output_scale = forget_bias, output_scale
        self.features = Identity() if features is None else features
        self.head = ScaledLinear() if head is None else head
        self.sharing, self.chunk = sharing, chunk
        self.computing = Computing(chunk=chunk)
        self.network = StackedLSTM(self.features.size, hidden_size, layers, forget_bias, sharing)
        self.output = output_layer(hidden_size, self.head.size, output_scale)

    def init_state(self, theta: Tensor) -> Tree:
        """The states of the features and of the LSTM layers, zero."""
        return self.features.init_state(theta), self.network.init_state(theta)

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """One inner step, coordinate by coordinate; θ itself is not looked at."""
        feature_state, network_state = state
        features, feature_state = self.features(grad, feature_state)
        hidden, network_state = self.network(features, network_state, self.computing)
        return self.head(self.output(hidden)), (feature_state, network_state)
