"""Measures one PyTorch backend on one workload, in a process of its own; see :mod:`worker`."""

from __future__ import annotations

import argparse
import contextlib
import time

import methods
import sizes
import torch
import worker
import workloads


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser()
    for name in ("--workload", "--backend"):
        parser.add_argument(name, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    worker.serve(lambda: prepare(args.workload, args.backend, args.threads))


def prepare(name: str, backend: str, threads: int) -> worker.Candidate:
    """Load, and step once: what is loaded or compiled on first use counts neither as time nor as memory."""
    workload = workloads.make(name)
    worker.pin(threads)
    torch.set_num_threads(threads)
    method = methods.make(backend, workload)
    if backend.startswith("compiled"):  # for this very size; the second window's state has another layout
        method.step()
        method.step()
        method.restart()
    else:
        methods.make(backend, workloads.make(sizes.smallest_alike(name))).step()
    facts = {"workload": workload.description, "drawing_seconds": drawing_seconds(workload)}
    return worker.Candidate(method.description, method.step, facts)


def drawing_seconds(workload: workloads.Workload) -> float:
    """CPU seconds to draw one window; the problems are known from the first, as in training."""
    draw = workloads.drawing(workload.family, workload.slots)
    draw()
    start = time.process_time()
    draw()
    return time.process_time() - start


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
