"""Tuned baselines: the search leaves no better neighbour, and what is kept on disk is never wrong."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from l2l_scale.deploy import describe_rule
from l2l_scale.evaluation import cache, tuning
from l2l_scale.evaluation.baselines import BASELINES, Baseline, choose_baselines
from l2l_scale.evaluation.curves import HeldOut, loss_curves, sweep
from l2l_scale.evaluation.settings import Evaluation
from l2l_scale.evaluation.tuning import Tuned, tune
from l2l_scale.optimizers.classic import SGD
from l2l_scale.rng import Split
from l2l_scale.tasks import MixedPrecision, Quadratic

TASKS = HeldOut(family=Quadratic(dimension=2), seed=0, split=Split.TUNE, num_tasks=24, inner_steps=15)
BY_NAME = {baseline.name: baseline for baseline in BASELINES}


def score(baseline: Baseline, point: dict[str, float]) -> tuple[float, float]:
    """Mean final loss and mean sum, by plain rollouts."""
    curves = loss_curves(baseline.build(point, TASKS.inner_steps), TASKS).double()
    return curves[-1].mean().item(), curves[1:].sum(0).mean().item()


@pytest.mark.parametrize("per_decade", [16, 4, 2])
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda baseline: baseline.name)
def test_the_score_is_that_of_a_rollout_and_no_neighbouring_rate_is_better(
    baseline: Baseline, per_decade: int
) -> None:
    baseline = replace(baseline, rates_per_decade=per_decade)
    tuned = tune(baseline, TASKS)
    for target, choice in enumerate((tuned.final, tuned.sum)):
        assert choice.score == pytest.approx(score(baseline, choice.hyper_parameters)[target], rel=1e-6)
        rate = choice.hyper_parameters["learning_rate"]
        for factor in (10 ** (1 / per_decade), 10 ** (-1 / per_decade)):
            near = {**choice.hyper_parameters, "learning_rate": rate * factor}
            assert score(baseline, near)[target] >= choice.score * (1 - 1e-6)
        assert "learning_rate" not in choice.edges


@pytest.mark.parametrize("num_tasks", [24, 3])
@pytest.mark.parametrize("per_decade", [16, 4])
def test_the_choice_is_the_best_of_the_whole_lattice(num_tasks: int, per_decade: int) -> None:
    tasks = replace(TASKS, num_tasks=num_tasks)
    rates = [10 ** (i / per_decade) for i in range(-4 * per_decade, per_decade)]
    finals, sums = sweep(lambda h: SGD(**h), [{"learning_rate": rate} for rate in rates], tasks).mean(2)
    tuned = tune(replace(BY_NAME["SGD"], rates_per_decade=per_decade), tasks)
    assert tuned.final.hyper_parameters["learning_rate"] == pytest.approx(rates[int(finals.argmin())])
    assert tuned.sum.hyper_parameters["learning_rate"] == pytest.approx(rates[int(sums.argmin())])


@pytest.mark.parametrize(("number", "rule"), [(5, "even"), (0, "number >= 2"), (2.5, "whole number")])
def test_rates_per_decade_that_cannot_be_are_refused(number: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"rates_per_decade \({number}\) must be .*{rule}"):
        Evaluation(rates_per_decade=number)


@pytest.mark.parametrize("rates", [(1e-7, 1e-6), (1e3, 1e4)], ids=["far too low", "all diverge"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_the_grid_grows_until_the_best_rate_is_inside(name: str, rates: tuple[float, float]) -> None:
    usual, displaced = tune(BY_NAME[name], TASKS), tune(replace(BY_NAME[name], rates=rates), TASKS)
    assert displaced.final == usual.final
    assert displaced.sum == usual.sum


def test_a_search_without_end_stops_at_its_limit_and_says_so() -> None:
    still = Baseline(name="still", build=lambda hypers, horizon: SGD(0.0), rates=(1e-3, 1e-2))
    tuned = tune(still, TASKS)  # all rates are equal; the lowest is taken, and then a lower one is tried
    assert tuned.final.edges == ["learning_rate"]


def test_tuning_recovers_what_momentum_is_worth() -> None:
    tuned = {
        name: tune(BY_NAME[name], TASKS).final for name in ("SGD", "heavy ball", "Adam", "Adam with betas")
    }
    assert tuned["heavy ball"].score <= tuned["SGD"].score
    assert tuned["Adam with betas"].score < tuned["Adam"].score


def test_a_second_run_reads_what_the_first_one_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tune(BY_NAME["heavy ball"], TASKS, tmp_path)
    monkeypatch.setattr(tuning, "sweep", lambda *_: pytest.fail("was computed again"))
    assert tune(BY_NAME["heavy ball"], TASKS, tmp_path) == first
    assert isinstance(first, Tuned)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"num_tasks": 23},
        {"inner_steps": 14},
        {"family": Quadratic(dimension=2, w_scale=1.5)},
        {"family": Quadratic(dimension=3)},
    ],
    ids=str,
)
def test_other_settings_are_another_result(tmp_path: Path, change: dict[str, object]) -> None:
    tune(BY_NAME["SGD"], TASKS, tmp_path)
    other = replace(TASKS, **change)
    assert tune(BY_NAME["SGD"], other, tmp_path) == tune(BY_NAME["SGD"], other)
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "not JSON", "a digit", "foreign key", "a list"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: str) -> None:
    first = tune(BY_NAME["SGD"], TASKS, tmp_path)
    (path,) = kept(tmp_path)
    text = path.read_text()
    content = json.loads(text)
    content["result"]["final"]["hyper_parameters"]["learning_rate"] *= 2
    foreign = {**json.loads(text), "key": {}}
    path.write_text(
        {
            "cut": text[: len(text) // 2],
            "empty": "",
            "not JSON": "\x00\x01",
            "a digit": json.dumps(content),
            "foreign key": json.dumps(foreign),
            "a list": "[]",
        }[damage]
    )
    assert tune(BY_NAME["SGD"], TASKS, tmp_path) == first
    assert json.loads(path.read_text()) == json.loads(text)


class Mine(Quadratic):
    """A user's family: its code is not part of a key."""


