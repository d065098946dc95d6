"""The results as tables and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import roofline
from backends import REFERENCE, Entrant
from measure import Result, Results, Summary
from rich.table import Table
from roofline import Machine


def reference_of(results: Results) -> Entrant | None:
    """What ratios refer to: eager with the first number of threads, else the first that was measured."""
    measured = [entrant for entrant, result in results.items() if result.missing is None]
    return next((entrant for entrant in measured if entrant.backend == REFERENCE), next(iter(measured), None))


def ratios(own: Result, other: Result) -> dict[str, Summary]:
    """How many times faster than another, round by round."""
    pairs = {
        "per_second": zip(own.per_second, other.per_second, strict=False),
        "per_cpu_second": zip(own.per_cpu_second, other.per_cpu_second, strict=False),
    }
    return {key: Summary.of([a / b for a, b in values]) for key, values in pairs.items()}


def table(name: str, results: Results, machines: dict[int, Machine]) -> Table:
    """One row per entrant; medians, and the range of the ratio."""
    view = Table(title=f"{name}: {describe(results)}", title_justify="left", caption=_caption(results))
    view.caption_justify = "left"
    _add_columns(view)
    for row in _rows(results, machines):
        view.add_row(*row)
    return view


def speed_ups(results: Results) -> dict[Entrant, Summary]:
    """How many times faster than with the backend's first number of threads, by time."""
    first: dict[str, Result] = {}
    found = {}
    for entrant, result in results.items():
        fewest = first.setdefault(entrant.backend, result)
        if result is not fewest and result.rounds and fewest.rounds:
            found[entrant] = ratios(result, fewest)["per_second"]
    return found


def sweep_table(swept: dict[str, Results], machines: dict[int, Machine]) -> Table:
    """Workloads that differ in size only: one row per size and entrant."""
    view = Table(title=f"Sweep: {', '.join(swept)}", title_justify="left", caption_justify="left")
    view.add_column("workload", no_wrap=True)
    _add_columns(view)
    notes = []
    for name, results in swept.items():
        for row in _rows(results, machines):
            view.add_row(name, *row)
        notes += [f"{name}, {note}" for note in _missing(results)]
    view.caption = "\n".join(notes)
    return view


def _missing(results: Results) -> list[str]:
    return [f"{one.label} not available: {r.missing}" for one, r in results.items() if r.missing is not None]


def _add_columns(view: Table) -> None:
    view.add_column("backend", no_wrap=True)
    for head in ("k/CPU s", "k/s", "× by CPU", "range", "× by time", "B/step", "peak MB", "% of peak"):
        view.add_column(head, justify="right")


def describe(results: Results) -> str:
    """The workload in words."""
    return next((r.facts["workload"] for r in results.values() if "workload" in r.facts), "no details")


def _caption(results: Results) -> str:
    reference = reference_of(results)
    caption = "k: thousands of coordinate-steps; B/step: bytes held at the peak per coordinate-step"
    if reference is not None:
        caption += f"\n×: how many times faster than {reference.label}"
    drawing = [r.facts["drawing_seconds"] for r in results.values() if "drawing_seconds" in r.facts]
    if drawing:
        caption += f"\nnot included: drawing a window, {1000 * min(drawing):.1f} ms"
    for entrant, summary in speed_ups(results).items():
        caption += f"\n{entrant.label}: {summary.median:.2f} times as fast as with fewer, by time"
    return "\n".join([caption, *_missing(results)])


def _rows(results: Results, machines: dict[int, Machine]) -> Iterator[list[str]]:
    reference, threads = reference_of(results), {entrant.threads for entrant in results}
    for entrant, result in results.items():
        label = entrant.label if len(threads) > 1 else entrant.backend
        if result.missing is None and reference is not None:
            yield [label, *_cells(entrant, result, results[reference], machines)]
        else:
            yield [label, "–"]


def _cells(entrant: Entrant, result: Result, reference: Result, machines: dict[int, Machine]) -> list[str]:
    entry = summarise(entrant, result, reference, machines)
    cpu, wall = entry["ratio"]["per_cpu_second"], entry["ratio"]["per_second"]
    return [
        f"{entry['per_cpu_second']['median'] / 1e3:.0f}",
        f"{entry['coordinate_steps_per_s']['median'] / 1e3:.0f}",
        f"{cpu['median']:.2f}",
        "" if result is reference else f"{cpu['min']:.2f} – {cpu['max']:.2f}",
        f"{wall['median']:.2f}",
        f"{entry['bytes_per_coordinate_step']:.0f}",
        f"{entry['peak_bytes'] / 1e6:.0f}",
        f"{100 * entry['share_of_peak']:.0f}",
    ]


def summarise(
    entrant: Entrant, result: Result, reference: Result, machines: dict[int, Machine]
) -> dict[str, Any]:
    """One entrant's numbers on one workload, plain."""
    if result.missing is not None or result.first is None:
        return {"not_available": result.missing}
    flops, per_cpu_second = roofline.flops_of(entrant.backend), Summary.of(result.per_cpu_second)
    return {
        "coordinate_steps_per_s": Summary.of(result.per_second)._asdict(),
        "per_cpu_second": per_cpu_second._asdict(),
        "ratio": {key: value._asdict() for key, value in ratios(result, reference).items()},
        "peak_bytes": result.first.peak_bytes,
        "bytes_per_coordinate_step": result.first.peak_bytes / result.work,
        "wall_seconds": Summary.of([one.wall / one.calls for one in result.rounds])._asdict(),
        "cpu_seconds": Summary.of([one.cpu / one.calls for one in result.rounds])._asdict(),
        "first_wall_seconds": result.first.wall,
        "rounds": len(result.rounds),
        "threads": entrant.threads,
        "meta_loss": result.first.loss,
        "flops": flops,
        "share_of_peak": flops * per_cpu_second.median / machines[entrant.threads].flops,
        **result.facts,
    }


def plain(results: Results, machines: dict[int, Machine]) -> dict[str, Any]:
    """By backend: the numbers of the first number of threads; the others are in its "threads"."""
    entries: dict[str, Any] = {}
    reference, faster = reference_of(results), speed_ups(results)
    for entrant, result in results.items():
        other = result if reference is None else results[reference]
        entry = summarise(entrant, result, other, machines)
        if entrant.backend not in entries:
            entries[entrant.backend] = entry
            continue
        if entrant in faster:
            entry["speed_up"] = faster[entrant]._asdict()
        more = entries[entrant.backend].setdefault("other_threads", {})
        more[str(entrant.threads)] = entry
    return entries


def document(results: dict[str, Results], machines: dict[int, Machine], load: list[float]) -> dict[str, Any]:
    """Everything, as it is written to the JSON file."""
    return {
        "unit": "coordinate-steps per second",
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "peaks": {str(threads): machine._asdict() for threads, machine in machines.items()},
        },
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "threads": next(iter(machines)),
        "load_before": load,
        "load_after": list(os.getloadavg()),
        "results": {name: plain(own, machines) for name, own in results.items()},
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def cpu_name() -> str:
    """The CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "unknown")
