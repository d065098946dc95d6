"""``l2l-scale memory``: how much memory a configuration will need, before anything is allocated."""

from __future__ import annotations

import json
import warnings

import torch
from lightning.pytorch.cli import LightningArgumentParser
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from l2l_scale.cli.experiment import Reader
from l2l_scale.training.memory import Machine, Prediction, Usage, human, predict, refusal


class Memory(Reader):
    """Prediction with a configuration."""

    description = (
        "Predict the memory of a run, on the host and on the device, before anything is allocated. "
        "Exits with 2 if it does not fit."
    )

    def add_options(self, parser: LightningArgumentParser) -> None:
        """Add the form of the answer."""
        parser.add_argument("--json", action="store_true", help="print JSON instead of a table")

    def machine(self) -> Machine:
        """What the trainer's settings come to; a GPU need not be here."""
        trainer = self.config.trainer
        on_gpu = trainer.accelerator in ("gpu", "cuda") or (
            trainer.accelerator == "auto" and torch.cuda.is_available()
        )
        count = trainer.devices
        if isinstance(count, str) and count.isdigit():
            count = int(count)
        if isinstance(count, list):
            count = len(count)
        if not isinstance(count, int) or count < 1:  # "auto", -1 or a list in words: all there are
            count = max(torch.cuda.device_count(), 1) if on_gpu else 1
        return Machine(
            device=torch.device("cuda" if on_gpu else "cpu"),
            ranks_per_node=count,
            world_size=count * trainer.num_nodes,
            dtype=torch.float64 if str(trainer.precision).startswith("64") else torch.float32,
        )


def table(prediction: Prediction) -> Table:
    """Parts of all memories, and what is there."""
    usages = {"host": prediction.host, "device": prediction.device}
    known = {name: usage for name, usage in usages.items() if usage is not None}
    result = Table("part", box=SIMPLE_HEAD)
    for name, usage in known.items():
        result.add_column(f"{name}, per rank" if usage.ranks > 1 else name, justify="right")
    for part in dict.fromkeys(part for usage in known.values() for part in usage.parts):
        result.add_row(part, *(human(usage.parts.get(part, 0)) for usage in known.values()))
    result.add_section()
    totals = [
        f"{f'{usage.ranks} × = ' if usage.ranks > 1 else ''}{human(usage.total)}" for usage in known.values()
    ]
    result.add_row("total", *totals, style="bold")
    given = ["unknown" if usage.available is None else human(usage.available) for usage in known.values()]
    result.add_row("available", *given)
    result.add_row("worst moment", *(usage.worst for usage in known.values()))
    return result


def as_json(prediction: Prediction) -> str:
    """All numbers, in bytes."""

    def described(usage: Usage | None) -> dict[str, object] | None:
        if usage is None:
            return None
        return {**usage._asdict(), "total": usage.total, "fits": usage.fits}

    content = {
        **prediction._asdict(),
        "host": described(prediction.host),
        "device": described(prediction.device),
        "fits": prediction.fits,
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def run(arguments: list[str]) -> None:
    """Predict as the command line says.

    Raises:
        ValueError: if the run does not fit, after the prediction was printed.
    """
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    command = Memory(arguments)
    if command.config.threads is not None:
        torch.set_num_threads(command.config.threads)
    model, data, machine = command.config_init.model, command.config_init.data, command.machine()
    prediction = predict(model, data, machine)
    if command.config.json:
        print(as_json(prediction))
    else:
        console = Console()
        console.print(table(prediction))
        per_step = human(prediction.window_per_coordinate_step)
        console.print(f"backend {prediction.backend}: {per_step} per coordinate and inner step of the window")
    if not prediction.fits:
        raise ValueError(refusal(model, data, machine, prediction))
