"""How fast is meta-training? Ours against plain PyTorch, and JAX if given, on the same workloads in one run.

The unit is coordinate-steps per second: optimizee coordinates × tasks × inner steps ÷ time of a whole
meta-step (window forward, backward to φ, Adam on φ). Absolute numbers depend on the machine and on what
else it does: quote ratios.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import measure
import methods
import report
import torch
import workloads
from rich.console import Console


def main() -> None:
    """Measure, print a table per workload, write JSON."""
    args = arguments()
    torch.set_num_threads(args.threads)
    console = Console()
    console.print(f"torch {torch.__version__}, threads {args.threads}, other load {os.getloadavg()[0]:.1f}")
    results = {}
    for name in args.workloads:
        with console.status(f"Measuring {name}"):
            results[name] = run(name, args)
        console.print(report.table(results[name]))
    if args.out is not None:
        report.write(args.out, args.threads, results)
        console.print(f"Written to {args.out}")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark", description=f"{__doc__}\n{workloads.__doc__}")
    add = parser.add_argument
    add("--workloads", nargs="+", choices=workloads.NAMES, default=["W1", "W2"], help="default: W1 W2")
    add("--repetitions", type=int, default=7, help="of every method, in turn (default: 7)")
    add("--min_seconds", type=float, default=1.0, help="shortest repetition (default: 1)")
    add("--threads", type=int, default=1, help="of torch and JAX (default: 1)")
    add("--out", type=Path, help="write the results to this JSON file; paths are relative to the repository")
    add("--jax", type=Path, help="a script that prints JSON lines with key coordinate_steps_per_s")
    add("--jax_python", default=sys.executable, help="the Python that has JAX (default: this one)")
    return parser.parse_args()


def run(name: str, args: argparse.Namespace) -> report.Result:
    """Measure all methods on one workload."""
    workload = workloads.make(name)
    work = workload.coordinate_steps
    steps = methods.all_methods(workload)
    methods.check_agreement(steps)
    speeds = measure.interleaved(steps, work, args.repetitions, args.min_seconds)
    if args.jax is not None:
        for variant in ("plain", "tuned"):
            command = [args.jax_python, str(args.jax), "--workload", name, "--variant", variant]
            command += ["--threads", str(args.threads), "--reps", str(args.repetitions)]
            speeds[f"JAX, {variant}"] = measure.subprocess_peer(command)
    drawing = measure.once(workloads.drawing(workload.family, workload.slots), work, args.min_seconds)
    return report.Result(workload.description, work, methods.REFERENCE, speeds, work / drawing.per_cpu_second)


if __name__ == "__main__":
    main()
