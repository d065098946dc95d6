"""The results as a picture: speeds, the roofline, and the sweeps over size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from backends import COSTS

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

_COLOURS = dict(zip(COSTS, plt.get_cmap("tab20").colors, strict=False))
_MARKERS = "os^Dv*PX"
_SWEEPS = {"N": "coordinates of one task", "S": "tasks of 10 coordinates"}


def draw(content: dict[str, Any], path: Path) -> Path:
    """Draw what :func:`report.document` returns; sweeps only where there are two sizes at least."""
    measured = {
        name: {backend: entry for backend, entry in own.items() if "peak_bytes" in entry}
        for name, own in content["results"].items()
    }
    sweeps = {axis: _sizes(measured, axis) for axis in _SWEEPS}
    sweeps = {axis: sizes for axis, sizes in sweeps.items() if len(sizes) > 1}
    swept = {f"{axis}={size}" for axis, sizes in sweeps.items() for size in sizes}
    alone = {name: own for name, own in measured.items() if name not in swept} or measured
    rows = 1 + bool(sweeps)
    figure, axes = plt.subplots(rows, 2, figsize=(13, 5 * rows), squeeze=False, layout="constrained")
    _bars(axes[0, 0], alone)
    _roofline(axes[0, 1], alone, content["machine"]["peaks"][str(content["threads"])])
    for column, axis in enumerate(sweeps):
        _sweep(axes[1, column], measured, axis, sweeps[axis])
    if len(sweeps) == 1:
        axes[1, 1].set_axis_off()
    figure.suptitle(f"{content['machine']['cpu']}, {content['threads']} thread(s)")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _sizes(measured: dict[str, Any], axis: str) -> list[int]:
    return sorted(int(name[2:]) for name in measured if name.startswith(f"{axis}="))


def _bars(axes: Axes, measured: dict[str, Any]) -> None:
    """Medians of the speed, with the range over the rounds."""
    present = [backend for backend in COSTS if any(backend in own for own in measured.values())]
    width = 0.85 / max(len(present), 1)
    for i, backend in enumerate(present):
        places = [j for j, own in enumerate(measured.values()) if backend in own]
        speeds = [own[backend]["coordinate_steps_per_s"] for own in measured.values() if backend in own]
        median = np.array([speed["median"] for speed in speeds])
        ends = np.array([[speed["min"] for speed in speeds], [speed["max"] for speed in speeds]])
        x = np.array(places) + (i - (len(present) - 1) / 2) * width
        errors = np.abs(ends - median) / 1e6
        axes.bar(x, median / 1e6, width, yerr=errors, color=_COLOURS[backend], label=backend, capsize=2)
    axes.set_xticks(range(len(measured)), list(measured), rotation=30 if len(measured) > 4 else 0)
    axes.set_ylabel("million coordinate-steps per second")
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.3)


def _roofline(axes: Axes, measured: dict[str, Any], peaks: dict[str, float]) -> None:
    """Attained useful FLOP/s; what is held at the peak counts as written and read once, the least traffic."""
    for marker, (name, own) in zip(_MARKERS * len(measured), measured.items(), strict=False):
        for backend, entry in own.items():
            intensity = entry["flops"] / (2 * max(entry["bytes_per_coordinate_step"], 1))
            attained = entry["flops"] * entry["per_cpu_second"]["median"]
            axes.plot(intensity, attained / 1e9, marker, color=_COLOURS[backend])
        axes.plot([], [], marker, color="grey", label=name)
    x = np.geomspace(1, 3000, 50)
    axes.plot(x, np.minimum(peaks["flops"], x * peaks["bandwidth"]) / 1e9, "k-")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful FLOP per byte, if all that is held is written and read once")
    axes.set_ylabel("useful GFLOP per CPU second")
    gflops, gigabytes = peaks["flops"] / 1e9, peaks["bandwidth"] / 1e9
    axes.set_title(f"roof of a core, measured: {gflops:.0f} GFLOP/s, {gigabytes:.0f} GB/s", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")


def _sweep(axes: Axes, measured: dict[str, Any], axis: str, sizes: list[int]) -> None:
    """Speed, and bytes held on the right-hand scale, over size."""
    memory = axes.twinx()
    for backend in COSTS:
        here = [size for size in sizes if backend in measured[f"{axis}={size}"]]
        entries = [measured[f"{axis}={size}"][backend] for size in here]
        if not entries:
            continue
        speed = [entry["coordinate_steps_per_s"]["median"] / 1e6 for entry in entries]
        held = [entry["bytes_per_coordinate_step"] for entry in entries]
        axes.plot(here, speed, "o-", color=_COLOURS[backend], label=backend)
        memory.plot(here, held, "x:", color=_COLOURS[backend])
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    memory.set_yscale("log")
    axes.set_xlabel(_SWEEPS[axis])
    axes.set_ylabel("million coordinate-steps per second (solid)")
    memory.set_ylabel("bytes per coordinate-step at the peak (dotted)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
