from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import draw_windows

from l2l_scale.estimators import LastLoss, LogLoss, MetaLoss, NormalizedLoss, RelativeLoss, SumLoss
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Quadratic
from l2l_scale.unroll import WindowBatch

RNG = np.random.default_rng(0)
LOSSES = RNG.random((3, 4)) + 0.1
START = RNG.random(4) * 10 - 5
TEACHER = RNG.random((3, 4)) - 0.5
INNER_STEP = np.array([0, 3, 6, 3])
WEIGHTS = [0.0, 1.0, 2.0, 0.5, 0.25, 0.0, 3.0, 4.0, 0.0]


def value(meta_loss: MetaLoss, losses: np.ndarray = LOSSES) -> np.ndarray:
    return meta_loss(torch.tensor(losses), torch.tensor(START), window(INNER_STEP)).numpy()


def window(inner_step: np.ndarray) -> WindowBatch:
    """Where in trajectories of 9 inner steps the slots stand, and what the teacher did there."""
    (batch,) = draw_windows(Quadratic(dimension=2), Schedule(horizon=9, window=3), 1)
    return batch._replace(inner_step=torch.tensor(inner_step), teacher={"losses": torch.tensor(TEACHER)})


TRANSFORMED = [
    (SumLoss, {}, LOSSES),
    (LogLoss, {}, np.log(LOSSES + 1e-8)),
    (LogLoss, {"epsilon": 0.5}, np.log(LOSSES + 0.5)),
    (NormalizedLoss, {}, LOSSES / (np.abs(START) + 1e-8)),
    (NormalizedLoss, {"epsilon": 0.5}, LOSSES / (np.abs(START) + 0.5)),
    (RelativeLoss, {}, LOSSES / (np.abs(TEACHER) + 1e-8)),
    (RelativeLoss, {"epsilon": 0.5}, LOSSES / (np.abs(TEACHER) + 0.5)),
]


@pytest.mark.parametrize(("kind", "options", "expected"), TRANSFORMED)
def test_values_equal_numpy(kind: type[MetaLoss], options: dict[str, float], expected: np.ndarray) -> None:
    np.testing.assert_allclose(value(kind(**options)), expected.sum(0), rtol=1e-14)


@pytest.mark.parametrize(("kind", "options", "expected"), TRANSFORMED)
def test_weights_belong_to_the_inner_step_at_which_a_slot_stands(
    kind: type[MetaLoss], options: dict[str, float], expected: np.ndarray
) -> None:
    weights = np.array([[WEIGHTS[INNER_STEP[slot] + k] for slot in range(4)] for k in range(3)])
    np.testing.assert_allclose(
        value(kind(weights=WEIGHTS, **options)), (weights * expected).sum(0), rtol=1e-14, atol=1e-15
    )


def test_the_last_loss_alone_counts_only_in_the_last_window() -> None:
    for last in (SumLoss([0.0] * 8 + [1.0]), LastLoss()):
        np.testing.assert_array_equal(value(last), [0.0, 0.0, LOSSES[2, 2], 0.0])


@pytest.mark.parametrize(("kind", "options", "expected"), TRANSFORMED)
def test_growing_weights_are_powers_of_the_part_of_the_trajectory_that_is_done(
    kind: type[MetaLoss], options: dict[str, float], expected: np.ndarray
) -> None:
    weights = np.array([[3 * ((INNER_STEP[slot] + k + 1) / 9) ** 2 for slot in range(4)] for k in range(3)])
    np.testing.assert_allclose(value(kind(growth=2.0, **options)), (weights * expected).sum(0), rtol=1e-14)


def test_growing_weights_fit_any_horizon_and_exclude_given_ones() -> None:
    SumLoss(growth=1.5).check_horizons([9, 18])
    with pytest.raises(ValueError, match=r"growth \(1\.0\) must be 0 where weights are given"):
        SumLoss([1.0], growth=1.0)
    with pytest.raises(ValueError, match=r"growth \(-1\.0\) must be"):
        LogLoss(growth=-1.0)


@pytest.mark.parametrize("number", [8, 10])
def test_weights_of_another_horizon_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=rf"weights \({number} numbers\) must have one number per .*\(9\)"):
        SumLoss([1.0] * number).check_horizons([9])
    with pytest.raises(ValueError, match=r"horizon \(18\)"):
        SumLoss([1.0] * 9).check_horizons([9, 18])
    SumLoss([1.0] * 9).check_horizons([9])
    SumLoss().check_horizons([9, 18])


def test_a_meta_loss_that_compares_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match=r"data\.teacher"):
        RelativeLoss().check_teacher(frozenset())
    RelativeLoss().check_teacher(frozenset({"losses"}))
    SumLoss().check_teacher(frozenset())


def test_unit_weights_are_the_default() -> None:
    np.testing.assert_array_equal(value(SumLoss([1.0] * 9)), value(SumLoss()))


def test_values_of_windows_add_up_to_the_trajectory() -> None:
    meta_loss, losses, start = SumLoss(WEIGHTS), torch.tensor(RNG.random((9, 1))), torch.ones(1)
    whole = meta_loss(losses, start, window(np.array([0])))
    parts = [meta_loss(losses[k : k + 3], start, window(np.array([k]))) for k in (0, 3, 6)]
    assert abs(float(sum(parts) - whole)) <= 1e-14


def test_settings_are_kept_under_their_names() -> None:
    assert SumLoss().weights is None
    assert LogLoss([1, 2], epsilon=0.1).weights == (1, 2)
    assert LogLoss([1, 2], epsilon=0.1).epsilon == 0.1


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0], r"weights\[1\] \(-1.0\) must be a finite number >= 0"),
        ([math.nan], r"weights\[0\] \(nan\)"),
        ([1.0, math.inf], r"weights\[1\] \(inf\)"),
        ([0.0, 0.0], r"weights \(\[0.0, 0.0\]\) must have at least one number > 0"),
        ([], r"weights \(\[\]\) must have at least one number > 0"),
    ],
)
@pytest.mark.parametrize("kind", [SumLoss, LogLoss, NormalizedLoss])
def test_bad_weights_are_refused(kind: type[MetaLoss], weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(weights)


@pytest.mark.parametrize("kind", [LogLoss, NormalizedLoss])
@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_bad_epsilon_is_refused(kind: type[MetaLoss], epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"epsilon \(.*\) must be a finite number > 0"):
        kind(epsilon=epsilon)
