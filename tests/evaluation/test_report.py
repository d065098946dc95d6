"""The report: statistics against numpy, the form of report.json, and a whole evaluation in small."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Regression
from matplotlib.figure import Figure
from torch import Tensor

from l2l_scale.evaluation import Evaluation, evaluate, tune_baselines, validate
from l2l_scale.evaluation.curves import HeldOut, loss_curves
from l2l_scale.evaluation.markdown import markdown
from l2l_scale.evaluation.plots import finite_mean, plot_curves
from l2l_scale.evaluation.report import (
    Curves,
    compare,
    optimizer_report,
    paired_report,
    steps_to,
    summarise,
)
from l2l_scale.evaluation.tables import losses_table, number, shifts_table, verdict
from l2l_scale.optimizers import CoordinatewiseLSTM, UpdateRule
from l2l_scale.optimizers.classic import SGD
from l2l_scale.rng import Split
from l2l_scale.tasks import Quadratic
from l2l_scale.tree import Tree

FAMILY = Quadratic(dimension=2)
SMALL = Evaluation(
    num_tasks=16,
    num_tuning_tasks=12,
    num_reference_tasks=4,
    num_shift_tasks=8,
    num_shift_tuning_tasks=8,
    inner_steps=25,
    shifts={"wide": Quadratic(dimension=2, w_scale=2.0)},
    baselines=["SGD", "Adam"],
    num_workers=1,
    cache=False,
)


class Explode(UpdateRule):
    """Multiplies θ by a million at every inner step."""

    def init_state(self, theta: Tensor) -> Tree:
        return ()

    def forward(self, grad: Tensor, theta: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        return 1e6 * theta, state


def lstm() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=4, layers=1)


def random_losses(seed: int, tasks: int = 31, steps: int = 120) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).lognormal(size=(steps + 1, tasks)))


def learned(losses: Tensor) -> Curves:
    return Curves("learned", {}, None, losses)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("evaluation") / "new folder"
    return evaluate({"LSTM": lstm(), "bomb": Explode()}, FAMILY, 10, SMALL, out, silent=True), out


def test_statistics_are_those_of_numpy() -> None:
    losses = random_losses(0, tasks=30)
    report, values = optimizer_report(learned(losses), 100), losses.numpy()
    assert list(report["mean"]) == ["20", "50", "100", "120"]
    for t in (20, 50, 100, 120):
        assert report["mean"][str(t)] == pytest.approx(values[t].mean(), rel=1e-12)
        assert report["median"][str(t)] == pytest.approx(np.median(values[t]), rel=1e-12)
        assert report["stderr"][str(t)] == pytest.approx(values[t].std(ddof=1) / np.sqrt(30), rel=1e-12)
    sums = values[1:101].sum(0)
    assert report["sum_mean"] == pytest.approx(sums.mean(), rel=1e-12)
    assert report["sum_stderr"] == pytest.approx(sums.std(ddof=1) / np.sqrt(30), rel=1e-12)


def test_paired_statistics_are_those_of_numpy_on_the_common_tasks() -> None:
    a, b = random_losses(1), random_losses(2, tasks=20)
    report = paired_report(a, b, 50)
    sums = a.numpy()[1:51, :20].sum(0) - b.numpy()[1:51, :20].sum(0)
    final = a.numpy()[50, :20] - b.numpy()[50, :20]
    assert report["num_tasks"] == 20
    for difference, part in ((sums, report["sum"]), (final, report["final"])):
        assert part["share_lower"] == pytest.approx((difference < 0).mean())
        assert part["mean_difference"] == pytest.approx(difference.mean(), rel=1e-9)
        assert part["stderr"] == pytest.approx(difference.std(ddof=1) / np.sqrt(20), rel=1e-9)
        assert part["num_finite"] == 20


def test_steps_to_match_are_the_first_as_low_as_the_other_at_the_horizon() -> None:
    other = torch.tensor([[9.0, 9.0, 9.0], [5.0, 4.0, torch.inf], [0.0, 0.0, 0.0]])  # @1: 5, 4, infinite
    mine = torch.tensor([[9.0, 9.0, 9.0], [5.0, 9.0, 9.0], [0.0, 9.0, 9.0], [0.0, 4.0, 9.0]])
    assert steps_to(mine, other[1]).tolist() == [1.0, 3.0, 0.0]
    assert paired_report(mine, other, 1)["steps_to_match"] == 1
    assert paired_report(mine[:, :2], other, 1)["steps_to_match"] == 2  # between the two
    assert paired_report(mine[:3, :2], other, 1)["steps_to_match"] is None  # half of them never


def test_tables_and_verdict_say_when_the_best_baseline_is_matched() -> None:
    falling = torch.arange(20.0, 0.0, -1)[:, None].expand(20, 3)
    curves = {
        "mine": learned(falling),
        "slow": Curves("tuned", {}, None, falling / 2 + 10),
        "best": Curves("tuned", {}, None, falling / 2 + 6),
        "never": Curves("tuned", {}, None, falling - 16),
    }
    report = summarise(FAMILY, 1, 10, {name: curves[name] for name in ("mine", "slow", "best")})
    table = losses_table(report, 10, every_step=False)
    cells = {row[0]: row[-1] for row in table.rows}
    assert table.header[-1] == "matched after"
    assert cells == {"mine": "–", "best": "9 (90 %)", "slow": "5 (50 %)"}
    assert verdict(report, 10).endswith("As low as best @10: after 9 (90 %) inner steps (median over tasks).")
    report = summarise(FAMILY, 1, 10, {name: curves[name] for name in ("mine", "never")})
    assert verdict(report, 10).endswith("As low as never @10: never in the run (median over tasks).")


def test_equal_is_not_lower_and_infinite_is_never_lower() -> None:
    a = torch.tensor([1.0, 2.0, torch.inf, torch.inf, 1.0])
    b = torch.tensor([1.0, 3.0, torch.inf, 5.0, torch.inf])
    result = compare(a, b)
    assert result["share_lower"] == pytest.approx(2 / 5)
    assert result["num_finite"] == 2
    assert result["mean_difference"] == pytest.approx(-0.5)


def test_one_task_astray_makes_the_mean_null_and_is_counted() -> None:
    losses = random_losses(3).clamp(max=5)
    losses[60:, 4] = torch.inf
    report = optimizer_report(learned(losses), 100)
    assert report["mean"]["50"] is not None
    assert report["mean"]["100"] is report["stderr"]["100"] is report["sum_mean"] is None
    assert report["median"]["100"] is not None
    assert report["num_diverged_by"] == {"20": 0, "50": 0, "100": 1, "120": 1}


def test_a_task_counts_as_diverged_while_it_is_above_ten_times_start_plus_one() -> None:
    losses = torch.full((121, 3), 2.0)  # may rise by 10 · (2 + 1) = 30
    losses[30:60, 0], losses[110:, 1] = 33.0, 33.0
    losses[40, 2] = 31.9
    report = optimizer_report(learned(losses), 100)
    assert report["num_diverged_by"] == {"20": 0, "50": 1, "100": 0, "120": 1}
    assert report["num_diverged"] == 1
    assert report["num_spiked"] == 2


def test_one_task_has_no_standard_error() -> None:
    assert optimizer_report(learned(random_losses(0, tasks=1)), 100)["stderr"]["100"] is None


def test_the_report_is_strict_json_of_the_documented_form(whole: tuple[Any, Path]) -> None:
    report, out = whole

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    read = json.loads((out / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == report
    validate(read)
    assert {path.name for path in out.iterdir()} == {"report.json", "report.md", "curves.png", "tests.png"}
    assert (out / "curves.png").stat().st_size > 10_000
    assert (out / "tests.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 1, r"report.version \(1\) must be 3"),
        (("horizon",), "10", r"report.horizon \('10'\)"),
        (("tests", "held-out", "optimizers", "SGD", "kind"), "best", r"SGD.kind \('best'\)"),
        (("tests", "held-out", "optimizers", "SGD", "mean", "10"), "low", r"SGD.mean.10 \('low'\)"),
        (
            ("tests", "wide", "paired", "LSTM", "Adam", "sum", "share_lower"),
            None,
            r"sum.share_lower \(None\)",
        ),
        (("tests", "wide", "more"), 1, r"report.tests.wide must have the keys .* unknown: \['more'\]"),
        (("seed",), 1, r"report must have the keys .* unknown: \['seed'\]"),
    ],
)
def test_another_form_is_refused_by_place(
    whole: tuple[Any, Path], path: tuple[str, ...], value: object, message: str
) -> None:
    report = copy.deepcopy(whole[0])
    place = report
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        validate(report)


def test_everything_runs_on_the_same_tasks_and_from_the_path_of_training(whole: tuple[Any, Path]) -> None:
    test = whole[0]["tests"]["held-out"]
    entry = test["optimizers"]["LSTM"]
    held_out = HeldOut(family=FAMILY, seed=0, split=Split.TEST, num_tasks=16, inner_steps=25)
    curves = loss_curves(lstm(), held_out).double()
    assert entry["mean"]["20"] == pytest.approx(curves[20].mean().item(), rel=1e-5)
    assert entry["sum_mean"] == pytest.approx(curves[1:11].sum(0).mean().item(), rel=1e-5)
    sgd = test["optimizers"]["SGD"]
    curves = loss_curves(SGD(**sgd["hyper_parameters"]), held_out).double()
    assert sgd["mean"]["25"] == pytest.approx(curves[25].mean().item(), rel=1e-6)
    assert [name for name in test["optimizers"] if not name.endswith(" (sum)")] == [
        "LSTM", "bomb", "SGD", "Adam", "BFGS", "L-BFGS", "CG",
    ]  # fmt: skip
    assert test["optimizers"]["CG"]["num_tasks"] == 4
    assert test["paired"]["LSTM"]["CG"]["num_tasks"] == 4


def test_baselines_run_transferred_and_tuned_again_on_a_shift(whole: tuple[Any, Path]) -> None:
    tests = whole[0]["tests"]
    home, shift = tests["held-out"]["optimizers"], tests["wide"]["optimizers"]
    assert shift["SGD"]["hyper_parameters"] == home["SGD"]["hyper_parameters"]
    assert shift["SGD"]["tuning"]["tuned_on"] == "held-out"
    assert shift["SGD (here)"]["tuning"]["tuned_on"] == "wide"
    assert shift["SGD (here)"]["hyper_parameters"] != home["SGD"]["hyper_parameters"]
    assert tests["wide"]["inner_steps"] == 20


def test_a_rule_that_explodes_is_shown_as_such_everywhere(whole: tuple[Any, Path]) -> None:
    report, out = whole
    entry = report["tests"]["held-out"]["optimizers"]["bomb"]
    assert entry["num_diverged"] == 16
    assert entry["mean"]["25"] is None
    assert report["tests"]["held-out"]["paired"]["LSTM"]["bomb"]["sum"]["share_lower"] == 1
    assert "| **∞** |" in (out / "report.md").read_text(encoding="utf-8")


def test_markdown_and_tables_name_every_optimizer(whole: tuple[Any, Path]) -> None:
    report, out = whole
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text == markdown(report)
    for test in report["tests"].values():
        assert {row[0] for row in losses_table(test, 10, every_step=True).rows} == test["optimizers"].keys()
        assert all(f"| {name} |" in text or f"| **{name}** |" in text for name in test["optimizers"])
    shifts = shifts_table(report)
    assert shifts is not None
    assert [row[0] for row in shifts.rows] == ["wide"]


def test_the_verdict_says_what_is_not_beaten() -> None:
    curves = {
        "mine": learned(torch.full((11, 4), 2.0)),
        "good": Curves("tuned", {}, None, torch.full((11, 4), 1.0)),
        "bad": Curves("tuned", {}, None, torch.full((11, 4), 4.0)),
    }
    text = verdict(summarise(FAMILY, 1, 10, curves), 10)
    assert "2.00 × the best tuned baseline (good, 1.00). Not beaten in mean @10: good (1.00)." in text
    del curves["good"]
    assert "0.50 × the best tuned baseline (bad, 4.00). Not beaten in mean @10: none." in verdict(
        summarise(FAMILY, 1, 10, curves), 10
    )


def test_two_evaluations_differ_in_their_times_only(whole: tuple[Any, Path]) -> None:
    again = evaluate({"LSTM": lstm(), "bomb": Explode()}, FAMILY, 10, SMALL, silent=True)
    assert again["tests"] == whole[0]["tests"]


@pytest.mark.slow
def test_worker_processes_change_nothing(whole: tuple[Any, Path]) -> None:
    settings = replace(SMALL, num_workers=2)
    report = evaluate({"LSTM": lstm(), "bomb": Explode()}, FAMILY, 10, settings, silent=True)
    assert report["num_workers"] == 2
    assert report["tests"] == whole[0]["tests"]
    assert report["cpu_seconds"] > 0


def test_a_family_with_minibatches_has_no_references(tmp_path: Path) -> None:
    settings = replace(SMALL, shifts=None, inner_steps=12)
    report = evaluate({"LSTM": lstm()}, Regression(), 10, settings, tmp_path, silent=True)
    kinds = {entry["kind"] for entry in report["tests"]["held-out"]["optimizers"].values()}
    assert kinds == {"learned", "tuned"}


def test_the_callers_rule_is_left_as_it_was() -> None:
    rule = lstm()
    before = {name: value.clone() for name, value in rule.state_dict().items()}
    evaluate({"LSTM": rule}, FAMILY, 10, replace(SMALL, shifts=None), silent=True)
    assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
    assert all(parameter.grad is None for parameter in rule.parameters())


def test_tuning_alone_writes_its_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tune_baselines(FAMILY, 10, SMALL, tmp_path)
    read = json.loads((tmp_path / "tuning.json").read_text(encoding="utf-8"))
    assert read["SGD"]["final"]["hyper_parameters"] == tuned["SGD"].final.hyper_parameters
    assert "Adam" in capsys.readouterr().out


def test_the_printed_table_shows_whole_names_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate({"a learned rule": lstm()}, FAMILY, 10, SMALL)
    printed = capsys.readouterr().out
    assert "a learned rule" in printed
    assert "…" not in printed.replace("1…10", "")


def test_the_picture_survives_negative_and_infinite_losses(tmp_path: Path) -> None:
    astray = random_losses(0, steps=30)
    astray[5:] = torch.inf
    curves = {
        "astray": learned(astray),
        "negative": Curves("tuned", {}, None, random_losses(1, steps=30) - 5),
    }
    for i, some in enumerate((curves, {"astray": curves["astray"]})):
        plot_curves(some, 10, "title", "subtitle", tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 10_000


def test_a_long_subtitle_stays_within_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plot_curves(
        {"a": learned(random_losses(0, steps=10))}, 10, "title", "a family " * 100, tmp_path / "a.png"
    )
    (subtitle,) = (text for text in figures[0].texts if "a family" in text.get_text())
    box = subtitle.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figures[0].bbox.width


def test_the_mean_of_the_picture_is_over_finite_tasks() -> None:
    losses = np.array([[1.0, 2.0, 6.0], [1.0, np.inf, 4.0], [np.inf] * 3])
    mean, error = finite_mean(losses)
    np.testing.assert_allclose(mean, [3.0, 2.5, np.nan])
    np.testing.assert_allclose(error[:2], [np.std([1, 2, 6], ddof=1) / np.sqrt(3), 1.5])


@pytest.mark.parametrize(
    ("value", "text"), [(None, "∞"), (0.0, "0.00"), (123.4, "123"), (0.1234, "0.123"), (3.6e-27, "3.60e-27")]
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tasks": 0}, r"num_tasks \(0\)"),
        ({"inner_steps": -5}, r"inner_steps \(-5\)"),
        ({"baselines": ["Adan"]}, r"baselines \('Adan'\) must be among"),
        ({"shifts": {"held-out": FAMILY}}, "shifts must not be called 'held-out'"),
    ],
)
def test_mistakes_in_the_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_mistakes_in_the_call_are_named() -> None:
    with pytest.raises(ValueError, match=r"inner_steps \(25\) must be at least the horizon \(30\)"):
        evaluate({"LSTM": lstm()}, FAMILY, 30, SMALL, silent=True)
    with pytest.raises(ValueError, match="the learned rule 'Adam' has the name of a baseline"):
        evaluate({"Adam": lstm()}, FAMILY, 10, SMALL, silent=True)


def test_steps_to_a_low_loss() -> None:
    losses = torch.tensor([[9.0, 9.0, 1e-7], [1e-3, 9.0, 1.0], [1e-6, 1e-5, 1.0], [1.0, 1e-7, 1.0]])
    assert steps_to(losses, 1e-6).tolist() == [2.0, 3.0, 0.0]
    assert steps_to(losses, 1e-8).tolist() == [math.inf] * 3
    report = optimizer_report(learned(losses), 3)
    assert report["steps_to"] == {"1e-02": 1.0, "1e-04": 2.0, "1e-06": 2.0}
    half = torch.tensor([[1.0, 1.0], [1e-7, 1.0]])
    assert optimizer_report(learned(half), 1)["steps_to"]["1e-06"] is None


def test_tables_show_steps_to_the_lowest_loss_that_a_rule_reaches() -> None:
    curves = {"LSTM": learned(torch.tensor([[1.0], [1e-3], [1e-5]])), "CG": learned(torch.ones(3, 1))}
    curves["CG"] = curves["CG"]._replace(kind="reference", losses=torch.tensor([[1.0], [1e-9], [1e-9]]))
    table = losses_table(summarise(FAMILY, 1, 2, curves), 2, every_step=False)
    column = table.header.index("steps to 1e-04")
    assert [row[column] for row in table.rows] == ["2", "1"]
    never = losses_table(summarise(FAMILY, 1, 2, {"LSTM": learned(torch.ones(3, 1))}), 2, every_step=False)
    assert not any("steps to" in title for title in never.header)
