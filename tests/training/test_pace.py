"""The pace report: advice from two numbers, and not a trace of the measuring."""

import itertools
import time

import pytest
import torch
from test_meta_training import fit, make_data, make_module

from l2l_scale.tasks import Member, Mixture, Quadratic
from l2l_scale.training import MetaTraining, PaceReport, TrajectoryMetrics, WindowData
from l2l_scale.training.pace import Pace, median_seconds, recommend, report
from l2l_scale.tree import tree_leaves


@pytest.mark.parametrize(
    ("draw", "train", "ranks", "cpus", "actors"),
    [
        (0.001, 0.001, 1, 8, 0),  # asking an actor takes as long
        (0.01, 1.0, 1, 8, 0),  # a hundredth of the time
        (0.049, 1.0, 1, 8, 0),
        (0.06, 1.0, 1, 8, 1),
        (1.0, 1.0, 1, 8, 2),  # just as fast is not fast enough
        (0.9, 1.0, 1, 8, 1),
        (3.0, 1.0, 1, 8, 4),
        (3.0, 1.0, 1, 3, 2),  # a core is left to the trainer
        (3.0, 1.0, 2, 8, 3),
        (3.0, 1.0, 1, 1, 0),
        (3.0, 1.0, 4, 2, 0),
    ],
)
def test_recommended_actors_keep_up_and_leave_every_rank_a_core(draw, train, ranks, cpus, actors):
    assert recommend(Pace(draw, train), ranks, cpus) == actors


@pytest.mark.parametrize(
    ("pace", "actors", "cpus", "says"),
    [
        (Pace(0.001, 0.1), 0, 8, "draws 1,000 windows/s, the trainer consumes 10: 1% of the time in"),
        (Pace(0.001, 0.1), 0, 8, "in this process; as recommended"),
        (Pace(0.1, 0.1), 0, 8, "50% of the time in this process; recommended: --data.pool.num_actors 2"),
        (Pace(0.1, 0.1), 2, 8, "2 actor(s) draw ahead; as recommended"),
        (
            Pace(0.001, 0.1),
            2,
            8,
            "draw ahead; recommended: --data.pool.num_actors 0, in the trainer's process",
        ),
        (Pace(0.3, 0.1), 2, 1, "num_actors 0, in the trainer's process (there is no spare core)"),
        (Pace(4.0, 3.0), 0, 8, "draws 0.25 windows/s, the trainer consumes 0.33: 57%"),
    ],
)
def test_report_says_what_was_measured_and_what_to_do(pace, actors, cpus, says):
    assert says in report(pace, actors, 1, cpus)


def test_no_advice_where_a_lack_of_cores_forbids_what_would_pay():
    assert report(Pace(0.3, 0.1), 0, 1, 1).endswith("; as recommended")


def test_the_first_round_warms_up_unless_it_is_long(monkeypatch):
    def seconds_of(*times):
        """Of rounds that take these times."""
        clock = itertools.chain.from_iterable((0.0, seconds) for seconds in times)
        monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
        rounds = []
        result = median_seconds(rounds.append, 3)
        return result, rounds

    assert seconds_of(4.0, 0.3, 0.1, 0.2) == (0.2, [0, 1, 2, 3])
    assert seconds_of(6.0) == (6.0, [0])


def everything(module, trainer):
    adam = trainer.optimizers[0].state_dict()["state"]
    return [*module.rule.parameters(), *tree_leaves(module.carries), *tree_leaves(adam)]


def make_mixture():
    return Mixture(
        members={"a": Member(family=Quadratic(dimension=3)), "b": Member(family=Quadratic(dimension=2))}
    )


@pytest.mark.parametrize("mixture", [False, True])
def test_measuring_leaves_no_trace(tmp_path, mixture, capsys):
    def run(callbacks):
        module, data = make_module(), make_data()
        if mixture:
            module = MetaTraining(module.rule, make_mixture())
            data = WindowData(
                make_mixture(), horizon=20, window=5, slots=6, windows_per_epoch=4, valid_tasks=8
            )
        return everything(*fit(tmp_path, 6, module, data=data, callbacks=callbacks))

    with_it, without = run([PaceReport(), TrajectoryMetrics()]), run([])
    assert all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
    assert "windows/s, the trainer consumes" in capsys.readouterr().out


def test_measuring_draws_no_random_numbers(tmp_path):
    states = []
    for callbacks in ([PaceReport()], []):
        module = make_module()
        torch.manual_seed(5)
        fit(tmp_path, 2, module, callbacks=callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
