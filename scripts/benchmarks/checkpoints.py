"""What does a checkpoint cost: how long to write, how long to read, how large, what share of the training?

The rule is the LSTM of configs/mnist_lstm.yaml, on networks on scikit-learn's digits. With 212 hidden units
they have 15,910 coordinates, as the paper's networks on MNIST have. First checkpoints with as many slots in
flight are written into --folder and read again; then a run trains with Checkpoints as it is by default. Its
windows are of 2 inner steps, so that 64 slots fit into memory; there is no validation.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import report
import torch
from commandline import console_here
from lightning.pytorch.callbacks import Callback
from rich.table import Table

from l2l_scale.optimizers import Concatenate, CoordinatewiseLSTM, LogMagnitude, RNNprop, TanhExp
from l2l_scale.tasks import ImageClassifier
from l2l_scale.training import Checkpoints, MetaTraining, Trainer, WindowData
from l2l_scale.training.checkpoints import CheckpointFolders
from l2l_scale.training.checkpoints.inflight import KEY, SLOTS
from l2l_scale.training.checkpoints.store import save_together
from l2l_scale.tree import tree_leaves


def main() -> None:
    """Measure; print a table; write JSON."""
    args, console = arguments(), console_here()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    load = list(os.getloadavg())
    console.print(f"CPU {report.cpu_name()}, {os.cpu_count()} cores, load {load[0]:.1f} before the start")
    args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="benchmark-"))
    try:
        content: dict[str, Any] = {"load": load, "slots": args.slots, "hidden": args.hidden}
        content["one"] = one_checkpoint(args, folder)
        console.print(table(content["one"]))
        if args.seconds:
            content["training"] = training(args, folder / "run")
            console.print(sentence(content["training"]), markup=False)
    finally:
        shutil.rmtree(folder)
    report.write(args.json, content)
    console.print(f"Written: {args.json}", markup=False)


def make_rule() -> CoordinatewiseLSTM:
    """The LSTM of configs/mnist_lstm.yaml."""
    features = Concatenate([RNNprop(log_scale=True), LogMagnitude()])
    return CoordinatewiseLSTM(features=features, head=TanhExp())


def one_checkpoint(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of writing and reading, in every round, and bytes."""
    theta = torch.randn(args.slots, ImageClassifier(hidden=(args.hidden,)).spec.size)
    state = [torch.randn(leaf.shape).to(leaf.dtype) for leaf in tree_leaves(make_rule().init_state(theta))]
    leaves = [theta, *state, theta.clone(), torch.zeros(args.slots, dtype=torch.bool)]
    lightning = {"pytorch-lightning_version": L.__version__, "state_dict": {}, "loops": {}, "global_step": 0}
    rounds: list[dict[str, float]] = []
    path, size = folder / "step-00000000", 0
    for _ in range(args.rounds):
        carries = [{"": {"first": 0, "leaves": leaves}}]
        flushing = Timer(os.fsync)
        os.fsync = flushing  # type: ignore[assignment]
        started = time.perf_counter()
        save_together({**lightning, KEY: {"next_window": 0, SLOTS: carries}}, path, {})
        write = time.perf_counter() - started
        os.fsync = flushing.function
        started = time.perf_counter()
        CheckpointFolders().load_checkpoint(path)
        read = time.perf_counter() - started
        content = bytes(sum(file.stat().st_size for file in path.iterdir()))
        started, size = time.perf_counter(), len(content)
        hashlib.sha256(content)
        hashed = time.perf_counter() - started
        rounds.append({"write": write, "fsync": flushing.seconds, "sha256": hashed, "read": read})
    return {"coordinates": theta.shape[1], "bytes": size, "rounds": rounds}


class Timer:
    """A function that knows how long its calls took together."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        started = time.perf_counter()
        result = self.function(*args)
        self.seconds += time.perf_counter() - started
        return result


class UntilLate(Callback):
    """Ends a run after some seconds; knows when it trained."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started, self.windows = seconds, 0.0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Look at the clock."""
        self.windows = trainer.global_step
        trainer.should_stop = time.perf_counter() - self.started > self.seconds


def training(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train for a while with checkpoints at their default rhythm; the last one, at the end, counts apart."""
    family = ImageClassifier(hidden=(args.hidden,), batch_size=32)
    data = WindowData(family, horizon=20, window=2, slots=args.slots, windows_per_epoch=10**6, valid_tasks=1)
    checkpoints = Checkpoints(every_seconds=args.every_seconds, dirpath=str(folder), heed_signals=False)
    saving, clock = Timer(checkpoints.save), UntilLate(args.seconds)
    checkpoints.save = saving  # type: ignore[method-assign]
    ends: list[float] = []
    clock.on_train_end = lambda *_: ends.append(saving.seconds)  # type: ignore[method-assign]
    trainer = Trainer(
        max_steps=10**6,
        max_epochs=-1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, checkpoints],
        default_root_dir=folder,
    )
    trainer.fit(MetaTraining(make_rule(), family), datamodule=data)
    total = time.perf_counter() - clock.started
    rhythm, last = ends[0], saving.seconds - ends[0]
    return {
        "seconds": total,
        "windows": clock.windows,
        "seconds_of_checkpoints": rhythm,
        "seconds_of_the_last": last,
        "share": rhythm / (total - last),
        "every_seconds": checkpoints.every_seconds,
        "max_share": checkpoints.max_share,
    }


def table(one: dict[str, Any]) -> Table:
    """Medians and ranges."""
    title = f"one checkpoint: {one['bytes'] / 1e6:,.0f} MB, {one['coordinates']:,} coordinates in each slot"
    found = Table("", "seconds (median)", "range", title=title)
    for name in one["rounds"][0]:
        values = [entry[name] for entry in one["rounds"]]
        found.add_row(name, f"{median(values):.3f}", f"{min(values):.3f} to {max(values):.3f}")
    return found


def sentence(run: dict[str, Any]) -> str:
    """What the run came to."""
    rhythm = f"every_seconds {run['every_seconds']:g}, max_share {run['max_share']:g}"
    took, last = run["seconds_of_checkpoints"], run["seconds_of_the_last"]
    return (
        f"training for {run['seconds']:.0f} s ({run['windows']} windows): {took:.2f} s, {run['share']:.2%}, "
        f"went into checkpoints ({rhythm}), and {last:.2f} s into the last one at the end"
    )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark_checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--slots", type=int, default=64, help="in flight (default: %(default)s)")
    add("--hidden", type=int, default=212, help="units of the networks (default: %(default)s)")
    add("--rounds", type=int, default=5, help="checkpoints written and read (default: %(default)s)")
    add("--seconds", type=float, default=150.0, help="of training; 0 leaves it out (default: %(default)s)")
    add("--every_seconds", type=float, default=30.0, help="between checkpoints (default: %(default)s)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: all cores)")
    add("--folder", type=Path, default=Path("runs/benchmark"), help="whose disk is written to")
    add("--json", type=Path, default=Path("runs/benchmark/checkpoints.json"), help="default: %(default)s")
    args = parser.parse_args()
    for name in ("slots", "hidden", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} ({getattr(args, name)}) must be at least 1")
    return args


if __name__ == "__main__":
    main()
