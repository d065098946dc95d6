"""A report as ``report.md``."""

from __future__ import annotations

from l2l_scale.evaluation.report import DIVERGED_FACTOR
from l2l_scale.evaluation.schema import Report
from l2l_scale.evaluation.tables import Cells, losses_table, tuning_table, verdict

_HEAD = """# Evaluation

Losses on tasks that no optimizer saw in meta-training or tuning; ± is one standard error over tasks.
Baselines are tuned for the mean loss at inner step {horizon}, the horizon of meta-training, or for the sum
of losses up to it; schedules end there, and so does their movement. “(here)” was tuned again on the shifted
distribution, “(sum)” for the sum of losses. “diverged” counts tasks whose loss was not finite
at any inner step, or ends above its start by more than {factor} times (start + 1); “spiked” counts those that
were so high at any inner step. “learned lower” is the share
of tasks on which the learned optimizer has the lower sum. “matched after” is the inner step at which the
learned optimizer is first as low as this one at inner step {horizon}, on the same task, in the median over
tasks, and that as a share of {horizon}. References are counted in evaluations of loss and gradient, and run
on fewer tasks, in float64."""


def markdown(report: Report, pictures: bool = False) -> str:
    """The whole ``report.md``.

    Args:
        report: the report.
        pictures: whether there is a ``pictures.png`` beside it.
    """
    horizon = report["horizon"]
    parts = [_HEAD.format(horizon=horizon, factor=f"{DIVERGED_FACTOR:g}")]
    for i, (name, test) in enumerate(report["tests"].items()):
        parts += [f"## {name}", f"`{test['family']}`", verdict(test, horizon)]
        parts.append(_table(losses_table(test, horizon, every_step=i == 0)))
        if i == 0:
            shown = ["curves", "tests"] if len(report["tests"]) > 1 else ["curves"]
            parts += [f"![{name}]({name}.png)" for name in shown]
            parts += ["### Hyper-parameters", _table(tuning_table(test))]
    if pictures:
        parts += ["## Pictures", "![pictures](pictures.png)"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts.append(
        f"Wall time {report['wall_seconds']:.0f} s, CPU time {report['cpu_seconds']:.0f} s on "
        f"{report['num_workers']} processes. Seeds: test {report['test_seed']}, tuning "
        f"{report['tuning_seed']}. {versions}."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(report: Report) -> str:
    """What a model card says of a report: the table of the first test, and one sentence on each."""
    horizon, tests = report["horizon"], report["tests"]
    table = _table(losses_table(next(iter(tests.values())), horizon, every_step=True))
    lines = [
        f"- **{name}** ({test['num_tasks']} tasks, `{test['family']}`): {verdict(test, horizon)}"
        for name, test in tests.items()
    ]
    return "\n".join([table, "", *lines])


def _table(cells: Cells) -> str:
    lines = ["| " + " | ".join(cells.header) + " |", "|---" + "|---:" * (len(cells.header) - 1) + "|"]
    for row, bold in zip(cells.rows, cells.bold, strict=True):
        lines.append("| " + " | ".join(f"**{cell}**" if bold else cell for cell in row) + " |")
    return "\n".join(lines)
