"""Kills a run at random moments and lets it go on, again and again: does it come out as if undisturbed?

The smoke configuration is trained twice in peace. Then the same run is started with `--ckpt_path last`, and
it and all processes that it started (ranks, Ray, actors) are killed by SIGKILL: at a moment drawn uniformly
over what is left of its life, start-up and resumption included, or, half of the time, just after a hidden
folder appears then among its checkpoints, that is while one is written, replaced or deleted. After every kill
all checkpoints that are there must be whole. It is started again until it gets to its end. Then the last
checkpoint (φ, Adam, schedule, counters, all slots in flight, the best φ), the exported rule and run.json must
be those of the undisturbed run, bit for bit; and a new run starts, until there were enough kills.

Runs are forked from a process that has imported everything, which saves seconds at every start; --fresh
starts new interpreters, and lets Lightning start the ranks. Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Only what has no other threads can be forked; numpy and torch read this when they are imported."""


def main() -> None:
    """Torture; print what happened; exit with 1 if anything was wrong."""
    args = arguments()
    os.environ.update(ONE_THREAD)
    from torture import Torture

    sys.exit(Torture(args).run())


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/torture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kills", type=int, default=200, help="how many (default: %(default)s)")
    add("--ranks", type=int, default=1, help="training processes (default: %(default)s)")
    add("--actors", type=int, default=0, help="Ray actors per rank that draw windows (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    add("--meta_steps", type=int, default=200, help="of a run, a multiple of 25 (default: %(default)s)")
    add("--fresh", action="store_true", help="a new interpreter for every start, instead of forks")
    out_help = "where the runs go, kept at the end; default: a temporary folder, kept if anything was wrong"
    add("--out", type=Path, help=out_help)
    args = parser.parse_args()
    for name in ("kills", "ranks", "meta_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} ({getattr(args, name)}) must be at least 1")
    if args.actors < 0:
        parser.error(f"--actors ({args.actors}) must be at least 0")
    if args.meta_steps % 25:
        parser.error(f"--meta_steps ({args.meta_steps}) must be a multiple of 25, the meta-steps of an epoch")
    if sys.platform != "linux":
        parser.error("this needs Linux: elsewhere one cannot be sure to kill all that a run has started")
    return args


if __name__ == "__main__":
    main()
