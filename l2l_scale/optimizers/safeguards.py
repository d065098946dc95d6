"""What a quasi-Newton step can be trusted with when all that is known are gradients with rounding errors.

Every step starts from an *anchor*, the best point so far, and leads to a *trial* point. There the next
gradient is measured, and these functions say whether the trial becomes the anchor, and whether what was
learned about the curvature is more than rounding. Shapes: vectors (*, N), numbers and masks (*, 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from l2l_scale.optimizers.quasi_newton import dot, norm, reciprocal

CURVATURE = 3.0
"""By how many times sᵀy must exceed what rounding can make of it."""
FORGETTING = 0.95
"""What is left of the steepness estimate after a step that improved: one wild region must not blind it."""
GROWTH = 4.0
"""Factor on a step that went downhill along a line without measurable curvature."""
MOST_TRUST = 1e3
"""How far the trust may grow along lines without measurable curvature."""
DISCREPANCY = 0.05
"""A pair whose step memory foretells up to this share of it needs not be written."""
RETREAT = 0.1
"""Factor on steps into unknown directions after one that failed without teaching anything."""
CORRECTION = (0.1, 10.0)
"""Range of the measured correction of the last step length; its root is applied to the next one."""


class Trial(NamedTuple):
    """What the gradient at the trial point says."""

    s: Tensor
    """From the anchor to the trial point; zero where the gradient is not finite."""
    y: Tensor
    """Change of the gradient along s."""
    moved: Tensor
    """Whether there was a step; a gradient that is not finite says so too."""
    improved: Tensor
    """Whether the loss is lower, as far as two gradients can tell."""
    noise: Tensor
    """What rounding may have done to a gradient here, as a norm."""
    steepness: Tensor
    """Largest recent ‖y‖ / ‖s‖, an estimate of the largest curvature."""


def judge(
    theta: Tensor, grad: Tensor, anchor: Tensor, at_anchor: Tensor, steepness: Tensor, eps: float
) -> Trial:
    """Judge a trial point.

    The change of the loss is estimated as ½ (∇f(anchor) + ∇f(trial))ᵀ s, the trapezoidal rule. It is exact
    for quadratics, and close to where a loss does not change any more it is far more accurate than the
    difference of two losses (the approximate Wolfe condition of Hager and Zhang 2005 is the same idea).

    Rounding of θ alone moves a gradient by eps · steepness · ‖θ‖, and of the sums in it by eps · ‖∇f‖.

    Args:
        theta: the trial point.
        grad: ∇f there.
        anchor: the best point so far.
        at_anchor: ∇f there.
        steepness: the estimate so far.
        eps: relative precision of the gradients.
    """
    finite = grad.isfinite().all(-1, keepdim=True) & theta.isfinite().all(-1, keepdim=True)
    s = torch.where(finite, theta - anchor, 0.0)
    y = torch.where(finite, grad - at_anchor, 0.0)
    length, change = norm(s), norm(y)
    before, after = dot(at_anchor, s), dot(at_anchor + y, s)
    improved = finite & (before + after < 0) & (before < 0)
    size = torch.maximum(norm(anchor), norm(anchor + s))

    def rounding(steepness: Tensor) -> Tensor:
        return 0.5 * eps * (steepness * size + norm(at_anchor))

    # Only where the loss falls is it known that a region is left behind, and that another one was measured.
    measurable = improved & (change > CURVATURE * rounding(FORGETTING * steepness))
    measured = (change * reciprocal(length, length > 0)).masked_fill(~measurable, 0.0)
    steepness = torch.where(improved, torch.maximum(FORGETTING * steepness, measured), steepness).detach()
    return Trial(s, y, ~finite | (length > 0), improved, rounding(steepness).detach(), steepness)


def has_curvature(s: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """Whether sᵀy is positive and more than rounding: BFGS's curvature condition, in finite precision."""
    curvature = dot(s, y)
    return (curvature > CURVATURE * norm(s) * noise) & (reciprocal(curvature, curvature > 0) > 0)


def correction(s: Tensor, y: Tensor, at_anchor: Tensor) -> Tensor:
    """By which factor a step s should have been longer: −∇f(anchor)ᵀ s / sᵀy, exact for quadratics.

    Zero where the curvature sᵀy is not positive.
    """
    curvature = dot(s, y)
    return -dot(at_anchor, s) * reciprocal(curvature, curvature > 0)


class Offer(NamedTuple):
    """The pair that a trial offers to the memory."""

    s: Tensor
    """The part of the trial's s that is conjugate to what is known."""
    y: Tensor
    new: Tensor
    """Whether that part is to be written."""
    whole: Tensor
    """Whether the trial's pair is to be written as it is."""
    scale: Tensor
    """sᵀy / yᵀy, a step length."""
    correction: Tensor
    """By which factor the step into new directions should have been longer."""


class Lengths(NamedTuple):
    """How far the next trial goes."""

    explore: Tensor
    """γ, the step length in directions of which nothing is known."""
    trust: Tensor
    """κ, the share of the quasi-Newton step that is taken in known directions."""
    failures: Tensor
    """Trials in a row that did not improve."""


def next_lengths(now: Lengths, trial: Trial, offer: Offer, first: Tensor) -> Lengths:
    """Adapt the lengths to a trial; where there was none, they stay.

    γ follows the root of the measured correction, or grows and shrinks by trial and error where nothing was
    measured. κ is one as long as all goes well; it is halved where a step failed and taught nothing, and
    grows beyond one along a line so flat that no change of the gradient can be measured.

    Args:
        now: the lengths of the trial.
        trial: the trial.
        offer: what it offers to the memory.
        first: where nothing was known before; the pair's own scale is then the best guess of γ.
    """
    written, improved = offer.new | offer.whole, trial.improved
    by_luck = torch.where(improved, GROWTH, RETREAT).to(now.explore)
    factor = torch.where(offer.new, offer.correction.clamp(*CORRECTION).sqrt(), by_luck)
    explore = now.explore * torch.where(offer.whole, 1.0, factor)
    explore = torch.where(offer.new & first, offer.scale, explore).clamp(1e-12, 1e12)
    measured = written | (norm(trial.y) > CURVATURE * trial.noise)
    higher = torch.minimum(GROWTH * now.trust, torch.where(measured, 1.0, MOST_TRUST).to(now.trust))
    lower = torch.where(written, now.trust.clamp(max=1), now.trust / 2)
    after = Lengths(
        explore, torch.where(improved, higher, lower), torch.where(improved, 0.0, now.failures + 1)
    )
    return Lengths(*(torch.where(trial.moved, new, old) for new, old in zip(after, now, strict=True)))


def start_again(lengths: Lengths, where: Tensor, steepness: Tensor) -> Lengths:
    """Lengths for an empty memory: a step of gradient descent that is safe as far as is known."""
    safe = reciprocal(steepness, steepness > 0)
    return Lengths(
        torch.where(where & (safe > 0), safe, lengths.explore),
        torch.where(where, 1.0, lengths.trust),
        lengths.failures.masked_fill(where, 0.0),
    )
