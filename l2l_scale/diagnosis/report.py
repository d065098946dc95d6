"""A diagnosis as ``diagnosis.json`` and ``diagnosis.md``.

``diagnosis.json`` holds, in JSON without NaN or infinities (they are null):

    {"version": 1, "run": {...}, "findings": [{"severity", "subject", "text", "advice", "family"}, ...],
     "families": {name: {"losses": ..., ...}}}

Every list over inner steps is a median over tasks; lists over windows are of the mean over tasks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l2l_scale.diagnosis.diagnose import Diagnosis
from l2l_scale.diagnosis.examination import Examination
from l2l_scale.diagnosis.finding import Finding
from l2l_scale.evaluation.report import median
from l2l_scale.files import write_atomically

VERSION = 1


def write_report(
    diagnosis: Diagnosis, run: Mapping[str, Any], pictures: Mapping[str, str], out: Path
) -> None:
    """Write both files.

    Args:
        diagnosis: what was found.
        run: what the run is: plain values, for the head of the report.
        pictures: names of the pictures by family, beside the report.
        out: the folder; it is there.
    """
    text = json.dumps(as_json(diagnosis, run), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(out / "diagnosis.json", (text + "\n").encode())
    write_atomically(out / "diagnosis.md", markdown(diagnosis, run, pictures).encode())


def as_json(diagnosis: Diagnosis, run: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``diagnosis.json``."""
    return {
        "version": VERSION,
        "run": dict(run),
        "seconds": round(diagnosis.seconds, 2),
        "findings": [finding._asdict() for finding in diagnosis.findings],
        "families": {name: _examination(one) for name, one in diagnosis.examinations.items()},
    }


def _examination(one: Examination) -> dict[str, Any]:
    seen, gradient, chaos = one.trajectory, one.meta_gradient, one.chaos
    return {
        "family": one.family,
        "losses": plain(middle(seen.losses)),
        "update_rms": plain(middle(seen.update)),
        "gradient_rms": plain(middle(seen.gradient)),
        "theta_rms": plain(middle(seen.theta)),
        "cosine": plain(middle(seen.cosine)),
        "diverged_at": seen.diverged_at.tolist(),
        "share_diverged": float((seen.diverged_at > 0).double().mean()),
        "share_spiked": float(seen.spiked.double().mean()),
        "gates": [gate._asdict() for gate in one.insides.gates],
        "still_units": one.insides.still_units,
        "head_saturated": one.insides.head,
        "meta_gradient": None
        if gradient is None
        else {
            "inner_steps": gradient.inner_steps,
            "norm": plain(gradient.mean_norms),
            "norm_by_task": plain(gradient.norms),
            "noise": plain(gradient.noise),
            "signal_to_noise": number(gradient.signal_to_noise),
        },
        "sensitivity": [{**change._asdict(), "ratio": number(change.ratio)} for change in one.changes],
        "chaos": None
        if chaos is None
        else {"growth": plain(chaos.medians), "exponent": number(chaos.exponent)},
        "imitation": None
        if one.imitated is None
        else {
            "teacher_losses": plain(middle(one.imitated.losses)),
            "errors": dict(zip(one.imitated.groups, plain(one.imitated.medians.T), strict=True)),
        },
        "left_out": one.left_out,
    }


def middle(values: Tensor) -> Tensor:
    """Median over tasks at every inner step, (T, S) to (T,); NaN counts as infinite."""
    return median(values.double().nan_to_num(nan=torch.inf))


def plain(values: Tensor) -> Any:
    """Nested lists, with None for what is not finite."""
    if values.dim() > 1:
        return [plain(row) for row in values]
    return [number(value) for value in values.tolist()]


def number(value: float) -> float | None:
    """A finite number, or None."""
    return value if math.isfinite(value) else None


def markdown(diagnosis: Diagnosis, run: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The whole ``diagnosis.md``."""
    counts = {key: sum(f.severity == key for f in diagnosis.findings) for key in ("problem", "look", "ok")}
    parts = [
        "# Diagnosis",
        "\n".join(f"- {name}: {value}" for name, value in run.items()),
        f"{counts['problem']} problems, {counts['look']} to look at, {counts['ok']} fine.",
        *(_section(finding) for finding in diagnosis.findings),
    ]
    for name, picture in pictures.items():
        parts.append(f"![{name or 'what was measured'}]({picture})")
    parts.append("Limits are in `l2l_scale/diagnosis/thresholds.py`. Numbers are in `diagnosis.json`.")
    return "\n\n".join(parts) + "\n"


def _section(finding: Finding) -> str:
    where = f" ({finding.family})" if finding.family else ""
    advice = f"\n  *{finding.advice}.*" if finding.advice else ""
    return f"- **{finding.severity}: {finding.subject}**{where}: {finding.text}.{advice}"
