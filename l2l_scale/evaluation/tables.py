"""A report as tables and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import rich.box
from rich.console import Console
from rich.table import Table

from l2l_scale.evaluation.report import by_mean
from l2l_scale.evaluation.schema import HeldOutReport, Number, OptimizerReport, Report
from l2l_scale.evaluation.tuning import Tuned

Statistic: TypeAlias = Literal["mean", "median"]


class Cells(NamedTuple):
    """A table as text."""

    header: list[str]
    rows: list[list[str]]
    bold: list[bool]
    """Which rows are of learned optimizers."""


def number(value: Number, digits: int = 3) -> str:
    """Write a number; ∞ for what is infinite."""
    return (
        "∞" if value is None else f"{value:#.{digits}g}".rstrip(".").replace("e-0", "e-").replace("e+0", "e+")
    )


def losses_table(test: HeldOutReport, horizon: int, every_step: bool) -> Cells:
    """Losses of all optimizers on one test.

    Args:
        test: the test.
        horizon: T.
        every_step: show the mean at all reported inner steps and the median, not only the mean at the
            horizon and at the end.
    """
    optimizers = test["optimizers"]
    steps = [int(step) for step in next(iter(optimizers.values()))["mean"]]
    shown = steps if every_step else sorted({horizon, steps[-1]})
    mine = next(iter(test["paired"]), None)
    low = _lowest_reached(test)
    extra = [f"median @{horizon}"] if every_step else []
    extra += [f"steps to {low}"] if low else []
    scores = list(dict.fromkeys(name for entry in optimizers.values() for name in entry["scores"]))
    header = ["optimizer", *(f"mean @{t}" for t in shown), *extra, f"sum 1…{horizon}", "diverged", "spiked"]
    header += [f"{name} @{test['inner_steps']}" for name in scores]
    if mine is not None:
        header += ["learned lower", "matched after"]
    names = [name for kind in ("learned", "tuned", "reference") for name in by_mean(test, horizon, [kind])]
    rows = [
        [
            name,
            *_cells(optimizers[name], shown, horizon, every_step, low),
            *_scores(optimizers[name], scores),
            *_paired(test, mine, name, horizon),
        ]
        for name in names
    ]
    return Cells(header, rows, [optimizers[name]["kind"] == "learned" for name in names])


def _lowest_reached(test: HeldOutReport) -> str:
    """The lowest of the reported low losses that a rule reaches on half of the tasks."""
    entries = [entry for entry in test["optimizers"].values() if entry["kind"] != "reference"]
    reached = [low for entry in entries for low, steps in entry["steps_to"].items() if steps is not None]
    return min(reached, key=float, default="")


def _cells(
    entry: OptimizerReport, shown: Sequence[int], horizon: int, with_median: bool, low: str
) -> list[str]:
    """Mean losses (standard error at the horizon), median, steps to a low loss, sum, diverged, spiked."""

    def mean(step: int) -> str:
        error = f" ± {number(entry['stderr'][str(step)], 2)}" if step == horizon else ""
        return number(entry["mean"][str(step)]) + error

    counts = [str(entry["num_diverged"]), str(entry["num_spiked"])]
    medians = [number(entry["median"][str(horizon)])] if with_median else []
    steps = [_steps(entry["steps_to"][low])] if low else []
    return [*map(mean, shown), *medians, *steps, number(entry["sum_mean"]), *counts]


def _scores(entry: OptimizerReport, names: Sequence[str]) -> list[str]:
    """Figures of merit with their standard errors; a dash where there is none."""
    found = [entry["scores"].get(name) for name in names]
    return [f"{number(s['mean'])} ± {number(s['stderr'], 2)}" if s else "–" for s in found]


def _steps(value: Number) -> str:
    """A median of inner steps; a dash where half of the tasks never get there."""
    return "–" if value is None else f"{value:g}"


def _paired(test: HeldOutReport, mine: str | None, name: str, horizon: int) -> list[str]:
    """On which share of the tasks the learned optimizer has the lower sum, and when it is as low."""
    if mine is None:
        return []
    paired = test["paired"][mine].get(name)
    if paired is None:
        return ["–", "–"]
    return [f"{100 * paired['sum']['share_lower']:.1f} %", _matched(paired["steps_to_match"], horizon)]


def _matched(steps: Number, horizon: int) -> str:
    """Inner steps, and as a share of the horizon; a dash where half of the tasks never get there."""
    return "–" if steps is None else f"{steps:g} ({100 * steps / horizon:.0f} %)"


def shifts_table(report: Report) -> Cells | None:
    """One row per shifted distribution: the first learned optimizer and the best baselines at the horizon."""
    horizon = report["horizon"]
    header = ["distribution", "learned", "best transferred", "", "best tuned here", "", "diverged"]
    rows = []
    for name, test in list(report["tests"].items())[1:]:
        if not test["paired"]:
            return None
        mine = test["optimizers"][next(iter(test["paired"]))]
        ranked = by_mean(test, horizon, ["tuned"])
        here = [n for n in ranked if test["optimizers"][n]["tuning"]["tuned_on"] == name]  # type: ignore[index]
        best = [[n for n in ranked if n not in here][:1], here[:1]]
        cells = [cell for names in best for cell in _name_and_mean(test, horizon, names)]
        diverged = f"{mine['num_diverged']} of {mine['num_tasks']}"
        rows.append([name, number(mine["mean"][str(horizon)]), *cells, diverged])
    return Cells(header, rows, [False] * len(rows)) if rows else None


def _name_and_mean(test: HeldOutReport, horizon: int, names: Sequence[str]) -> list[str]:
    """Name and mean loss of the first of some optimizers."""
    if not names:
        return ["–", "–"]
    mean = test["optimizers"][names[0]]["mean"][str(horizon)]
    return [names[0].removesuffix(" (here)"), number(mean)]


def tuning_table(test: HeldOutReport) -> Cells:
    """What was chosen for the hand-designed optimizers."""
    rows = []
    for name, entry in test["optimizers"].items():
        tuning = entry["tuning"]
        if tuning is not None:
            chosen = _hyper_parameters(entry["hyper_parameters"])
            edges = ", ".join(tuning["edges"]) or "–"
            rows.append([name, chosen, tuning["target"], tuning["tuned_on"], number(tuning["score"]), edges])
    header = ["optimizer", "hyper-parameters", "tuned for", "on", "score", "at the edge of its grid"]
    return Cells(header, rows, [False] * len(rows))


def tuned_table(tuned: dict[str, Tuned]) -> Cells:
    """The same before any test was run."""
    rows = []
    for name, result in tuned.items():
        for target, choice in (("final", result.final), ("sum", result.sum)):
            chosen = _hyper_parameters(choice.hyper_parameters)
            rows.append([name, target, chosen, number(choice.score), ", ".join(choice.edges) or "–"])
    header = ["optimizer", "tuned for", "hyper-parameters", "score", "at the edge of its grid"]
    return Cells(header, rows, [False] * len(rows))


def _hyper_parameters(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def verdict(test: HeldOutReport, horizon: int) -> str:
    """Say what the learned optimizer beats, and what it does not: by mean, median and at the end."""
    if not test["paired"]:
        return ""
    mine = next(iter(test["paired"]))
    own = test["optimizers"][mine]["mean"][str(horizon)]
    if own is None:
        return f"{mine} diverged on at least one task by inner step {horizon}; its mean loss is infinite."
    text = f"{mine}: mean loss {number(own)} at inner step {horizon}."
    tuned = by_mean(test, horizon, ["tuned"])
    best = test["optimizers"][tuned[0]]["mean"][str(horizon)] if tuned else None
    if best is not None and min(own, best) > 0:
        text += f" That is {own / best:.2f} × the best tuned baseline ({tuned[0]}, {number(best)})."
    last = test["inner_steps"]
    places: list[tuple[Statistic, int]] = [("mean", horizon), ("median", horizon), ("mean", last)]
    beaten = [_not_beaten(test, mine, *place) for place in dict.fromkeys(places)]
    return " ".join([text, *beaten, *_matches(test, mine, tuned[0], horizon)] if tuned else [text, *beaten])


def _matches(test: HeldOutReport, mine: str, other: str, horizon: int) -> list[str]:
    """Say when ``mine`` is as low as another optimizer at the horizon."""
    steps = test["paired"][mine][other]["steps_to_match"]
    when = "never in the run" if steps is None else f"after {_matched(steps, horizon)} inner steps"
    return [f"As low as {other} @{horizon}: {when} (median over tasks)."]


def _not_beaten(test: HeldOutReport, mine: str, statistic: Statistic, step: int) -> str:
    """Say who is at least as good as ``mine`` by a statistic at an inner step."""
    values = {name: entry[statistic][str(step)] for name, entry in test["optimizers"].items()}
    own = values.pop(mine)
    better = [
        f"{name} ({number(v)})"
        for name, v in sorted(values.items(), key=lambda item: item[1] or 0.0)
        if v is not None and (own is None or v <= own)
    ]
    return f"Not beaten in {statistic} @{step}: {', '.join(better) or 'none'}."


def print_table(title: str, cells: Cells, note: str = "") -> None:
    """Print a table to the terminal."""
    table = Table(title=title, caption=note or None, box=rich.box.SIMPLE_HEAD, title_justify="left")
    table.caption_justify, table.padding = "left", (0, 1, 0, 0)
    for i, name in enumerate(cells.header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row, bold in zip(cells.rows, cells.bold, strict=True):
        table.add_row(*row, style="bold green" if bold else None)
    console = Console()
    needed = Console(width=1000).measure(table).maximum  # a cut number is worse than a broken line
    Console(width=max(console.width, needed)).print(table)
