"""How does meta-training scale over processes? Two against one, measured; 8, 64 and 1,024 GPUs, predicted.

Measured are whole meta-steps under Lightning: the drawing of the window, forward, backward to φ, the exchange
of φ's gradient, Adam. Every process has a core and one thread, and as many slots as one alone (weak scaling).
Two processes that ignore each other show what the machine allows, two ranks what the exchange leaves of it.

Predicted is by arithmetic (scaling_model.py), from what is measured here (bytes of φ, drawing, and in one
scenario the time of a window on a core of this machine) and from assumptions about GPUs and networks, all of
which are arguments.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import quiet
import report
import scaling_report
import sizes
from children import UnavailableError
from commandline import console_here, counts, names, progress_bar
from rich.console import Console
from scaling_measure import has_two_cores, measure
from scaling_model import Cluster, Link, Work, strong, weak

ASSUMED = {
    "latency_us": (10.0, "between nodes, of a message (InfiniBand)"),
    "bandwidth_gb": (25.0, "GB/s between nodes"),
    "node_latency_us": (5.0, "in a node, of a message (NVLink)"),
    "node_bandwidth_gb": (150.0, "GB/s in a node"),
    "gpu_rate": (2e9, "coordinate-steps per second of a GPU, with many slots"),
    "fixed_ms": (2.0, "of a window on a GPU, however few slots"),
    "overhead_ms": (1.0, "of the host for a meta-step (Lightning, Adam)"),
    "fetch_ms": (1.0, "of the trainer for a window that actors have drawn; see scripts/benchmark_sampling"),
    "jitter": (0.0, "standard deviation of a rank's time, relative; all wait for the slowest"),
}


def main() -> None:
    """Measure; predict; print tables; write JSON and a picture."""
    args, console = arguments(), console_here()
    plan, load = quiet.Plan.of(args), list(os.getloadavg())
    console.print(f"CPU {report.cpu_name()}, {os.cpu_count()} cores, load {load[0]:.1f} before the start")
    results: dict[str, Any] = {}
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=len(args.workloads) * (1 + args.rounds))
        for name in args.workloads:
            progress.update(bar, description=name)
            try:
                scaling = measure(name, plan, args.seconds, lambda: progress.advance(bar))
            except UnavailableError as error:
                raise SystemExit(f"error: {name} cannot be measured: {error}") from error
            results[name] = scaling_report.plain(name, scaling)
            console.print(scaling_report.table(name, results[name]))
    predicted = {name: predictions(name, content, args) for name, content in results.items()}
    tell(predicted, args, console)
    content = scaling_report.document(results, predicted, load)
    content["assumed"] = {name: getattr(args, name) for name in (*ASSUMED, "gpus_per_node", "cores_per_gpu")}
    report.write(args.json, content)
    picture = scaling_report.draw(content, args.json.with_suffix(".png"))
    console.print(f"Written: {args.json}, {picture}", markup=False)


def predictions(
    name: str, content: dict[str, Any], args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """All scenarios of a workload."""
    cluster = cluster_of(args)
    own, gpu = as_measured(name, content, args), as_assumed(name, content, args)
    scenarios = {
        "cores like this one, weak": weak(own, cluster, args.gpus),
        "GPUs as assumed, weak": weak(gpu, cluster, args.gpus),
        f"GPUs, {args.total_slots:,} slots in all": strong(gpu, cluster, args.gpus, args.total_slots),
    }
    return {scenario: [row._asdict() for row in rows] for scenario, rows in scenarios.items()}


def cluster_of(args: argparse.Namespace) -> Cluster:
    """What the command line assumes."""
    return Cluster(
        gpus_per_node=args.gpus_per_node,
        inside=Link(latency=args.node_latency_us / 1e6, bandwidth=args.node_bandwidth_gb * 1e9),
        between=Link(latency=args.latency_us / 1e6, bandwidth=args.bandwidth_gb * 1e9),
        cores_per_gpu=args.cores_per_gpu,
    )


def as_measured(name: str, content: dict[str, Any], args: argparse.Namespace) -> Work:
    """A rank that is a core of this machine."""
    seconds, slots = content["modes"]["alone"]["seconds"], sizes.slots(name)
    return Work(
        coordinate_steps=sizes.coordinate_steps(name) / slots,
        slots=slots,
        compute=seconds["forward"] + seconds["backward"],
        fixed=0.0,
        overhead=seconds["adam_and_lightning"],
        phi_bytes=content["phi_bytes"],
        draw=seconds["drawing"],
        fetch=args.fetch_ms / 1e3,
        jitter=args.jitter,
    )


def as_assumed(name: str, content: dict[str, Any], args: argparse.Namespace) -> Work:
    """A rank that is a GPU; windows are drawn by cores like this machine's."""
    slots, work = sizes.slots(name), sizes.coordinate_steps(name)
    return Work(
        coordinate_steps=work / slots,
        slots=slots,
        compute=args.fixed_ms / 1e3 + work / args.gpu_rate,
        fixed=args.fixed_ms / 1e3,
        overhead=args.overhead_ms / 1e3,
        phi_bytes=content["phi_bytes"],
        draw=content["modes"]["alone"]["seconds"]["drawing"],
        fetch=args.fetch_ms / 1e3,
        jitter=args.jitter,
    )


