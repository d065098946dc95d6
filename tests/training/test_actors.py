"""Which Ray is started and stopped when; what actors draw is tested where the pool is."""

import os

import pytest
from test_meta_training import FAMILY, make_data

from l2l_scale.cores import available_cores
from l2l_scale.sampling import PoolSettings
from l2l_scale.training import WindowData

PoolSettings().prepare_environment()  # Ray reads it when the next line imports it
from l2l_scale.sampling import pool  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """What is asked of Ray, in order."""
    asked = []
    node = pool.RayNode("127.0.0.1:1", "token")
    monkeypatch.setattr(pool, "start_ray", lambda: asked.append("start") or node)
    monkeypatch.setattr(pool, "join_ray", lambda node: asked.append(f"join {node.address}"))
    monkeypatch.setattr(pool, "stop_ray", lambda: asked.append("stop"))
    return asked


class Pool:
    """Stands in for the pool."""

    def __init__(self, sampler, settings, ranks):
        self.ranks = ranks

    def __call__(self, index):
        raise AssertionError("nothing is drawn here")

    def close(self):
        pass


def test_ray_is_started_once_and_stopped_once(monkeypatch, calls):
    monkeypatch.setattr(pool, "SamplerPool", Pool)
    data = make_data(pool=PoolSettings(num_actors=1))
    loader = data.train_dataloader()
    assert (loader.draw, loader.draw.ranks, calls) == (data.actors.pool, 1, ["start"])
    data.train_dataloader()  # another one takes the place of the first
    data.on_exception(KeyboardInterrupt())
    data.on_exception(KeyboardInterrupt())
    assert calls == ["start", "stop", "start", "stop"]


def test_a_cluster_of_others_is_joined(monkeypatch, calls):
    monkeypatch.setattr(pool, "SamplerPool", Pool)
    data = make_data(pool=PoolSettings(num_actors=1, ray_address="head:6379"))
    data.train_dataloader()
    data.on_exception(KeyboardInterrupt())
    assert calls == ["join head:6379", "stop"]


def test_without_actors_ray_is_left_alone(calls):
    data = make_data()
    data.train_dataloader()
    data.on_exception(KeyboardInterrupt())
    assert calls == []


@pytest.mark.parametrize("error", [ValueError("too many"), KeyboardInterrupt()])
def test_ray_is_stopped_where_actors_do_not_start(monkeypatch, calls, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(pool, "SamplerPool", refuse)
    with pytest.raises(type(error)):
        make_data(pool=PoolSettings(num_actors=1)).train_dataloader()
    assert calls == ["start", "stop"]


@pytest.mark.parametrize(
    ("ranks", "says"), [(1, r"\(999\), 1 CPUs each"), (2, r"\(999\) on each of 2 ranks")]
)
def test_more_actors_than_cpus_are_refused_before_ray_is_started(calls, ranks, says):
    with pytest.raises(ValueError, match=rf"num_actors {says}, .* {available_cores()} CPUs of this machine"):
        make_data(pool=PoolSettings(num_actors=999)).actors.check(ranks)
    assert calls == []


def test_a_cluster_is_asked_whether_it_is_there_and_its_cpus_are_not_counted_here(monkeypatch, calls):
    asked = []
    monkeypatch.setattr(pool, "check_cluster", asked.append)
    make_data(pool=PoolSettings(num_actors=999, ray_address="head:6379")).actors.check(1)
    assert (asked, calls) == (["head:6379"], [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_actors": -1}, r"num_actors \(-1\) must be a whole number >= 0"),
        ({"depth": 0}, r"depth \(0\) must be a whole number >= 1"),
        ({"cpus_per_actor": 0.0}, r"cpus_per_actor \(0.0\) must be a finite number > 0"),
        ({"ray_address": "head"}, r"ray_address \(head\) must be HOST:PORT"),
        ({"ray_address": "head:"}, r"ray_address \(head:\) must be HOST:PORT"),
    ],
)
def test_bad_settings_of_the_pool_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        WindowData(FAMILY, pool=PoolSettings(**settings))


def test_what_ray_reads_is_set_unless_the_user_has_set_it(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    PoolSettings(ray_address="head:6379").prepare_environment()
    assert "RAY_AUTH_MODE" not in os.environ
    PoolSettings().prepare_environment()
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_USAGE_STATS_ENABLED"]) == ("token", "1")
