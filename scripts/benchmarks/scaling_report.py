"""What was measured of two processes, and what is predicted for many GPUs: tables, JSON, a picture."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import matplotlib as mpl
import report
import sizes
from commandline import rate
from measure import Summary
from quiet import most
from rich.table import Table
from scaling_measure import MODES, Round, Scaling

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

LABELS = {
    "alone": "one process, other core idle",
    "both": "two, no exchange",
    "ranks": "two ranks (gloo)",
}
_TIMES: dict[str, Callable[[Round], float]] = {
    "meta_step": lambda one: one.seconds("wall"),
    "drawing": lambda one: one.seconds("drawing"),
    "forward": lambda one: one.seconds("forward"),
    "backward": lambda one: one.seconds("backward"),
    "adam_and_lightning": lambda one: one.seconds("rest") + one.between,
    "cpu": lambda one: one.seconds("cpu"),
}
_HEADS = ("meta-step", "drawing", "forward", "backward", "Adam, Lightning", "CPU")


def plain(name: str, scaling: Scaling) -> dict[str, Any]:
    """The rounds of a workload, summarised."""
    work, triples = sizes.coordinate_steps(name), scaling.triples
    modes = {}
    for mode in MODES:
        rounds: list[Round] = [getattr(triple, mode) for triple in triples]
        speeds = [one.steps_per_second * work for one in rounds]
        times = {what: statistics.median(of(one) for one in rounds) for what, of in _TIMES.items()}
        modes[mode] = {"coordinate_steps_per_s": Summary.of(speeds)._asdict(), "seconds": times}
    speed = attrgetter("steps_per_second")
    ratios = {
        "of_both": [speed(ranks) / speed(both) for _, both, ranks, _ in triples],
        "of_twice_alone": [speed(ranks) / speed(alone) / 2 for alone, _, ranks, _ in triples],
        "both_of_twice_alone": [speed(both) / speed(alone) / 2 for alone, both, _, _ in triples],
        "by_cpu": [both.seconds("cpu") / ranks.seconds("cpu") for _, both, ranks, _ in triples],
    }
    return {
        **scaling.facts,
        "steps_per_round": triples[0].alone.steps,
        "others_busy_cores": most(triples),
        "rounds": len(triples),
        "modes": modes,
        "linear": {key: Summary.of(values)._asdict() for key, values in ratios.items()},
        "all_reduce_seconds": Summary.of(scaling.reductions)._asdict(),
    }


def document(results: dict[str, Any], predictions: dict[str, Any], load: list[float]) -> dict[str, Any]:
    """Everything, as it is written to the JSON file."""
    return {
        "unit": "coordinate-steps per second",
        "machine": {
            "platform": platform.platform(),
            "cpu": report.cpu_name(),
            "cores": os.cpu_count(),
        },
        "versions": {name: version(name) for name in ("torch", "lightning")},
        "load_before": load,
        "load_after": list(os.getloadavg()),
        "measured": results,
        "predicted": predictions,
    }


def table(name: str, content: dict[str, Any]) -> Table:
    """What was measured of a workload: speeds, parts of a meta-step, ratios to linear."""
    title = f"{name}: {content['workload']} on each process, {content['backend']} (measured)"
    view = Table(title=title, title_justify="left", caption_justify="left", caption=caption(content))
    view.add_column("ms of a meta-step", no_wrap=True)
    for head in ("k/s together", *_HEADS):
        view.add_column(head, justify="right")
    for mode, entry in content["modes"].items():
        speed = entry["coordinate_steps_per_s"]["median"] / 1e3
        view.add_row(LABELS[mode], f"{speed:,.0f}", *(f"{1e3 * s:.2f}" for s in entry["seconds"].values()))
    return view


def caption(content: dict[str, Any]) -> str:
    """The ratios and the all-reduce, in words."""
    linear, reduce = content["linear"], content["all_reduce_seconds"]

    def share(key: str) -> str:
        return f"{linear[key]['median']:.2f} ({linear[key]['min']:.2f} – {linear[key]['max']:.2f})"

    return (
        f"two ranks: {share('of_both')} of two processes without exchange, by CPU time {share('by_cpu')}\n"
        f"two ranks: {share('of_twice_alone')} of twice one alone\n"
        f"two processes without exchange: {share('both_of_twice_alone')} of twice one alone\n"
        f"all-reduce of φ's gradient alone, {content['phi_bytes']:,} bytes: {1e3 * reduce['median']:.2f} ms "
        f"({1e3 * reduce['min']:.2f} – {1e3 * reduce['max']:.2f})\n"
        f"backward includes it, and waiting for the other rank; {content['rounds']} rounds of "
        f"{content['steps_per_round']} meta-steps, others on {content['others_busy_cores']:.2f} cores at most"
    )


def prediction_table(name: str, predictions: dict[str, list[dict[str, Any]]]) -> Table:
    """One row for each number of GPUs, scenario by scenario."""
    view = Table(title=f"{name}: predicted, not measured", title_justify="left", caption_justify="left")
    view.caption = (
        "actors: of each GPU; 0: its trainer draws; !: cores are too few, and drawing sets the pace"
    )
    view.add_column("scenario", no_wrap=True)
    for head in (
        "GPUs",
        "slots each",
        "exchange ms",
        "meta-step ms",
        "M/s",
        "of linear",
        "actors",
    ):
        view.add_column(head, justify="right")
    for scenario, rows in predictions.items():
        for row in rows:
            view.add_row(
                scenario,
                f"{row['gpus']:,}",
                f"{row['slots']:g}",
                f"{1e3 * row['exchange']:.3f}",
                f"{1e3 * row['step']:.2f}",
                rate(row["rate"] / 1e6),
                f"{row['efficiency']:.3f}",
                f"{row['actors']}{' !' * row['drawing_limits']}",
            )
    return view


def draw(content: dict[str, Any], path: Path) -> Path:
    """Measured shares of linear, and predicted ones over the number of GPUs."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    _measured(axes[0], content["measured"])
    _predicted(axes[1], content["predicted"])
    figure.suptitle(f"{content['machine']['cpu']}, {content['machine']['cores']} cores")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _measured(axes: Axes, measured: dict[str, Any]) -> None:
    keys = {
        "of_both": "two ranks, of two without exchange",
        "of_twice_alone": "two ranks, of twice one alone",
        "both_of_twice_alone": "two without exchange, of twice one alone",
    }
    for i, (key, label) in enumerate(keys.items()):
        shares = [content["linear"][key] for content in measured.values()]
        errors = [
            [share["median"] - share["min"] for share in shares],
            [share["max"] - share["median"] for share in shares],
        ]
        places = [j + (i - 1) * 0.27 for j in range(len(shares))]
        axes.bar(places, [share["median"] for share in shares], 0.27, yerr=errors, capsize=2, label=label)
    axes.set_xticks(range(len(measured)), list(measured))
    axes.axhline(0.9, color="black", linewidth=1, linestyle=":")
    axes.set_ylabel("share of linear, measured")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(axis="y", alpha=0.3)


def _predicted(axes: Axes, predicted: dict[str, Any]) -> None:
    for marker, (name, scenarios) in zip("os^Dv*" * len(predicted), predicted.items(), strict=False):
        for style, (scenario, rows) in zip(("-", "--", ":"), scenarios.items(), strict=False):
            label = f"{name}, {scenario}"
            efficiencies = [row["efficiency"] for row in rows]
            axes.plot([row["gpus"] for row in rows], efficiencies, marker + style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("share of linear, predicted")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
