"""Counter-based random streams: every draw is a pure function of (seed, split, channel, counters).

Lightning stores no state of random generators, so a run resumes exactly only if nothing has such a state.
A stream is a Philox generator [Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"]: the
key is (seed, split and channel), the upper three counter words are (slot, generation, inner step) and the
lowest word counts the draws. Streams with different keys or counters never overlap.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Split(IntEnum):
    """What a random draw is for. Splits never share a stream, whatever their seeds."""

    TRAIN = 0
    VALID = 1
    TUNE = 2
    TEST = 3


class Channel(IntEnum):
    """Which random thing is drawn."""

    TASK = 0
    INIT = 1
    DATA = 2
    NOISE = 3
    HORIZON = 4
    ARCHITECTURE = 5


STREAM_FORMAT = 1
"""Changes when the same keys and counters give other numbers: a run cannot be resumed across it."""

_CHANNELS = 1 << 8  # room for more channels without moving a split's streams


def stream(seed: int, split: Split, channel: Channel, *counter: int) -> np.random.Generator:
    """Return the generator of one stream.

    Args:
        seed: in [0, 2**64).
        split: keeps training, validation, tuning and test apart.
        channel: keeps constants, start points, data and noise apart.
        counter: up to three numbers in [0, 2**64), usually slot, generation, inner step; missing ones are 0.

    Raises:
        ValueError: if the seed is negative or too large.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed ({seed}) must be in [0, 2**64)")
    assert len(counter) <= 3, counter
    words = np.zeros(4, np.uint64)
    words[1 : 1 + len(counter)] = counter
    key = np.array([seed, split * _CHANNELS + channel], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=words))
