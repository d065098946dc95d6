from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from conftest import Regression

from l2l_scale.rng import Split
from l2l_scale.sampling import FixedWindows, RankSampler, Schedule, Seat, WindowLoader, WindowSampler
from l2l_scale.sampling.seats import Pieces
from l2l_scale.tasks import Quadratic
from l2l_scale.tree import tree_leaves
from l2l_scale.unroll import WindowBatch

SAMPLER = WindowSampler(Regression(), Schedule(horizon=6, window=2), 3, Split.TRAIN)
SLOTS = range(4, 7)


def make_loader() -> WindowLoader:
    return WindowLoader(RankSampler((SAMPLER,), (SLOTS,)), [Seat("", SLOTS, 1.0)], windows_per_epoch=5)


def epochs(loader: WindowLoader, count: int) -> Iterator[tuple[int, WindowBatch]]:
    """(epoch, batch) for so many epochs."""
    for epoch in range(count):
        for ((_, _, window),) in loader:
            yield epoch, window


def same(ours: WindowBatch, theirs: WindowBatch) -> bool:
    pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_an_epoch_has_its_length_and_goes_on_where_the_last_one_ended() -> None:
    loader = make_loader()
    assert len(loader) == 5
    indices = [(epoch, batch.window_index) for epoch, batch in epochs(loader, 3)]
    assert indices == [(index // 5, index) for index in range(15)]
    assert len(loader) == 5


def test_batches_are_those_of_the_sampler_in_single_precision() -> None:
    for _, batch in epochs(make_loader(), 1):
        assert same(batch, SAMPLER(batch.window_index, SLOTS).to_batch(torch.float32))


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6, 9, 10])
def test_a_restored_loader_goes_on_as_if_never_interrupted(stop: int) -> None:
    straight = list(epochs(make_loader(), 3))
    first = make_loader()
    interrupted = epochs(first, 3)
    for _ in range(stop):
        next(interrupted)
    state = first.state_dict()
    assert state == {"next_index": stop}
    second = make_loader()
    second.load_state_dict(state)
    rest = list(epochs(second, 3 - stop // 5))
    assert [epoch + stop // 5 for epoch, _ in rest] == [epoch for epoch, _ in straight[stop:]]
    assert all(same(ours, theirs) for (_, ours), (_, theirs) in zip(rest, straight[stop:], strict=True))


def test_state_is_ahead_by_exactly_the_batches_that_were_handed_out() -> None:
    loader = make_loader()
    assert loader.state_dict() == {"next_index": 0}
    batches = iter(loader)
    assert loader.state_dict() == {"next_index": 0}
    for count in range(1, 6):
        next(batches)
        assert loader.state_dict() == {"next_index": count}


@pytest.mark.parametrize(
    ("slots", "windows_per_epoch", "message"),
    [
        (range(0), 5, r"slots \(0\) must be a whole number >= 1"),
        (SLOTS, 0, r"windows_per_epoch \(0\) must be a whole number >= 1"),
        (SLOTS, -3, r"windows_per_epoch \(-3\)"),
    ],
)
def test_bad_sizes_are_refused(slots: range, windows_per_epoch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowLoader(RankSampler((SAMPLER,), (slots,)), [Seat("", slots, 1.0)], windows_per_epoch)


def test_validation_has_the_same_windows_every_time() -> None:
    other = WindowSampler(Quadratic(dimension=2), SAMPLER.schedule, 3, Split.TRAIN)
    windows = FixedWindows({"a": SAMPLER, "b": other}, SLOTS, 3)
    assert len(windows) == 6
    for _ in range(2):
        for position, ((name, _, window),) in enumerate(windows):
            sampler, index = (SAMPLER, other)[position // 3], position % 3
            assert name == "ab"[position // 3]
            assert same(window, sampler(index, SLOTS).to_batch())


def test_time_that_the_trainer_waits_is_counted() -> None:
    draw = RankSampler((SAMPLER,), (SLOTS,))

    def slowly(index: int) -> Pieces:
        time.sleep(0.01)
        return draw(index)

    loader = WindowLoader(slowly, [Seat("", SLOTS, 1.0)], windows_per_epoch=5)
    for _ in loader:
        time.sleep(0.001)
    assert 0.05 <= loader.waited < 0.5
