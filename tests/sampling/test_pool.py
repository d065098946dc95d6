"""Actors draw what one process draws, bit for bit, whatever happens to them."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import Regression

from l2l_scale.optimizers import SGD
from l2l_scale.rng import Split
from l2l_scale.sampling import (
    Batch,
    PoolSettings,
    RankSampler,
    Schedule,
    Teacher,
    WindowSampler,
    join,
    seats_of,
    to_batch,
)
from l2l_scale.tasks import ImageClassifier, Member, Mixture, Quadratic, TaskFamily
from l2l_scale.tree import tree_leaves

PoolSettings().prepare_environment()  # Ray reads it when the next line imports it
from l2l_scale.sampling import pool as pools  # noqa: E402
from l2l_scale.sampling.pool import SamplerPool  # noqa: E402

SCHEDULE = Schedule(horizon=12, window=3)
SHARE = 0.5
"""CPUs that a test's actor counts for."""


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One Ray for all tests; it takes seconds to start. Nothing of it is left afterwards."""
    before = set(psutil.Process().children(recursive=True))
    pools.start_ray()
    started = set(psutil.Process().children(recursive=True)) - before
    assert started
    yield
    started |= set(psutil.Process().children(recursive=True)) - before
    pools.stop_ray()
    _, alive = psutil.wait_procs(started, timeout=10)
    # What was killed and has lost its parent stays a name until somebody asks for it.
    assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


class LocalRay:
    """What a pool asks of Ray, in this process and at once."""

    def remote(self, **options: object) -> Callable[[type], Any]:
        def method(bound: Callable[..., Any]) -> Any:
            return SimpleNamespace(remote=lambda *arguments: partial(bound, *arguments))

        def create(kind: type, *arguments: object) -> Any:
            actor: Any = kind(*arguments)
            return SimpleNamespace(draw=method(actor.draw), process=method(actor.process))

        return lambda kind: SimpleNamespace(remote=partial(create, kind))

    def get(self, references: list[Callable[[], Any]], timeout: float = 0) -> list[Any]:
        return [reference() for reference in references]

    def wait(self, references: list[Any], **options: object) -> None: ...

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes seconds for an actor; what the pool does with actors can be seen without."""
    monkeypatch.setattr(pools, "ray", LocalRay())


def mixture(**families: TaskFamily) -> Mixture:
    return Mixture(members={name: Member(family=family) for name, family in families.items()})


MIXED = mixture(
    rows=Regression(), digits=ImageClassifier(hidden=(3,), batch_size=4), plain=Quadratic(dimension=2)
)


def rank_sampler(source: Mixture, slots: int, rank: int = 0, ranks: int = 1) -> RankSampler:
    seats = seats_of(source, slots, rank, ranks)
    families = source.for_split(Split.TRAIN).families
    samplers = [
        WindowSampler(families[seat.member], SCHEDULE, 3, Split.TRAIN, Teacher(SGD())) for seat in seats
    ]
    return RankSampler(tuple(samplers), tuple(seat.slots for seat in seats))


def hashes(batches: list[Batch]) -> list[str]:
    """One for each window."""
    digests = []
    for batch in batches:
        digest = hashlib.sha256()
        for leaf in tree_leaves(tuple(batch)):
            data = leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode()
            digest.update(data)
        digests.append(digest.hexdigest())
    return digests


def drawn(draw: object, source: Mixture, slots: int, indices: range | list[int]) -> list[str]:
    """Hashes of the windows that a sampler or a pool draws for a single rank."""
    seats = seats_of(source, slots, 0, 1)
    return hashes([to_batch(seats, draw(index)) for index in indices])  # type: ignore[operator]


def settings(actors: int, depth: int = 3) -> PoolSettings:
    return PoolSettings(num_actors=actors, depth=depth, cpus_per_actor=SHARE)


def pool_of(source: Mixture, slots: int, actors: int, depth: int = 3) -> SamplerPool:
    return SamplerPool(rank_sampler(source, slots), settings(actors, depth))


@pytest.fixture(scope="module")
def single(ray: None) -> Iterator[SamplerPool]:
    """A pool of one actor."""
    pool = pool_of(MIXED, 9, 1)
    yield pool
    pool.close()


EXPECTED = drawn(rank_sampler(MIXED, 9), MIXED, 9, range(10))


def test_an_actor_draws_the_stream(single: SamplerPool) -> None:
    assert len(set(EXPECTED)) == 10
    assert drawn(single, MIXED, 9, range(10)) == EXPECTED


