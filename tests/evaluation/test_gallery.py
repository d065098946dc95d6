"""Pictures in an evaluation: who is shown, what of, and where they go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l2l_scale.evaluation import Evaluation, evaluate, validate
from l2l_scale.evaluation.entrants import entrants_of, plan_tests, run_all, tune_all
from l2l_scale.evaluation.gallery import Row, draw_gallery, gallery
from l2l_scale.evaluation.jobs import Runner
from l2l_scale.evaluation.report import summarise
from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.tasks import Extractor, NeuralArt, Quadratic, TaskFamily

FAMILY = NeuralArt(size=16, extractor=Extractor(channels=(4, 6)))
SETTINGS = Evaluation(
    num_tasks=4,
    num_tuning_tasks=2,
    num_reference_tasks=0,
    num_shift_tasks=2,
    num_shift_tuning_tasks=2,
    inner_steps=12,
    shift_inner_steps=12,
    shifts={"larger": replace(FAMILY, size=32, styles=("dots",))},
    baselines=["SGD", "Adam"],
    num_workers=1,
    cache=False,
)


def lstm() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=4, layers=1)


def rows_of(family: TaskFamily) -> tuple[list[Row], list[str]]:
    """The gallery of a family's held-out test, and its tuned optimizers, the best one first."""
    runner, settings = Runner(1, None), replace(SETTINGS, shifts=None)
    tests = plan_tests(family, 10, settings)
    entrants = [entrants_of(tests[0], {"LSTM": lstm()}, tune_all(tests, settings, runner), settings)]
    results = run_all(tests, entrants, runner)
    report = summarise(family, 2, 10, results[0])
    optimizers = report["optimizers"]
    tuned = sorted(
        (name for name in optimizers if name != "LSTM"), key=lambda name: optimizers[name]["mean"]["10"] or 0
    )
    return gallery(tests[0], entrants[0], results[0], report, 10), tuned


def test_rows_show_task_start_best_baseline_and_learned_rule_at_the_horizon() -> None:
    rows, tuned = rows_of(FAMILY)
    assert [row.title for row in rows] == ["held-out, task 0", "held-out, task 1", "held-out, task 2"]
    for row in rows:
        assert list(row.pictures) == ["content", "style", "start", tuned[0], "LSTM"]
        assert row.losses.keys() == {"start", tuned[0], "LSTM"}
        assert row.losses[tuned[0]] < row.losses["start"]
        assert not np.array_equal(row.pictures["start"], row.pictures[tuned[0]])


def test_families_without_pictures_have_no_rows() -> None:
    assert rows_of(Quadratic(dimension=2))[0] == []


def test_an_evaluation_writes_pictures_of_every_test_and_links_them(tmp_path: Path) -> None:
    evaluate({"LSTM": lstm()}, FAMILY, 10, SETTINGS, tmp_path, silent=True)
    assert "![pictures](pictures.png)" in (tmp_path / "report.md").read_text(encoding="utf-8")
    validate(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))
    with Image.open(tmp_path / "pictures.png") as image:
        assert image.size == (1050, 1250)  # three tasks of one test and two of the other, five columns


@pytest.mark.parametrize("loss", [1.0, float("nan"), float("inf")])
def test_what_went_astray_can_be_drawn(loss: float, tmp_path: Path) -> None:
    nothing = np.full((4, 4, 3), np.nan)
    rows = [Row("one", {"start": nothing, "end": nothing}, {"end": loss}), Row("two", {"start": nothing}, {})]
    draw_gallery(rows, tmp_path / "pictures.png")
    assert (tmp_path / "pictures.png").stat().st_size > 1000
