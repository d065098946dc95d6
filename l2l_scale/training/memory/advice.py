"""What to change in a run that does not fit: options that were tried, with what they would need."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import copy
from dataclasses import replace

from l2l_scale.optimizers.backend import Backend
from l2l_scale.optimizers.kernels import KernelUnavailableError, UnsupportedRuleError
from l2l_scale.training.data import WindowData
from l2l_scale.training.memory.hollow import choose_kernel
from l2l_scale.training.memory.prediction import Machine, Prediction, Usage, predict
from l2l_scale.training.memory.rehearsal import VALIDATION
from l2l_scale.training.module import MetaTraining

_LOG = logging.getLogger(__name__)


def check_memory(model: MetaTraining, data: WindowData, machine: Machine) -> None:
    """Refuse a run that cannot fit; where nothing can be predicted, say so and go on.

    Raises:
        ValueError: if it does not fit, with what would.
    """
    try:
        prediction = predict(model, data, machine)
    except (ValueError, OSError):  # what a user wrote, or a data set that is not there
        raise
    except Exception as error:
        # A family or rule of the user's may do what tensors without content cannot.
        _LOG.warning("the run's memory could not be predicted, so it is not checked: %s", error)
        return
    if not prediction.fits:
        raise ValueError(refusal(model, data, machine, prediction))


def refusal(model: MetaTraining, data: WindowData, machine: Machine, prediction: Prediction) -> str:
    """Why a run does not fit, and what would."""
    name, usage = tight(prediction)
    assert usage.available is not None
    options = [*_options(model, data, machine, prediction)]
    advice = "; ".join(options) or "use a machine with more memory, or a smaller task"
    return (
        f"the run would need {human(usage.total)} of the {name}'s memory, {human(usage.available)} are "
        f"available (the worst moment is {usage.worst}; l2l-scale memory shows the parts). What would fit: "
        f"{advice}. To go on anyway: --check_memory false"
    )


def tight(prediction: Prediction) -> tuple[str, Usage]:
    """The memory that is too small, or the host's."""
    if prediction.device is not None and not prediction.device.fits:
        return "device", prediction.device
    return "host", prediction.host


def human(size: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _options(
    model: MetaTraining, data: WindowData, machine: Machine, prediction: Prediction
) -> Iterator[str]:
    """Changes that were predicted to fit, one by one."""
    if tight(prediction)[1].worst == VALIDATION:
        yield from _smaller("data.valid_tasks", data.valid_tasks, model, data, machine, prediction)
    if prediction.backend.startswith(("eager", "compiled")) and _fused(model, machine):
        fused = predict(model, data, machine, "fused")
        if fused.fits:
            yield f"--model.backend fused ({human(tight(fused)[1].total)})"
        else:
            yield from _smaller("data.slots", data.slots, model, data, machine, fused, "fused")
    yield from _smaller("data.slots", data.slots, model, data, machine, prediction)
    yield from _shorter_window(model, data, machine, prediction)


def _fused(model: MetaTraining, machine: Machine) -> bool:
    try:
        return choose_kernel(model.rule, "fused", machine.device, machine.dtype).program is not None
    except (UnsupportedRuleError, KernelUnavailableError):
        return False


def _smaller(
    option: str,
    count: int,
    model: MetaTraining,
    data: WindowData,
    machine: Machine,
    prediction: Prediction,
    backend: Backend | None = None,
) -> Iterator[str]:
    """The largest count of slots or tasks that fits, found by steps that overshoot less and less."""
    step = machine.world_size * len(data.mixture.members) if option == "data.slots" else 1
    for _ in range(4):
        usage = tight(prediction)[1]
        assert usage.available is not None
        fixed = usage.ranks * sum(usage.parts.get(part, 0) for part in _FIXED)
        room = (usage.available - fixed) / max(usage.total - fixed, 1)
        count = int(0.95 * room * count) // step * step  # as many on every rank
        if count < 1:
            return
        smaller = copy(data)
        setattr(smaller, option.removeprefix("data."), count)
        prediction = predict(model, smaller, machine, backend)
        if prediction.fits:
            extra = " --model.backend fused" if backend else ""
            more = ", or more ranks" if option == "data.slots" else ""
            yield f"--{option} {count}{extra} ({human(tight(prediction)[1].total)}{more})"
            return


_FIXED = ("process itself", "data set", "φ and Adam", "CUDA context (estimate)", "kernel workspace")


def _shorter_window(
    model: MetaTraining, data: WindowData, machine: Machine, prediction: Prediction
) -> Iterator[str]:
    """The longest shorter window that fits."""
    usage, schedule = tight(prediction)[1], data.schedule
    assert usage.available is not None
    room = usage.available / usage.total
    for window in range(int(room * schedule.window), 0, -1):
        if schedule.horizon % window == 0:
            shorter = copy(data)
            shorter.schedule = replace(schedule, window=window)
            found = predict(model, shorter, machine)
            if found.fits:
                yield f"--data.window {window} ({human(tight(found)[1].total)})"
                return
