"""How much memory a run will need, on the host and on the device, before any of it is allocated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from l2l_scale.optimizers.backend import Backend
from l2l_scale.rng import Split
from l2l_scale.tasks import TaskFamily
from l2l_scale.tasks.image_family import ImageFamily
from l2l_scale.tasks.wrapped import unwrapped
from l2l_scale.training.data import WindowData
from l2l_scale.training.memory.hollow import choose_kernel, workspace_bytes
from l2l_scale.training.memory.limits import device_available, host_available, resident_bytes
from l2l_scale.training.memory.live_bytes import LiveBytes, Place, Tag, severity
from l2l_scale.training.memory.rehearsal import (
    CHECKPOINT,
    TRAINING,
    VALIDATION,
    coordinates_of,
    largest_seats,
    rehearse,
)
from l2l_scale.training.module import MetaTraining

FIRST_USE = 13_000_000
"""What torch and Lightning take at the first window, whatever its size (measured): threads, buffers of matrix
products, imports."""
CUDA_CONTEXT = {"host": 800_000_000, "device": 600_000_000}
"""Estimates, not measured: what CUDA and its libraries take."""
RAY, ACTOR = 500_000_000, 350_000_000
"""What a Ray of our own takes, and each actor once it has imported torch (measured)."""
_CONTEXT = "CUDA context (estimate)"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run is computed.

    Args:
        device: of each rank.
        ranks_per_node: processes on a host.
        world_size: processes in all.
        dtype: of θ.
    """

    device: torch.device
    ranks_per_node: int = 1
    world_size: int = 1
    dtype: torch.dtype = torch.float32


class Usage(NamedTuple):
    """Bytes in one memory at the worst moment."""

    parts: dict[str, int]
    """Of one rank."""
    ranks: int
    """That share the memory."""
    worst: str
    """The moment."""
    available: int | None
    """To all ranks together; None if it is not known."""

    @property
    def total(self) -> int:
        """Of all ranks."""
        return self.ranks * sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is enough, as far as is known."""
        return self.available is None or self.total <= self.available


class Prediction(NamedTuple):
    """What a run will need."""

    host: Usage
    device: Usage | None
    """None in a run on the CPU."""
    backend: str
    window_per_coordinate_step: float
    """Bytes of the training window and its slots per coordinate and inner step, at its worst moment."""

    @property
    def fits(self) -> bool:
        """Whether there is enough of everything."""
        return self.host.fits and (self.device is None or self.device.fits)


def predict(
    model: MetaTraining, data: WindowData, machine: Machine, backend: Backend | None = None
) -> Prediction:
    """Predict the memory of a run, within 15 % in what was measured on a CPU.

    Slots that diverge are not counted in: the window is then computed a second time. ``compiled`` counts as
    eager, an upper bound.

    Args:
        model: the module; it is not touched.
        data: where its windows come from.
        machine: where it is computed.
        backend: as if this one were configured.

    Raises:
        ValueError: if no kernel computes the rule with that backend, or a meta-loss is for another horizon.
    """
    model.estimator.check_horizons(data.schedule.horizons)
    decoded = decoded_bytes(data)  # before the process is measured: describing data imports libraries
    process = resident_bytes() + FIRST_USE
    backend = model.backend if backend is None else backend
    on_cpu = machine.device.type == "cpu"
    choice = choose_kernel(model.rule, backend, machine.device, machine.dtype)
    coordinates = coordinates_of(data, largest_seats(data, machine.world_size))
    live = LiveBytes(shared=on_cpu)
    state = rehearse(model, data, choice.compute, machine.dtype, live, machine.world_size)
    parts = Counter({"process itself": process, "data set": decoded, **pool_bytes(data, live)})
    if not on_cpu:
        parts[_CONTEXT] = CUDA_CONTEXT["host"]
    elif choice.program is not None:
        sizes = max(coordinates), data.schedule.window
        parts["kernel workspace"] = workspace_bytes(choice.program, *sizes, machine.dtype)
    host = _usage(live, "host", parts, state if on_cpu else 0, machine.ranks_per_node, host_available())
    device = None if on_cpu else _device_usage(live, state, machine)
    window = live.peak["host" if on_cpu else "device", TRAINING]
    used = sum(size for tag, size in window.items() if tag.part in ("window", "slots"))
    return Prediction(host, device, choice.description, used / (sum(coordinates) * data.schedule.window))


def _device_usage(live: LiveBytes, state: int, machine: Machine) -> Usage:
    """Every rank has a device of its own."""
    free, context = device_available(machine.device), CUDA_CONTEXT["device"]
    return _usage(
        live, "device", Counter({_CONTEXT: context}), state, 1, None if free is None else free + context
    )


def _usage(
    live: LiveBytes, place: Place, known: Counter[str], state: int, ranks: int, available: int | None
) -> Usage:
    """The worst moment, in parts."""
    moments = {
        phase: live.peak.get((place, phase), Counter()) for phase in (TRAINING, VALIDATION, CHECKPOINT)
    }
    worst = max(moments, key=lambda phase: severity(moments[phase]))
    parts = known.copy()
    for tag, size in moments[worst].items():
        parts[tag.part] += size
    # In a training window the state is on its way from one form to the next, and counts as the window's.
    missing = max(state - parts["slots"], 0)
    parts["slots"] += missing
    parts["window"] -= min(missing, parts["window"])
    return Usage({part: size for part, size in parts.items() if size > 0}, ranks, worst, available)


def pool_bytes(data: WindowData, live: LiveBytes) -> dict[str, int]:
    """What the actors of a rank take: their processes, and the windows that are drawn ahead."""
    pool = data.pool
    if pool.num_actors == 0:
        return {}
    window = live.peak.get(("host", TRAINING), Counter())[Tag("host", "drawn windows")]
    return {"sampling actors (estimate)": RAY + pool.num_actors * ACTOR + pool.depth * window}


def decoded_bytes(data: WindowData) -> int:
    """What data sets keep in the host's memory besides the tensors on the device; nothing if streamed."""
    # Families with the same images share them.
    return sum(dict(_decoded_bytes(family) for family in data.mixture.families.values()).values())


def _decoded_bytes(family: TaskFamily) -> tuple[Hashable, int]:
    """What a family's images are, and their size."""
    _ = family.spec
    family = unwrapped(family)
    if not isinstance(family, ImageFamily) or family.source == "streamed":
        return "", 0
    images = [family.for_split(split).images for split in (Split.TRAIN, Split.VALID)]
    return (family.dataset, family.labels), sum(info.size * torch.Size(info.shape).numel() for info in images)
