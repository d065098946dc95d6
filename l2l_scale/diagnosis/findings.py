"""From what was measured along trajectories to findings."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from l2l_scale.diagnosis.finding import Finding, graded
from l2l_scale.diagnosis.meta_gradient import MetaGradient
from l2l_scale.diagnosis.sensitivity import Change, Chaos
from l2l_scale.diagnosis.thresholds import (
    CHAOS_LOOK,
    CHAOS_PROBLEM,
    DEAD_UPDATE,
    DIVERGED_PROBLEM,
    EDGE_RATIO,
    NO_GRADIENT,
    NOISE_LOOK,
    PHASE_LOOK,
    PHASE_PROBLEM,
    PHASE_SILENT,
    SCALE_RATIO,
    SLOW_FALL,
    STEP_GAIN,
)
from l2l_scale.diagnosis.trajectory import Trajectory
from l2l_scale.evaluation.report import median


def of_phi(finite: bool) -> Iterator[Finding]:
    """Whether φ is finite."""
    if not finite:
        yield Finding("problem", "φ", "φ has numbers that are not finite", "export an earlier checkpoint")


def of_updates(seen: Trajectory) -> Iterator[Finding]:
    """Size and direction of the updates."""
    size = float(median(seen.update.amax(0) / seen.theta.amax(0).clamp(min=1e-300)))
    finite = seen.losses[0].isfinite()
    fall = (seen.losses[0] - seen.losses[-1]) / seen.losses[0].abs().clamp(min=1e-30)
    fell = float(median(fall[finite])) if bool(finite.any()) else math.nan
    cosine = seen.cosine[seen.cosine.isfinite()]
    uphill = len(cosine) > 0 and float(cosine.median()) < 0
    text = (
        f"largest update {size:.2g} of θ; rms(update) / rms(gradient) "
        f"{_middle(seen.update / seen.gradient):.2g}, cosine with −gradient {_middle(seen.cosine):.2f} "
        "(medians); "
        f"half of the tasks lose {fell:.1%} of their first loss or more"
    )
    if size < DEAD_UPDATE:
        advice = (
            "the rule is dead: raise output_scale or the head's scale, or model.learning_rate; check that "
            "features bring the gradient near one (RNNprop, LogSign) and that φ gets a gradient (below)"
        )
        yield Finding("problem", "updates", text, advice)
    elif fell < SLOW_FALL and not bool((seen.diverged_at > 0).any()):
        advice = "hardly anything is learned yet: train longer, or raise the head's scale"
        yield Finding("look", "updates", text, advice)
    elif uphill:
        advice = "most updates point uphill: look at momentum, and at the sign of the head"
        yield Finding("look", "updates", text, advice)
    else:
        yield Finding("ok", "updates", text)


def of_divergence(seen: Trajectory) -> Iterator[Finding]:
    """Tasks that diverge, and those that rise far above their start for a while."""
    at = seen.diverged_at[seen.diverged_at > 0]
    count, share = len(seen.diverged_at), len(at) / len(seen.diverged_at)
    if len(at):
        text = (
            f"{share:.0%} of the tasks ({len(at)} of {count}) diverge, half of them by inner step "
            f"{float(median(at.double())):.0f}, the first at {int(at.min())}"
        )
        advice = (
            "lower the head's scale or output_scale; begin with a short horizon (StagedHorizons); a TanhExp "
            "head bounds each step; NormalizedLoss or LogLoss keep a few tasks from ruling φ"
        )
        yield Finding(graded(share, 0, DIVERGED_PROBLEM), "divergence", text, advice)
    elif bool(seen.spiked.any()):
        text = f"no task diverges, but {int(seen.spiked.sum())} of {count} rise far above their start"
        yield Finding("look", "divergence", text, "lower the head's scale; LogLoss punishes spikes less")
    else:
        yield Finding("ok", "divergence", f"none of {count} tasks diverges or rises far above its start")


def of_meta_gradient(gradient: MetaGradient, clip: float | None) -> Iterator[Finding]:
    """Size by phase, and noise."""
    norms = gradient.mean_norms
    known = norms[~norms.isnan()]
    if not len(known):
        text = "no task gives a finite meta-gradient in its first window"
        yield Finding("problem", "meta-gradient", text, "cure divergence first; shorter data.window")
        return
    first, worst = float(known[0]), int(known.argmax())
    step = gradient.inner_steps[worst]
    ratio = float(known[worst]) / first if first > 0 else (math.inf if float(known[worst]) > 0 else 1.0)
    text = (
        f"norm {first:.2g} in the first window, largest {float(known[worst]):.2g} in the one from inner step "
        f"{step} ({ratio:.2g} ×)"
    )
    severity = graded(ratio, PHASE_LOOK, PHASE_PROBLEM)
    if float(known.max()) < NO_GRADIENT:
        text = f"largest norm {float(known.max()):.2g}: nothing reaches φ"
        advice = "updates or losses do not depend on φ: look at the head, at dead units, and the task's loss"
        yield Finding("problem", "meta-gradient", text, advice)
    elif severity != "ok":
        clipping = f"is on, at {clip:g}" if clip else "is off: trainer.gradient_clip_val 1"
        advice = f"late windows rule φ; clipping {clipping}; shorter data.window; LogLoss or NormalizedLoss"
        yield Finding(severity, "meta-gradient", text, advice)
    elif float(known.min()) < PHASE_SILENT * float(known.max()):
        quiet = gradient.inner_steps[int(known.argmin())]
        text += f"; the window from inner step {quiet} has {float(known.min() / known.max()):.0e} of it"
        advice = "some phases teach next to nothing, as the losses are small there: LogLoss weighs all alike"
        yield Finding("look", "meta-gradient", text, advice)
    else:
        yield Finding("ok", "meta-gradient", text)
    yield from _of_noise(gradient)


def _of_noise(gradient: MetaGradient) -> Iterator[Finding]:
    ratio = gradient.signal_to_noise
    if math.isnan(ratio):
        yield Finding("ok", "noise", "not known: it needs several tasks that do not diverge")
        return
    text = (
        f"signal to noise of a meta-step of {gradient.slots_per_meta_step} slots: {ratio:.2g} "
        f"(known above {gradient.resolution:.2g}; with more --tasks below)"
    )
    if max(ratio, gradient.resolution) < NOISE_LOOK:
        advice = (
            "the noise is far above the signal: more data.slots or trainer.accumulate_grad_batches, or a "
            "lower rate. At the end of a run it is normal: little is left to learn"
        )
        yield Finding("look", "noise", text, advice)
    else:
        yield Finding("ok", "noise", text)


def of_sensitivity(changes: list[Change]) -> Iterator[Finding]:
    """What factors on updates and gradients do."""
    if all(math.isnan(change.ratio) for change in changes):
        yield Finding("ok", "sensitivity", "not known: every task diverges without a change too")
        return
    ratios = {(change.what, change.factor): change for change in changes}
    shown = ", ".join(f"{what} × {factor:g}: {change.ratio:.2g}" for (what, factor), change in ratios.items())
    text = f"final loss relative to the unperturbed one: {shown}"
    near = [ratios["update", factor] for factor in (0.9, 1.1)]
    far = [ratios["update", factor] for factor in (0.5, 2.0)]
    scale = [change for (what, _), change in ratios.items() if what == "gradient"]
    if any(change.ratio > EDGE_RATIO or change.diverged > DIVERGED_PROBLEM for change in near):
        advice = (
            "a tenth decides: the rule stands on the edge of stability. A longer horizon or RandomScaling in "
            "training makes it choose safer steps"
        )
        yield Finding("look", "sensitivity", text, advice)
    elif any(change.ratio < STEP_GAIN for change in far):
        better = min(far, key=lambda change: change.ratio)
        advice = (
            f"steps × {better.factor:g} would end lower: train longer, or scale the head so to start with"
        )
        yield Finding("look", "sensitivity", text, advice)
    elif any(change.ratio > SCALE_RATIO or change.diverged > DIVERGED_PROBLEM for change in scale):
        advice = (
            "the rule rests on the scale of its gradients: for other tasks use scale-free features (RNNprop, "
            "LogSign) or RandomScaling; on tasks like those of training this is no fault"
        )
        yield Finding("look", "sensitivity", text, advice)
    else:
        yield Finding("ok", "sensitivity", text)


def of_chaos(chaos: Chaos) -> Iterator[Finding]:
    """How a tiny perturbation grows."""
    largest, at = float(chaos.medians.max()), int(chaos.medians.argmax())
    text = (
        f"a tiny change of θ_0 grows to {largest:.2g} × (inner step {at}); exponent per inner step "
        f"{chaos.exponent:+.3f} over {len(chaos.growth)} inner steps"
    )
    severity = graded(largest, CHAOS_LOOK, CHAOS_PROBLEM)
    advice = (
        "the trajectory is chaotic, so its meta-gradient explodes: shorter data.window, smaller steps, "
        "a shorter horizon first (StagedHorizons)"
    )
    yield Finding(severity, "chaos", text, "" if severity == "ok" else advice)


def _middle(values: Tensor) -> float:
    """Median over what is finite."""
    finite = values[values.isfinite()]
    return float(torch.median(finite)) if len(finite) else math.nan
