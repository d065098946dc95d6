"""Benchmarks repeat rounds that other programs disturbed."""

import itertools
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest


class Round(NamedTuple):
    number: int
    others: float


def run(quiet, plan, disturbed: dict[str, list[float]]):
    """The rounds that count; and all that were made, in order."""
    made, ticks = [], []

    def measure(way: str) -> Round:
        made.append(way)
        number = made.count(way) - 1
        return Round(number, disturbed[way][number])

    return quiet.quietest(disturbed, plan, measure, lambda: ticks.append(1)), made, len(ticks)


def test_ways_take_turns_until_each_has_enough_quiet_rounds(benchmarks, monkeypatch) -> None:
    quiet = benchmarks("quiet")
    monkeypatch.setattr(quiet, "wait", lambda patience: None)
    found, made, ticks = run(
        quiet, quiet.Plan(2, patience=60), {"a": [0.0, 0.0], "b": [0.5, 0.01, 0.9, 0.02]}
    )
    assert made == ["a", "b", "a", "b", "b", "b"]
    assert [one.number for one in found["b"]] == [1, 3]
    assert quiet.most(found["b"]) == 0.02
    assert ticks == 4


def test_where_it_never_is_quiet_the_quietest_rounds_count(benchmarks, monkeypatch) -> None:
    quiet = benchmarks("quiet")
    monkeypatch.setattr(quiet, "wait", lambda patience: None)
    seconds = itertools.count(step=10)
    monkeypatch.setattr(quiet, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    disturbed = [0.9, 0.5, 0.7, 0.6]
    found, made, ticks = run(quiet, quiet.Plan(2, patience=45), {"a": disturbed})
    assert len(made) == 4  # 10 s of waiting each, and two repeats of 20 s
    assert [one.number for one in found["a"]] == [1, 3]
    assert ticks == 2


def test_without_patience_nothing_is_repeated(benchmarks) -> None:
    quiet = benchmarks("quiet")
    _, made, _ = run(quiet, quiet.Plan(2, patience=0), {"a": [0.9, 0.5], "b": [0.9, 0.8]})
    assert made == ["a", "b", "a", "b"]


def test_patience_ends(benchmarks, monkeypatch) -> None:
    quiet = benchmarks("quiet")
    quiet.wait(0.2)
    monkeypatch.setattr(quiet, "time", SimpleNamespace(perf_counter=time.perf_counter))  # no sleep
    quiet.wait(-1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how busy all programs are")
def test_what_we_start_ourselves_is_not_others(benchmarks) -> None:
    quiet = benchmarks("quiet")
    before = quiet.busy(), quiet.ours()
    code = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child:
        while quiet.ours() - before[1] < 0.4:
            time.sleep(0.05)
        assert quiet.busy() - before[0] > 0.3
        child.communicate(b"\n")
