"""How fast is meta-training? Our backends and the peers, on the same workloads in one run.

The unit is coordinate-steps per second: optimizee coordinates × tasks × inner steps ÷ time of a whole
meta-step (window forward, backward to φ, Adam on φ). Absolute numbers depend on the machine and on what
else it does: quote ratios. Without arguments everything is measured, in ten minutes or less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import backends
import plot
import report
import sizes
from backends import COSTS, Entrant
from commandline import console_here, counts, names, progress_bar
from measure import Race, Results, Settings
from rich.console import Console
from roofline import Machine

_HERE = Path(__file__).parent
_JAX_ADVICE = "no JAX, so no rows for it: .venv/bin/pip install -e '.[jax]', or name a Python: --jax_python"


class Job(NamedTuple):
    """A workload, and who is measured on it."""

    workload: str
    entrants: list[Entrant]


def main() -> None:
    """Measure; print tables; write JSON and a picture."""
    args = arguments()
    console = console_here()
    jobs, load = plan(args, console), list(os.getloadavg())
    console.print(f"CPU {report.cpu_name()}, threads {args.threads}, load {load[0]:.1f} before the start")
    with tempfile.TemporaryDirectory(prefix="l2l_scale-benchmark-") as folder:
        settings = Settings(
            rounds=args.rounds,
            min_seconds=args.min_seconds,
            deadline=math.inf if args.rounds else time.monotonic() + 60 * args.minutes,
            jax_python=args.jax_python,
            folder=Path(folder),
        )
        machines = {threads: measure_machine(threads, console) for threads in args.threads}
        results = run(jobs, settings, machines, console)
    content = report.document(results, machines, load)
    report.write(args.json, content)
    picture = plot.draw(content, args.json.with_suffix(".png"))
    console.print(f"Written: {args.json}, {picture}", markup=False)


def run(
    jobs: list[Job], settings: Settings, machines: dict[int, Machine], console: Console
) -> dict[str, Results]:
    """Measure job by job, and show how far it is."""
    results: dict[str, Results] = {}
    start, done = time.monotonic(), 0.0
    total = sum(settings.expected(entrant, job.workload) for job in jobs for entrant in job.entrants)
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=total)
        for name, entrants in jobs:
            progress.update(bar, description=name)
            pace = max(1.0, (time.monotonic() - start) / done) if done else 1.0

            def tick(entrant: Entrant, name: str = name) -> None:
                progress.advance(bar, settings.expected(entrant, name))

            results[name] = Race(name, entrants, replace(settings, pace=pace), tick).run()
            done += sum(settings.expected(entrant, name) for entrant in entrants)
            show(name, results, [job.workload for job in jobs], machines, console)
    return results


def show(
    name: str,
    results: dict[str, Results],
    planned: list[str],
    machines: dict[int, Machine],
    console: Console,
) -> None:
    """Print what is new: a workload of its own at once, a sweep at its end."""
    axis = name.partition("=")[0]
    same = [other for other in planned if other.partition("=")[0] == axis]
    if len(same) == 1:
        console.print(report.table(name, results[name], machines))
    elif name == same[-1]:
        console.print(report.sweep_table({other: results[other] for other in same}, machines))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark",
        description=f"{__doc__}\n{sizes.__doc__}\nBackends: {', '.join(COSTS)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workloads", type=names, help="separated by commas; default: all and --sweep N,S")
    add("--sweep", type=names, help="N, S or N,S: many sizes")
    add("--backends", type=names, help="default: all for W1 and W2, fewer elsewhere")
    add("--rounds", type=int, help="of every backend; without it as many as are quick, and --minutes holds")
    add("--min_seconds", type=float, default=0.5, help="shortest round (default: 0.5)")
    add("--minutes", type=float, default=9.5, help="what would take longer is left out (default: 9.5)")
    add("--threads", type=counts, default=[1], help="separated by commas; default: 1")
    json_help = "the picture goes beside it; default: %(default)s"
    add("--json", type=Path, default=Path("runs/benchmark/speed.json"), help=json_help)
    add("--jax_python", default=sys.executable, help="the Python that has JAX (default: this one)")
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not exist."""
    cores = os.cpu_count() or 1
    known = {"workloads": sizes.is_known, "sweep": sizes.SWEEPS.__contains__}
    known |= {"backends": COSTS.__contains__, "threads": range(1, cores + 1).__contains__}
    choices = {"workloads": "W1, W2, W3, N=<coordinates> or S=<tasks>", "sweep": "N or S"}
    choices |= {"backends": ", ".join(COSTS), "threads": f"1 to {cores}, the number of cores"}
    for argument, is_known in known.items():
        for name in getattr(args, argument) or ():
            if not is_known(name):
                parser.error(f"--{argument} ({name}) must be {choices[argument]}")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds ({args.rounds}) must be at least 1")


def plan(args: argparse.Namespace, console: Console) -> list[Job]:
    """Who is measured on what. Without JAX, its rows are left out."""
    everything = args.workloads is None and args.sweep is None
    chosen = [*(sizes.NAMES if everything else args.workloads or ())]
    for axis in sizes.SWEEPS if everything else args.sweep or ():
        chosen += sizes.SWEEPS[axis]
    jobs = []
    for name in dict.fromkeys(chosen):
        default = {"W1": backends.FULL, "W2": backends.FULL, "W3": backends.LARGE}.get(name, backends.SWEPT)
        pairs = [(backend, count) for backend in args.backends or default for count in args.threads]
        jobs.append(Job(name, [Entrant(*pair) for pair in dict.fromkeys(pairs)]))
    wants_jax = any(entrant.is_jax for job in jobs for entrant in job.entrants)
    if not wants_jax or backends.has_jax(args.jax_python):
        return jobs
    console.print(_JAX_ADVICE, markup=False)
    return [Job(job.workload, [one for one in job.entrants if not one.is_jax]) for job in jobs]


def measure_machine(threads: int, console: Console) -> Machine:
    """In a process of its own."""
    command = [sys.executable, str(_HERE / "peaks.py"), "--threads", str(threads)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    machine = Machine(**json.loads(answer))
    peaks = f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s"
    console.print(f"A core's peaks, {threads} thread(s): {peaks}")
    return machine


if __name__ == "__main__":
    main()