def tell(predicted: dict[str, Any], args: argparse.Namespace, console: Console) -> None:
    """Print what is predicted, and from what."""
    for name, scenarios in predicted.items():
        console.print(scaling_report.prediction_table(name, scenarios))
    given = ", ".join(f"--{name} {getattr(args, name):g}" for name in ASSUMED)
    console.print(
        "Measured here: bytes of φ, seconds to draw a window; for cores like this one also those of a window "
        f"and of the host.\nAssumed: {given}, --gpus_per_node {args.gpus_per_node}, --cores_per_gpu "
        f"{args.cores_per_gpu}; nothing overlaps; actors draw in parallel without loss.",
        markup=False,
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark_scaling",
        description=f"{__doc__}\n{sizes.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workloads", type=names, default=[*sizes.NAMES], help="separated by commas; default: W1,W2,W3")
    quiet.add_arguments(parser, rounds=5)
    add("--seconds", type=float, default=2.0, help="shortest round (default: %(default)s)")
    json_help = "the picture goes beside it; default: %(default)s"
    add("--json", type=Path, default=Path("runs/benchmark/scaling.json"), help=json_help)
    model = parser.add_argument_group("assumptions of what is predicted")
    model.add_argument("--gpus", type=counts, default=[1, 8, 64, 1024], help="default: 1,8,64,1024")
    total_help = "slots of all GPUs where their number does not grow (default: %(default)s)"
    model.add_argument("--total_slots", type=int, default=1024, help=total_help)
    model.add_argument("--gpus_per_node", type=int, default=8, help="default: %(default)s")
    cores_help = "of the host; all but one draw windows (default: %(default)s)"
    model.add_argument("--cores_per_gpu", type=int, default=16, help=cores_help)
    for name, (default, text) in ASSUMED.items():
        model.add_argument(f"--{name}", type=float, default=default, help=f"{text} (default: %(default)g)")
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not exist."""
    for name in args.workloads:
        if not sizes.is_known(name):
            parser.error(f"--workloads ({name}) must be W1, W2, W3, N=<coordinates> or S=<tasks>")
    for name in ("rounds", "gpus", "total_slots", "gpus_per_node", "cores_per_gpu"):
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one < 1:
                parser.error(f"--{name} ({one}) must be at least 1")
    for name in ASSUMED:
        value = getattr(args, name)
        if not value >= 0 or (value == 0 and name in ("bandwidth_gb", "node_bandwidth_gb", "gpu_rate")):
            parser.error(f"--{name} ({value:g}) must be positive")
    if not has_two_cores():
        parser.error("two processes need two cores, and there is one")


if __name__ == "__main__":
    main()
