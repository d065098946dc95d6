"""The picture of a diagnosis: nine panels for one family, and one more across for an imitator."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from l2l_scale.diagnosis.course import Course
from l2l_scale.diagnosis.examination import Examination
from l2l_scale.diagnosis.imitation import Imitated
from l2l_scale.diagnosis.report import middle
from l2l_scale.diagnosis.thresholds import CHAOS_LOOK, CHAOS_PROBLEM
from l2l_scale.evaluation.plots import LEARNED_COLOURS, TUNED_COLOURS

RED, VIOLET, ORANGE = LEARNED_COLOURS[:3]
BLUE, GREEN, BROWN = TUNED_COLOURS[:3]


def draw(one: Examination, course: Course, monitor: str | None, title: str, path: Path) -> None:
    """Draw what was measured on one family, and save it.

    Args:
        one: what was measured.
        course: of the run; may be empty.
        monitor: the metric that is shown of it.
        title: above the picture.
        path: of the PNG file.
    """
    rows = ["abc", "def", "ghi"] + ([] if one.imitated is None else ["jjj"])
    figure = Figure(figsize=(15, 11 * len(rows) / 3), layout="constrained")
    axes = figure.subplot_mosaic("\n".join(rows))
    _course(axes["a"], course, monitor)
    _gradient_norm(axes["b"], course)
    _losses(axes["c"], one)
    _sizes(axes["d"], one)
    _cosine(axes["e"], one)
    _meta_gradient(axes["f"], one)
    _gates(axes["g"], one)
    _sensitivity(axes["h"], one)
    _chaos(axes["i"], one)
    if one.imitated is not None:
        _imitation(axes["j"], one.imitated)
    for ax in axes.values():
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(which="major", alpha=0.25)
    figure.suptitle(shorten(title, 120, placeholder=" …"), fontsize=13, fontweight="bold")
    figure.savefig(path, dpi=110)


def _nothing(ax: Axes, heading: str, why: str) -> None:
    ax.set(title=heading, xticks=[], yticks=[])
    ax.text(0.5, 0.5, why, ha="center", va="center", wrap=True, fontsize=9, alpha=0.7, transform=ax.transAxes)


def _log_if_positive(ax: Axes, *values: np.ndarray) -> None:
    joined = np.concatenate([value[np.isfinite(value)].ravel() for value in values])
    if len(joined) and joined.min() >= 0 and joined.max() > 0:
        ax.set_yscale("log")


def _finite(values: Tensor) -> np.ndarray:
    """With NaN for what is infinite, so that nothing is drawn there."""
    array: np.ndarray = values.double().numpy()
    return np.where(np.isfinite(array), array, np.nan)


def _course(ax: Axes, course: Course, monitor: str | None) -> None:
    heading = "meta-training: losses"
    names = [name for name in course if name == monitor or name == "train/loss"]
    names = names or [name for name in course if name.startswith("train/loss/")]
    if not names:
        _nothing(ax, heading, "no metrics")
        return
    for name, colour in zip(names, (BLUE, RED, *TUNED_COLOURS[1:]), strict=False):
        ax.plot(*course[name], label=name, color=colour, marker="." if len(course[name].steps) < 9 else "")
    _log_if_positive(ax, *(course[name].values for name in names))
    ax.set(title=heading, xlabel="meta-step")
    ax.legend(frameon=False, fontsize=8)


def _gradient_norm(ax: Axes, course: Course) -> None:
    heading = "meta-training: gradient, rate, divergence"
    shown = {
        "train/grad_norm": ("gradient of φ, before clipping", RED),
        "train/learning_rate": ("learning rate", BLUE),
        "train/diverged": ("share of slots diverged", VIOLET),
        "train/num_skipped": ("meta-steps skipped so far", ORANGE),
    }
    drawn = [name for name in shown if name in course and course[name].values.max() > 0]
    if not drawn:
        _nothing(ax, heading, "no metrics")
        return
    for name in drawn:
        label, colour = shown[name]
        ax.plot(*course[name], label=label, color=colour)
    ax.set_yscale("log")
    ax.set(title=heading, xlabel="meta-step")
    ax.legend(frameon=False, fontsize=8)


def _losses(ax: Axes, one: Examination) -> None:
    losses, diverged = _finite(one.trajectory.losses), one.trajectory.diverged_at.numpy() > 0
    for task in range(losses.shape[1]):
        ax.plot(losses[:, task], color=ORANGE if diverged[task] else RED, alpha=0.3, linewidth=1)
    ax.plot(_finite(middle(one.trajectory.losses)), color=RED, linewidth=2.5, label="median over tasks")
    if one.imitated is not None:
        ax.plot(_finite(middle(one.imitated.losses)), color=BLUE, linestyle="--", label="its teacher")
    steps = set(one.trajectory.diverged_at.tolist()) - {0}
    for number, step in enumerate(sorted(steps)):
        label = "_" * number + "diverged"  # a label that begins with _ is not shown again
        ax.axvline(step, color=ORANGE, linestyle=":", linewidth=1, label=label)
    _log_if_positive(ax, losses)
    ax.set(title="loss along the trajectory", xlabel="inner step")
    ax.legend(frameon=False, fontsize=8)


def _sizes(ax: Axes, one: Examination) -> None:
    seen = one.trajectory
    for values, label, colour in (
        (seen.update, "update", RED),
        (seen.gradient, "gradient", BLUE),
        (seen.theta, "θ", GREEN),
    ):
        ax.plot(_finite(middle(values)), color=colour, label=label)
    _log_if_positive(ax, *(_finite(middle(values)) for values in (seen.update, seen.gradient, seen.theta)))
    ax.set(title="root mean squares (medians over tasks)", xlabel="inner step")
    ax.legend(frameon=False, fontsize=8)


def _cosine(ax: Axes, one: Examination) -> None:
    ax.plot(_finite(one.trajectory.cosine), color=RED, alpha=0.3, linewidth=1)
    ax.plot(_finite(middle(one.trajectory.cosine)), color=RED, linewidth=2.5)
    ax.axhline(0, color="black", linewidth=1, alpha=0.6)
    ax.set(title="cosine of −update and gradient", xlabel="inner step", ylim=(-1.05, 1.05))


def _meta_gradient(ax: Axes, one: Examination) -> None:
    heading, gradient = "meta-gradient by window", one.meta_gradient
    if gradient is None:
        _nothing(ax, heading, one.left_out["meta-gradient"])
        return
    steps = np.array(gradient.inner_steps)
    norms = _finite(gradient.norms)
    ax.plot(steps, norms, ".", color=BLUE, alpha=0.4)
    ax.plot(steps, _finite(gradient.mean_norms), color=RED, marker="o", label="norm of the mean over tasks")
    ax.plot(steps, _finite(gradient.noise), color=BROWN, linestyle="--", label="deviation over tasks")
    _log_if_positive(ax, norms)
    ax.set(title=heading, xlabel="first inner step of the window")
    ax.legend(frameon=False, fontsize=8)


def _gates(ax: Axes, one: Examination) -> None:
    heading, gates = "gates at their limits", one.insides.gates
    if not gates:
        _nothing(ax, heading, "no cells that are known")
        return
    places = np.arange(len(gates))
    low, high = np.array([gate.low for gate in gates]), np.array([gate.high for gate in gates])
    ax.barh(places, low, color=BLUE, label="closed (tanh: silent)")
    ax.barh(places, high, left=low, color=ORANGE, label="open (tanh: saturated)")
    ax.set_yticks(places, [f"{gate.name} {gate.place}" for gate in gates], fontsize=8)
    ax.invert_yaxis()
    head = "" if one.insides.head is None else f"; head {one.insides.head:.0%}"
    ax.set(title=heading + head, xlabel="share of activations", xlim=(0, 1))
    ax.legend(frameon=False, fontsize=8)


def _sensitivity(ax: Axes, one: Examination) -> None:
    ratios = np.array([change.ratio for change in one.changes])
    shown = np.where(np.isfinite(ratios), ratios, np.nan)
    colours = [RED if change.what == "update" else BLUE for change in one.changes]
    places = np.arange(len(ratios))
    ax.bar(places, shown - 1, bottom=1, color=colours)
    for place in places[~np.isfinite(ratios)]:
        ax.text(place, 1, "diverges", rotation=90, ha="center", va="bottom", fontsize=8)
    ax.axhline(1, color="black", linewidth=1)
    if np.isfinite(shown).any() and np.nanmin(shown) > 0 and np.nanmax(shown) / np.nanmin(shown) > 5:
        ax.set_yscale("log")
    ax.set_xticks(places, [f"{change.what}\n× {change.factor:g}" for change in one.changes], fontsize=8)
    ax.set(title="final loss, relative to the unperturbed one")


def _chaos(ax: Axes, one: Examination) -> None:
    heading, chaos = "growth of a tiny change of θ_0", one.chaos
    if chaos is None:
        _nothing(ax, heading, one.left_out["chaos"])
        return
    ax.plot(_finite(chaos.growth), color=RED, alpha=0.3, linewidth=1)
    ax.plot(_finite(chaos.medians), color=RED, linewidth=2.5)
    for limit in (CHAOS_LOOK, CHAOS_PROBLEM):
        if np.nanmax(_finite(chaos.growth), initial=0) > limit / 10:
            ax.axhline(limit, color="black", linestyle="--", linewidth=1, alpha=0.6)
    _log_if_positive(ax, _finite(chaos.growth))
    ax.set(title=heading, xlabel="inner step")


def _imitation(ax: Axes, imitated: Imitated) -> None:
    errors = _finite(imitated.medians)
    colours = (*TUNED_COLOURS, *LEARNED_COLOURS)
    for number, group in enumerate(imitated.groups):
        ax.plot(errors[:, number], color=colours[number % len(colours)], alpha=0.8, linewidth=1, label=group)
    ax.axhline(1, color="black", linewidth=1, alpha=0.6, label="no updates")
    _log_if_positive(ax, errors)
    ax.set(title="error of its updates relative to the teacher's (medians over tasks)", xlabel="inner step")
    ax.legend(frameon=False, fontsize=8)
