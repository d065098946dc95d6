from __future__ import annotations

import hashlib
from itertools import product

import numpy as np
import pytest

from l2l_scale.rng import Channel, Split, stream

KEYS = [
    *product((0, 1, 2**64 - 1), Split, Channel, ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**40, 3, 99))),
]

GOLDEN = "3cd9dbbdd033237a8df79c44a6cba84b2c8ee6ed97f1f8e98ba0c788796cc013"
"""Changing this hash changes every run ever made: resumed runs would go on with other tasks."""


def draws(*key: object) -> bytes:
    seed, split, channel, counter = key
    rng = stream(seed, split, channel, *counter)  # type: ignore[arg-type,misc]
    return rng.integers(2**64, size=4, dtype=np.uint64).tobytes() + rng.standard_normal(4).tobytes()


def test_streams_have_the_golden_hash() -> None:
    first = [key for key in KEYS if key[2] <= Channel.NOISE]  # the channels that runs were made with
    digest = hashlib.sha256(b"".join(draws(*key) for key in first)).hexdigest()
    assert digest == GOLDEN


def test_every_key_has_a_stream_of_its_own() -> None:
    firsts = {draws(*key)[:8] for key in KEYS}
    assert len(firsts) == len(KEYS)


def test_streams_do_not_run_into_each_other() -> None:
    # A stream's own draws count in the lowest word, so the next slot's stream is 2**64 blocks away.
    long = stream(0, Split.TRAIN, Channel.TASK, 0).integers(2**64, size=100_000, dtype=np.uint64)
    others = [
        stream(0, Split.TRAIN, Channel.TASK, slot).integers(2**64, dtype=np.uint64) for slot in range(1, 99)
    ]
    assert not np.isin(others, long).any()


def test_draws_do_not_depend_on_the_order_or_on_other_streams() -> None:
    forward = {key: draws(*key) for key in KEYS}
    assert all(draws(*key) == forward[key] for key in reversed(KEYS))


def test_interleaved_streams_are_independent() -> None:
    def rng(slot: int) -> np.random.Generator:
        return stream(7, Split.TEST, Channel.DATA, slot)

    alone = [rng(slot).random(3) for slot in (1, 2)]
    first, second = rng(1), rng(2)
    together = np.array([(first.random(), second.random()) for _ in range(3)]).T
    assert np.array_equal(together, alone)


def test_global_numpy_state_is_neither_read_nor_changed() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    expected = draws(0, Split.TRAIN, Channel.TASK, (1,))
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]
    np.random.seed(1)
    assert draws(0, Split.TRAIN, Channel.TASK, (1,)) == expected


def test_a_missing_counter_is_zero() -> None:
    assert draws(3, Split.TRAIN, Channel.INIT, (5,)) == draws(3, Split.TRAIN, Channel.INIT, (5, 0, 0))


def test_a_stream_cannot_be_split_by_hidden_entropy() -> None:
    with pytest.raises(TypeError, match="spawn"):
        stream(0, Split.TRAIN, Channel.TASK).spawn(1)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed \({seed}\) must be in \[0, 2\*\*64\)"):
        stream(seed, Split.TRAIN, Channel.TASK)


def test_counters_out_of_range_are_refused() -> None:
    with pytest.raises(OverflowError):
        stream(0, Split.TRAIN, Channel.TASK, -1)
    with pytest.raises(AssertionError):
        stream(0, Split.TRAIN, Channel.TASK, 1, 2, 3, 4)


def test_the_numbers_of_splits_and_channels_are_fixed() -> None:
    assert [(split.name, split.value) for split in Split] == [
        ("TRAIN", 0),
        ("VALID", 1),
        ("TUNE", 2),
        ("TEST", 3),
    ]
    names = ["TASK", "INIT", "DATA", "NOISE", "HORIZON", "ARCHITECTURE"]
    assert [(c.name, c.value) for c in Channel] == [(name, value) for value, name in enumerate(names)]