@pytest.mark.slow
def test_actors_draw_the_stream_though_they_are_killed(ray: None) -> None:
    pool, windows, killed = pool_of(MIXED, 9, 3), [], []
    for index in range(10):
        if index in (3, 6):
            killed.append(pool.processes()[index // 3])
            os.kill(killed[-1], signal.SIGKILL)
        windows += drawn(pool, MIXED, 9, [index])
    assert windows == EXPECTED
    assert not set(killed) & set(pool.processes())
    pool.close()


def test_training_cannot_change_what_lies_in_the_store(single: SamplerPool) -> None:
    pieces = single(0)
    ((rows,), (digits,), (plain,)) = pieces
    assert {leaf.dtype for leaf in (rows.theta0, rows.task["x"], plain.task["w"])} == {np.dtype(np.float32)}
    assert not rows.theta0.flags.writeable
    before = rows.theta0.copy()
    for _, _, window in to_batch(seats_of(MIXED, 9, 0, 1), pieces):
        for leaf in tree_leaves(window):
            if isinstance(leaf, torch.Tensor):
                leaf.zero_()
    np.testing.assert_array_equal(rows.theta0, before)
    assert digits.data["index"].any()


def test_what_a_sampler_raises_names_the_window_and_the_cause_and_the_pool_goes_on(
    single: SamplerPool,
) -> None:
    with pytest.raises(RuntimeError, match=r"window -1 could not be drawn: OverflowError\("):
        single(-1)  # counters of streams are not negative
    assert drawn(single, MIXED, 9, [4, 5]) == EXPECTED[4:6]


def test_two_ranks_draw_together_what_one_draws(local: None) -> None:
    source = mixture(rows=Regression(), plain=Quadratic(dimension=2))
    own = [SamplerPool(rank_sampler(source, 8, rank, 2), settings(2), pools=2) for rank in range(2)]
    whole = rank_sampler(source, 8)
    for index in range(5):
        parts, expected = [pool(index) for pool in own], whole(index)
        for place in range(2):
            together = join([piece for part in parts for piece in part[place]])
            for a, b in zip(tree_leaves(together), tree_leaves(join(expected[place])), strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    ("slots", "actors", "parts", "turns"),
    [(9, 1, 1, 1), (9, 3, 3, 1), (1, 2, 1, 2), (2, 3, 1, 3), (3, 4, 2, 2), (2, 4, 2, 2)],
)
def test_more_actors_than_slots_take_turns(
    local: None, slots: int, actors: int, parts: int, turns: int
) -> None:
    source = Mixture.of(Regression())
    pool = pool_of(source, slots, actors)
    assert (pool.parts, len(pool.actors) // pool.parts) == (parts, turns)
    assert drawn(pool, source, slots, range(7)) == drawn(rank_sampler(source, slots), source, slots, range(7))
    asked = [pool._order(index) for index in range(turns)]
    assert len({id(reference.func.__self__) for window in asked for reference in window}) == actors


def test_seats_with_fewer_slots_than_there_are_actors_are_drawn_by_some(local: None) -> None:
    source = mixture(rows=Regression(), plain=Quadratic(dimension=2))
    unequal = Mixture(
        members={
            name: replace(member, share=share)
            for (name, member), share in zip(source.members.items(), (1, 4), strict=True)
        }
    )
    assert [len(slots) for slots in unequal.slots(5).values()] == [1, 4]
    expected = drawn(rank_sampler(unequal, 5), unequal, 5, range(5))
    assert drawn(pool_of(unequal, 5, 4), unequal, 5, range(5)) == expected


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_jump_throws_away_what_was_ordered_and_depth_bounds_what_is(local: None, depth: int) -> None:
    source, path = Mixture.of(Regression()), [0, 1, 40, 41, 2, 2, 3, 0]
    pool = pool_of(source, 4, 2, depth)
    expected = drawn(rank_sampler(source, 4), source, 4, path)
    for index, right in zip(path, expected, strict=True):
        assert drawn(pool, source, 4, [index]) == [right]
        assert [ahead for ahead, _ in pool.in_flight] == list(range(index + 1, index + 1 + depth))


def test_more_actors_than_cpus_are_refused(local: None) -> None:
    message = r"num_actors \(5\), 0.5 CPUs each, .* the 2 CPUs that Ray has; num_actors=4 fits"
    with pytest.raises(ValueError, match=message):
        SamplerPool(rank_sampler(MIXED, 9), settings(5))
    with pytest.raises(ValueError, match=r"\(3\) on each of 2 ranks, .* num_actors=2 fits"):
        SamplerPool(rank_sampler(MIXED, 9), settings(3), pools=2)


def test_signal_handlers_are_those_of_before(ray: None) -> None:
    assert signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_closed_port_is_no_cluster() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # bound, but nobody listens
        with pytest.raises(
            ValueError, match=rf"ray_address \({address}\): there is no Ray cluster .*ray start"
        ):
            pools.check_cluster(address)


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "no.such.host.invalid:6379"])
def test_an_address_that_cannot_be_is_no_cluster(address: str) -> None:
    with pytest.raises(ValueError, match=rf"ray_address \({address}\)"):
        pools.check_cluster(address)


def test_a_socket_that_does_not_answer_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_ANSWER", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        start = time.perf_counter()
        with pytest.raises(
            ValueError, match=rf"ray_address \({address}\): there is no Ray cluster \(no answer\)"
        ):
            pools.check_cluster(address)
        assert time.perf_counter() - start < 10