def test_a_family_that_no_key_can_stand_for_is_not_kept(tmp_path: Path) -> None:
    tune(BY_NAME["SGD"], replace(TASKS, family=Mine(dimension=2)), tmp_path)
    assert kept(tmp_path) == []


def test_a_family_in_mixed_precision_is_kept(tmp_path: Path) -> None:
    tasks = replace(TASKS, family=MixedPrecision(Quadratic(dimension=2)), num_tasks=2, inner_steps=2)
    first = tune(BY_NAME["SGD"], tasks, tmp_path)
    assert len(kept(tmp_path)) == 1
    assert tune(BY_NAME["SGD"], tasks, tmp_path) == first


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    assert tune(BY_NAME["SGD"], TASKS, file / "folder") == tune(BY_NAME["SGD"], TASKS)


def test_infinite_scores_survive_the_cache(tmp_path: Path) -> None:
    settings: dict[str, object] = {"a": 1}
    assert cache.remember(tmp_path, settings, lambda: [math.inf]) == [math.inf]
    assert cache.remember(tmp_path, settings, lambda: pytest.fail("was computed again")) == [math.inf]


@pytest.mark.parametrize("name", ["SGD with cosine", "Adam with cosine", "NAG 0.9 with cosine"])
def test_schedules_end_at_the_horizon(name: str) -> None:
    (baseline,) = choose_baselines([name])
    curves = loss_curves(baseline.build({"learning_rate": 0.1}, 10), TASKS)
    assert torch.equal(curves[10], curves[15])
    assert not torch.equal(curves[9], curves[10])


def test_a_cooldown_holds_the_rate_and_then_lets_it_fall_to_a_tenth() -> None:
    (cooled, plain) = choose_baselines(["NAG 0.9 with cooldown", "NAG 0.9"])
    rule = cooled.build({"learning_rate": 0.1}, 10)
    assert torch.equal(
        loss_curves(rule, TASKS)[:7], loss_curves(plain.build({"learning_rate": 0.1}, 10), TASKS)[:7]
    )
    factors = rule.schedule(torch.tensor([[0.0], [6.0], [8.0], [10.0], [50.0]]))
    assert torch.allclose(factors, torch.tensor([[1.0], [1.0], [0.55], [0.1], [0.1]]))


def test_an_unknown_baseline_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"baselines \('Adamm'\) must be among SGD, heavy ball, .*BB2"):
        choose_baselines(["SGD", "Adamm"])
    assert [baseline.name for baseline in choose_baselines(["BB2", "SGD"])] == ["BB2", "SGD"]


def test_momentum_as_people_set_it_is_there_by_name():
    baselines = choose_baselines(["NAG 0.9", "heavy ball 0.9"])
    for baseline, rule in zip(baselines, ("NAG", "heavy ball"), strict=True):
        assert baseline.combinations == [{}]
        built = baseline.build({"learning_rate": 0.1}, 10)
        full = BY_NAME[rule].build({"learning_rate": 0.1, "momentum": 0.9}, 10)
        assert describe_rule(built) == describe_rule(full)
    assert not {baseline.name for baseline in baselines} & {one.name for one in choose_baselines(None)}
