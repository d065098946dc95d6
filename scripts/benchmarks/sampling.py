"""How fast are windows drawn, in the trainer's process and by Ray actors, and how long does the trainer wait?

Windows count when they are batches in this process: what transport costs, and the one copy, are included.
Rounds of all ways are interleaved; those in which other programs are busy are repeated.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import quiet
import report
import sampling_jobs
import sampling_report
import torch
from commandline import console_here, counts, names, progress_bar
from rich.console import Console
from sampling_jobs import WORKLOADS
from sampling_sources import Drawn, Entrant, Source, pin_apart, ray_of_our_own, size_of
from sampling_waiting import SKIPPED, Training, Waiting


def main() -> None:
    """Measure; print tables; write JSON and a picture."""
    args, console = arguments(), console_here()
    torch.set_num_threads(1)
    load = list(os.getloadavg())
    console.print(f"CPU {report.cpu_name()}, {os.cpu_count()} cores, load {load[0]:.1f} before the start")
    content: dict[str, Any] = {"throughput": {}}
    for name in args.workloads:
        content["throughput"][name] = throughput(name, args, console)
        console.print(sampling_report.throughput_table(name, content["throughput"][name]))
    if args.waiting_windows:
        content["waiting"] = waiting(args, console)
        console.print(sampling_report.waiting_table(content["waiting"]))
    content = sampling_report.document(content, load)
    report.write(args.json, content)
    picture = sampling_report.draw(content, args.json.with_suffix(".png"))
    console.print(f"Written: {args.json}, {picture}", markup=False)


def throughput(name: str, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Draw the windows of a workload in all ways."""
    ways = [Entrant(actors, args.depth) for actors in args.actors]
    if name == "tiny" and any(args.actors):
        ways.append(Entrant(1, 1))  # the time from asking to the answer
    with ray_of_our_own(ways) as share, ExitStack() as stack, progress_bar(console) as progress:
        bar = progress.add_task(name, total=(1 + args.rounds) * len(ways))
        sources, size = {}, 0
        for way in ways:
            sources[way] = stack.enter_context(closing(Source(WORKLOADS[name](), way, share)))
            size = size_of(sources[way].first())
            progress.advance(bar)
        rounds: dict[Entrant, list[Drawn]] = quiet.quietest(
            ways,
            quiet.Plan.of(args),
            lambda way: sources[way].round(args.seconds),
            lambda: progress.advance(bar),
        )
    return sampling_report.plain_throughput(size, rounds)


def waiting(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train with all ways of drawing."""
    last = args.waiting_depths[-1]
    ways = [Entrant(0, last)] if 0 in args.actors else []
    ways += [Entrant(1, depth) for depth in args.waiting_depths if 1 in args.actors]
    ways += [Entrant(2, last)] if 2 in args.actors else []
    with ray_of_our_own(ways) as share, ExitStack() as stack, progress_bar(console) as progress:
        bar = progress.add_task("waiting", total=(1 + args.rounds) * len(ways))
        trainings = {}
        for way in ways:
            training = Training(way, share, args.waiting_windows)
            trainings[way] = stack.enter_context(closing(training))
            progress.advance(bar)
        placed = pin_apart(threads=1)
        rounds: dict[Entrant, list[Waiting]] = quiet.quietest(
            ways, quiet.Plan.of(args), lambda way: trainings[way].round(), lambda: progress.advance(bar)
        )
    return sampling_report.plain_waiting(args.waiting_windows, placed, rounds)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark_sampling",
        description=f"{__doc__}\n{sampling_jobs.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workloads", type=names, default=[*WORKLOADS], help="separated by commas; default: all")
    add("--actors", type=counts, default=[0, 1, 2, 4], help="0: in this process; default: 0,1,2,4")
    add("--depth", type=int, default=4, help="windows drawn ahead at most (default: %(default)s)")
    quiet.add_arguments(parser, rounds=3)
    add("--seconds", type=float, default=2.0, help="shortest round (default: %(default)s)")
    waiting_help = f"windows of a round, after {SKIPPED} that do not count; 0 leaves it out"
    add("--waiting_windows", type=int, default=60, help=f"{waiting_help} (default: %(default)s)")
    add("--waiting_depths", type=counts, default=[1, 2, 4], help="of one actor; default: 1,2,4")
    json_help = "the picture goes beside it; default: %(default)s"
    add("--json", type=Path, default=Path("runs/benchmark/sampling.json"), help=json_help)
    args = parser.parse_args()
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what does not exist."""
    for name in args.workloads:
        if name not in WORKLOADS:
            parser.error(f"--workloads ({name}) must be {', '.join(WORKLOADS)}")
    least = {"actors": 0, "depth": 1, "rounds": 1, "waiting_windows": 0, "waiting_depths": 1}
    for name, smallest in least.items():
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [value]:
            if one < smallest:
                parser.error(f"--{name} ({one}) must be at least {smallest}")
    if not args.actors or not args.waiting_depths:
        parser.error("--actors and --waiting_depths must not be empty")


if __name__ == "__main__":
    main()
