"""Networks of random architecture: many families that differ in depth, width, activation and start point."""

from __future__ import annotations

from typing import Literal

from l2l_scale.checks import check_count
from l2l_scale.rng import Channel, Split, stream
from l2l_scale.tasks.image import ImageClassifier
from l2l_scale.tasks.mixture import Member, Mixture

_ACTIVATIONS: tuple[Literal["sigmoid", "tanh", "relu", "elu"], ...] = ("sigmoid", "tanh", "relu", "elu")
_INITIALISATIONS: tuple[Literal["torch", "xavier", "he"], ...] = ("torch", "xavier", "he")


def random_networks(
    count: int = 8,
    dataset: str = "digits",
    max_depth: int = 3,
    min_width: int = 8,
    max_width: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> Mixture:
    """A mixture of fully connected image classifiers, each of an architecture drawn once for all.

    Parameters of one family must have one layout, so a random architecture is a family of its own, with its
    own slots; what is drawn in a slot is its start point and minibatches. In a configuration:
    ``data.family: {class_path: l2l_scale.tasks.random_networks, init_args: {count: 8}}``.

    Args:
        count: number of architectures.
        dataset: as for :class:`ImageClassifier`.
        max_depth: hidden layers, uniform from 1 to this.
        min_width: units of a hidden layer, log-uniform from this …
        max_width: … to this.
        batch_size: images per inner step.
        seed: of the architectures.

    Raises:
        ValueError: if a number is below 1, or min_width above max_width.
    """
    for name, value in (("count", count), ("max_depth", max_depth), ("min_width", min_width)):
        check_count(name, value)
    if min_width > max_width:
        raise ValueError(f"min_width ({min_width}) must be at most max_width ({max_width})")
    members = {}
    for number in range(count):
        rng = stream(seed, Split.TRAIN, Channel.ARCHITECTURE, number)
        widths = min_width * (max_width / min_width) ** rng.random(int(rng.integers(1, max_depth + 1)))
        family = ImageClassifier(
            dataset=dataset,
            hidden=tuple(round(width) for width in widths.tolist()),
            activation=_ACTIVATIONS[int(rng.integers(len(_ACTIVATIONS)))],
            initialisation=_INITIALISATIONS[int(rng.integers(len(_INITIALISATIONS)))],
            batch_size=batch_size,
        )
        layers = "x".join(map(str, family.hidden))
        members[f"{number}_{layers}_{family.activation}"] = Member(family=family)
    return Mixture(members=members)
