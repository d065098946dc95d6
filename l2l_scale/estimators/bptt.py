"""Truncated backpropagation through time."""

from __future__ import annotations

from collections.abc import Sequence

from l2l_scale.checks import check_count
from l2l_scale.estimators.base import Estimate, GradientEstimator
from l2l_scale.estimators.coordinates import draw_coordinates
from l2l_scale.estimators.objectives import MetaLoss, SumLoss
from l2l_scale.optimizers.base import TwoPhaseRule, UpdateRule
from l2l_scale.tasks.base import TaskFamily
from l2l_scale.unroll import Carry, InnerGradient, WindowBatch, unroll


class TruncatedBPTT(GradientEstimator):
    """Backpropagation through the window, cut at its start. Window = horizon is full BPTT.

    Slots that diverge in the window contribute nothing. To keep their infinities out of the gradient the
    window is then unrolled a second time, so wild early phases of a run are slower.

    Args:
        second_order: use the true gradient, through ∇f(θ_t) as well. The default, first order, is the
            paper's choice; it is cheaper and needs no second derivatives of the task.
        meta_loss: what is minimised; the sum of the losses if not given.
        coordinates: backpropagate through so many coordinates, drawn by importance, instead of all: for very
            large optimizees, in first order, with a fused backend. The estimate stays unbiased. Of a
            grouped rule, every rule draws so many of its own.

    Raises:
        ValueError: if coordinates is not a whole number of at least 1, or given together with second_order.
    """

    def __init__(
        self, second_order: bool = False, meta_loss: MetaLoss | None = None, coordinates: int | None = None
    ) -> None:
        if coordinates is not None:
            check_count("coordinates", coordinates)
            if second_order:
                raise ValueError(
                    f"coordinates ({coordinates}) must not be given with second_order: the true gradient "
                    "goes through all coordinates of a problem together"
                )
        self.coordinates = coordinates
        self.second_order = second_order
        self.mode = InnerGradient.SECOND_ORDER if second_order else InnerGradient.FIRST_ORDER
        self.meta_loss = SumLoss() if meta_loss is None else meta_loss

    def check_horizons(self, horizons: Sequence[int]) -> None:
        """Raise ``ValueError`` if the meta-loss was made for another horizon."""
        self.meta_loss.check_horizons(horizons)

    def check_teacher(self, gives: frozenset[str]) -> None:
        """Raise ``ValueError`` if the meta-loss compares with a teacher and none is given."""
        self.meta_loss.check_teacher(gives)

    def check_rule(self, rule: UpdateRule) -> None:
        """Raise ``ValueError`` if coordinates are to be drawn, but backward goes through all together."""
        if self.coordinates is not None and not isinstance(rule, TwoPhaseRule):
            raise ValueError(
                f"coordinates ({self.coordinates}) needs a fused backend, where backward goes through them "
                "one by one, and this rule is computed without. Leave it out, or see why there is none by "
                "model.backend=fused"
            )

    def __call__(self, rule: UpdateRule, family: TaskFamily, carry: Carry, batch: WindowBatch) -> Estimate:
        """The sum of the meta-losses of the slots that did not diverge, over the number of all slots.

        So the mean over ranks with equally many slots is that over all slots, whichever diverged where.
        """
        draw = None if self.coordinates is None else draw_coordinates(self.coordinates, batch.window_index)
        rollout = unroll(rule, family, carry, batch, self.mode, draw=draw)
        diverged = rollout.carry.diverged
        if diverged.any():
            # Masking alone is not enough: zero times the infinite derivatives of a diverged slot is NaN.
            # So the window is run again with those slots held at their (finite) start.
            del rollout  # with its graph: two would take twice the memory
            rollout = unroll(rule, family, carry, batch, self.mode, diverged, draw)
            rollout = rollout._replace(carry=rollout.carry._replace(diverged=diverged))
        values = self.meta_loss(rollout.losses, rollout.carry.start_loss, batch)
        return Estimate(values.masked_fill(diverged, 0.0).mean(), rollout)
