"""Which checkpoints of a run are kept, and the best φ so far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import lightning as L

from l2l_scale.checks import check_count


class Retention:
    """What validation came to at each checkpoint, which of them may go, and the φ that was best.

    Args:
        monitor: the metric that chooses the best.
        mode: whether less or more of it is better.
        keep_last: how many of the last checkpoints to keep.
        keep_best: how many of the best to keep besides.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"], keep_last: int, keep_best: int) -> None:
        check_count("keep_last", keep_last)
        if keep_best != 0:
            check_count("keep_best", keep_best)
        self.monitor, self.sign = monitor, {"min": 1, "max": -1}[mode]
        self.keep_last, self.keep_best = keep_last, keep_best
        self.best: dict[str, Any] | None = None
        """{"value", "meta_step", "phi": state_dict of the module} of the best validation so far."""
        self.values: dict[str, float] = {}
        """What the checkpoints that were written at a validation came to, by name."""
        self.spare: set[str] = set()
        """Checkpoints that are none of ours: newer, of another future, damaged, or those of another run."""
        self._validated: tuple[int, float] | None = None

    def validated(self, value: float, module: L.LightningModule) -> None:
        """Take note of a validation; φ is remembered if it is the best. NaN is the worst that there is."""
        score = math.inf if math.isnan(value) else self.sign * value
        if self.best is None or score < self.sign * self.best["value"]:
            phi = {name: leaf.detach().cpu().clone() for name, leaf in module.state_dict().items()}
            self.best = {"value": self.sign * score, "meta_step": module.global_step, "phi": phi}
        self._validated = (module.global_step, self.sign * score)

    def writing(self, name: str, meta_step: int) -> None:
        """Take note of a checkpoint that is about to be written."""
        if self._validated is not None and self._validated[0] == meta_step:
            self.values[name] = self._validated[1]
        self.spare.discard(name)

    def to_keep(self, there: Iterable[str]) -> set[str]:
        """The last and the best of the checkpoints that are there, given oldest first."""
        names = [name for name in there if name not in self.spare]
        self.values = {name: value for name, value in self.values.items() if name in names}
        best = sorted(self.values, key=lambda name: self.sign * self.values[name])[: self.keep_best]
        return {*names[-self.keep_last :], *best}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        chosen_by = [self.monitor, self.sign]
        return {"best": self.best, "values": self.values, "spare": sorted(self.spare), "chosen_by": chosen_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        if state_dict["chosen_by"] == [self.monitor, self.sign]:  # else its best is none of ours
            self.best, self.values = state_dict["best"], state_dict["values"]
        self.spare |= set(state_dict.get("spare", ()))
