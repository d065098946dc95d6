"""What does a learned optimizer cost in use: time per step and memory, beside Adam, with and without guard?

Networks of fully connected layers of several sizes, with minibatches of 128 images of 28 × 28 random pixels.
In every round each optimizer takes some steps in turn, so that others disturb all alike; medians count.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import report
import torch
from commandline import console_here
from rich.table import Table
from torch import nn

from l2l_scale.deploy import LearnedOptimizer, load_rule
from l2l_scale.optimizers import Concatenate, CoordinatewiseLSTM, LogMagnitude, RNNprop, TanhExp, UpdateRule
from l2l_scale.tree import tree_leaves

HIDDEN = {"784-20-10": (20,), "784-256-256-10": (256, 256)}


def main() -> None:
    """Measure; print a table; write JSON."""
    args, console = arguments(), console_here()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    load = list(os.getloadavg())
    console.print(f"CPU {report.cpu_name()}, {args.threads} threads, load {load[0]:.1f} before the start")
    networks = {name: measure(HIDDEN[name], args) for name in args.networks}
    console.print(table(networks))
    report.write(args.json, {"load": load, "threads": args.threads, "networks": networks})
    console.print(f"Written: {args.json}", markup=False)


def optimizers(rule: UpdateRule | str) -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """What is compared, by name."""
    return {
        "Adam": lambda net: torch.optim.Adam(net.parameters(), lr=1e-3),
        "learned": lambda net: LearnedOptimizer(net.parameters(), rule, guard=False),
        "learned, guarded": lambda net: LearnedOptimizer(net.parameters(), rule, guard=True),
    }


def measure(hidden: tuple[int, ...], args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds per step, by optimizer, and of the network's gradient; bytes of their states."""
    sizes = (784, *hidden, 10)
    x, y = torch.randn(128, 784), torch.randint(0, 10, (128,))
    made = optimizers(load_rule(args.rule) if args.rule else untrained())
    runs = {}
    for name, make in made.items():
        torch.manual_seed(0)
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        net = nn.Sequential(*layers[:-1])
        runs[name] = net, make(net)
    seconds: dict[str, list[float]] = {name: [] for name in ("gradient", *runs)}
    for _ in range(args.rounds):
        for name, (net, optimizer) in runs.items():
            for _ in range(args.steps):
                started = time.perf_counter()
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                between = time.perf_counter()
                optimizer.step()
                seconds["gradient"].append(between - started)
                seconds[name].append(time.perf_counter() - between)
    count = sum(param.numel() for param in next(iter(runs.values()))[0].parameters())
    return {
        "coordinates": count,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "state_bytes": {name: state_bytes(optimizer) for name, (_, optimizer) in runs.items()},
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What an optimizer keeps between steps."""
    leaves = [leaf for entry in optimizer.state_dict()["state"].values() for leaf in tree_leaves(dict(entry))]
    tensors = {leaf.data_ptr(): leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def untrained() -> CoordinatewiseLSTM:
    """The form of the pretrained rules for networks; what a step costs does not depend on φ."""
    features = Concatenate([RNNprop(log_scale=True), LogMagnitude()])
    return CoordinatewiseLSTM(features=features, head=TanhExp())


def table(networks: dict[str, dict[str, Any]]) -> Table:
    """One row for each network and optimizer."""
    shown = Table(title="One step of an optimizer", title_justify="left")
    columns = (
        "network",
        "parameters",
        "optimizer",
        "ms per step",
        "of the gradient's",
        "× Adam",
        "bytes per parameter",
    )
    for column in columns:
        shown.add_column(column, justify="left" if column in ("network", "optimizer") else "right")
    for name, one in networks.items():
        for optimizer, size in one["state_bytes"].items():
            own, gradient, adam = (one["seconds"][key] for key in (optimizer, "gradient", "Adam"))
            shown.add_row(
                *(name, f"{one['coordinates']:,}", optimizer, f"{own * 1e3:.3g}", f"{own / gradient:.2f}"),
                *(f"{own / adam:.1f}", f"{size / one['coordinates']:.0f}"),
            )
    return shown


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(HIDDEN), default=list(HIDDEN), help="which networks")
    add("--rule", help="a rule file or pretrained rule; an untrained one of their form if not given")
    add("--rounds", type=int, default=7, help="rounds (default: %(default)s)")
    add("--steps", type=int, default=3, help="steps of each optimizer in a round (default: %(default)s)")
    add("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    add("--json", type=Path, default=Path("benchmark-deploy.json"), help="file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
