"""What was measured of drawing windows: tables, JSON, a picture."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import report
from commandline import rate
from measure import Summary
from quiet import most
from rich.table import Table
from sampling_sources import Drawn, Entrant
from sampling_waiting import Waiting

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def plain_throughput(size: int, rounds: dict[Entrant, list[Drawn]]) -> dict[str, Any]:
    """The rounds of one workload, by way of drawing.

    Args:
        size: bytes of a window.
        rounds: of every way.
    """
    ways = {}
    for way, own in rounds.items():
        per_second = Summary.of([one.windows / one.wall for one in own])
        ways[way.label] = {
            **way._asdict(),
            "windows_per_s": per_second._asdict(),
            "mb_per_s": per_second.median * size / 1e6,
            "own_cpu_seconds": Summary.of([one.own_cpu / one.windows for one in own])._asdict(),
            "cpu_seconds": Summary.of([one.cpu_per_window for one in own])._asdict(),
            "others_busy_cores": most(own),
        }
    return {"window_bytes": size, "rounds": len(next(iter(rounds.values()))), "ways": ways}


def plain_waiting(windows: int, placed: str, rounds: dict[Entrant, list[Waiting]]) -> dict[str, Any]:
    """The rounds of training, by way of drawing.

    Args:
        windows: of a round.
        placed: which process is on which core, in words.
        rounds: of every way.
    """
    ways = {
        way.label: {
            **way._asdict(),
            "share": Summary.of([one.share for one in own])._asdict(),
            "waited_seconds": Summary.of([one.waited for one in own])._asdict(),
            "window_seconds": Summary.of([one.total for one in own])._asdict(),
            "others_busy_cores": most(own),
        }
        for way, own in rounds.items()
    }
    count = len(next(iter(rounds.values()), []))
    return {"windows": windows, "rounds": count, "placed": placed, "ways": ways}


def document(content: dict[str, Any], load: list[float]) -> dict[str, Any]:
    """Everything, as it is written to the JSON file."""
    return {
        "machine": {
            "platform": platform.platform(),
            "cpu": report.cpu_name(),
            "cores": os.cpu_count(),
        },
        "versions": {name: version(name) for name in ("torch", "lightning", "ray")},
        "load_before": load,
        "load_after": list(os.getloadavg()),
        **content,
    }


def throughput_table(name: str, content: dict[str, Any]) -> Table:
    """One row per way of drawing."""
    size, ways = content["window_bytes"] / 1e6, content["ways"]
    view = Table(title=f"{name}: windows of {size:,.3g} MB", title_justify="left", caption_justify="left")
    view.caption = _caption(name, ways)
    view.add_column("drawn", no_wrap=True)
    for head in ("windows/s", "range", "MB/s", "× first", "own CPU ms", "all CPU ms", "others"):
        view.add_column(head, justify="right")
    first = next(iter(ways.values()))["windows_per_s"]["median"]
    for label, way in ways.items():
        speed = way["windows_per_s"]
        view.add_row(
            label,
            rate(speed["median"]),
            f"{rate(speed['min'])} – {rate(speed['max'])}",
            rate(way["mb_per_s"]),
            f"{speed['median'] / first:.2f}",
            f"{1e3 * way['own_cpu_seconds']['median']:,.2f}",
            f"{1e3 * way['cpu_seconds']['median']:,.2f}",
            f"{way['others_busy_cores']:.2f}",
        )
    return view


def _caption(name: str, ways: dict[str, Any]) -> str:
    caption = (
        "own CPU: of the trainer's process, for one window; all CPU: the actors' as well\n"
        "others: cores that other programs were busy on, at most"
    )
    waits = [way for way in ways.values() if way["actors"] == 1 and way["depth"] == 1]
    if name == "tiny" and waits:
        seconds = 1 / waits[0]["windows_per_s"]["median"]
        caption += f"\nasking an actor and fetching its answer: {1e3 * seconds:.2f} ms a window"
    return caption


def waiting_table(content: dict[str, Any]) -> Table:
    """One row per way of drawing."""
    title = f"waiting: LSTM on one streamed MNIST MLP, {content['rounds']} × {content['windows']} meta-steps"
    view = Table(title=title, title_justify="left", caption_justify="left")
    view.caption = f"{content['placed']}; waited: the copy into a batch included"
    view.add_column("drawn", no_wrap=True)
    for head in ("waiting", "range", "waited ms", "meta-step ms", "× first", "others"):
        view.add_column(head, justify="right")
    ways = content["ways"]
    first = next(iter(ways.values()))["window_seconds"]["median"] if ways else 1.0
    for label, way in ways.items():
        share, total = way["share"], way["window_seconds"]["median"]
        view.add_row(
            label,
            f"{share['median']:.1%}",
            f"{share['min']:.1%} – {share['max']:.1%}",
            f"{1e3 * way['waited_seconds']['median']:.2f}",
            f"{1e3 * total:.1f}",
            f"{first / total:.2f}",
            f"{way['others_busy_cores']:.2f}",
        )
    return view


def draw(content: dict[str, Any], path: Path) -> Path:
    """The speeds of all workloads, and the shares of waiting."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    _speeds(axes[0], content["throughput"])
    _shares(axes[1], content.get("waiting", {}).get("ways", {}))
    figure.suptitle(f"{content['machine']['cpu']}, {content['machine']['cores']} cores")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _speeds(axes: Axes, throughput: dict[str, Any]) -> None:
    labels = list(dict.fromkeys(label for own in throughput.values() for label in own["ways"]))
    width = 0.85 / max(len(labels), 1)
    for i, label in enumerate(labels):
        places = [j for j, own in enumerate(throughput.values()) if label in own["ways"]]
        speeds = [own["ways"][label]["windows_per_s"] for own in throughput.values() if label in own["ways"]]
        medians = [speed["median"] for speed in speeds]
        errors = [
            [speed["median"] - speed["min"] for speed in speeds],
            [speed["max"] - speed["median"] for speed in speeds],
        ]
        x = [place + (i - (len(labels) - 1) / 2) * width for place in places]
        axes.bar(x, medians, width, yerr=errors, capsize=2, label=label)
    sizes = [f"{name}\n{own['window_bytes'] / 1e6:.3g} MB" for name, own in throughput.items()]
    axes.set_xticks(range(len(throughput)), sizes)
    axes.set_yscale("log")
    axes.set_ylabel("windows per second")
    axes.grid(axis="y", alpha=0.3)
    if labels:
        axes.legend(fontsize=8)


def _shares(axes: Axes, ways: dict[str, Any]) -> None:
    if not ways:
        axes.set_axis_off()
        return
    shares = [100 * way["share"]["median"] for way in ways.values()]
    axes.bar(range(len(ways)), shares)
    axes.bar_label(axes.containers[0], fmt="%.1f %%")
    axes.axhline(2, color="black", linewidth=1, linestyle=":")
    axes.set_xticks(range(len(ways)), list(ways), rotation=20)
    axes.set_ylabel("% of the time that the trainer waits")
    axes.grid(axis="y", alpha=0.3)
