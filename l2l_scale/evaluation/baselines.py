"""Hand-designed optimizers that a learned rule has to beat, and the grids that they are tuned on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from torch import Tensor

from l2l_scale.checks import check_count
from l2l_scale.optimizers.adaptive import AdaGrad, Adam, AdamW, RMSprop
from l2l_scale.optimizers.base import UpdateRule
from l2l_scale.optimizers.classic import SGD, BarzilaiBorwein, HeavyBall, Nesterov
from l2l_scale.optimizers.schedules import CosineSchedule, Scheduled

Hypers: TypeAlias = "Mapping[str, float] | Mapping[str, Tensor]"
"""Hyper-parameters by name: numbers, or one value per slot (S,)."""

RATES_PER_DECADE = 16


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A hand-designed optimizer and the grid that it is tuned on.

    Args:
        name: as it stands in tables and settings.
        build: makes the rule from its hyper-parameters and the horizon that it is tuned for.
        rates: lowest and highest learning rate tried at first; the search goes further where it must.
        others: values tried of the other hyper-parameters that are tuned, rising. Zero is a natural end.
        rates_per_decade: learning rates of the finest lattice per decade; of 16, neighbours differ by 15 %.

    Raises:
        ValueError: if ``rates_per_decade`` is no even number of at least 2.
    """

    name: str
    build: Callable[[Hypers, int], UpdateRule]
    rates: tuple[float, float]
    others: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rates_per_decade: int = RATES_PER_DECADE

    def __post_init__(self) -> None:
        check_count("rates_per_decade", self.rates_per_decade, least=2)
        if self.rates_per_decade % 2:
            raise ValueError(
                f"rates_per_decade ({self.rates_per_decade}) must be even: half decades are tried first"
            )

    @property
    def combinations(self) -> list[dict[str, float]]:
        """All combinations of the other hyper-parameters; one empty one if there are none."""
        values = itertools.product(*self.others.values())
        return [dict(zip(self.others, combination, strict=True)) for combination in values]


def _plain(rule: Callable[..., UpdateRule]) -> Callable[[Hypers, int], UpdateRule]:
    """Take the rule as it is, whatever the horizon."""
    return lambda hypers, horizon: rule(**hypers)


def _cosine(rule: Callable[..., UpdateRule]) -> Callable[[Hypers, int], UpdateRule]:
    """Let the learning rate fall to zero over the horizon; beyond it nothing moves any more."""
    return lambda hypers, horizon: Scheduled(rule(**hypers), CosineSchedule(horizon))


def _cooldown(rule: Callable[..., UpdateRule]) -> Callable[[Hypers, int], UpdateRule]:
    """Hold the learning rate for 60 % of the horizon, then let it fall to a tenth."""

    def build(hypers: Hypers, horizon: int) -> UpdateRule:
        hold = 6 * horizon // 10
        return Scheduled(rule(**hypers), CosineSchedule(horizon - hold, final_fraction=0.1, hold=hold))

    return build


_MOMENTUM = {"momentum": (0.0, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995)}
_BETAS = {
    "beta1": (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
    "beta2": (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999),
}
_DECAY = {"weight_decay": (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)}

BASELINES: Sequence[Baseline] = (
    Baseline(name="SGD", build=_plain(SGD), rates=(1e-4, 1.0)),
    Baseline(name="heavy ball", build=_plain(HeavyBall), rates=(1e-4, 1.0), others=_MOMENTUM),
    Baseline(name="NAG", build=_plain(Nesterov), rates=(1e-4, 1.0), others=_MOMENTUM),
    Baseline(name="RMSprop", build=_plain(RMSprop), rates=(1e-3, 1.0)),
    Baseline(name="AdaGrad", build=_plain(AdaGrad), rates=(1e-2, 10.0)),
    Baseline(name="Adam", build=_plain(Adam), rates=(1e-3, 1.0)),
    Baseline(name="Adam with betas", build=_plain(Adam), rates=(1e-3, 1.0), others=_BETAS),
    Baseline(name="AdamW", build=_plain(AdamW), rates=(1e-3, 1.0), others=_DECAY),
    Baseline(name="SGD with cosine", build=_cosine(SGD), rates=(1e-4, 1.0)),
    Baseline(name="Adam with cosine", build=_cosine(Adam), rates=(1e-3, 1.0)),
    Baseline(name="BB2", build=_plain(BarzilaiBorwein), rates=(1e-4, 1.0)),
)
"""Those taken if none are named. BB2's learning rate is that of its first inner step and of its fallback."""


BY_NAME_ONLY: Sequence[Baseline] = (
    Baseline(name="heavy ball 0.9", build=_plain(partial(HeavyBall, momentum=0.9)), rates=(1e-4, 1.0)),
    Baseline(name="NAG 0.9", build=_plain(partial(Nesterov, momentum=0.9)), rates=(1e-4, 1.0)),
    Baseline(name="NAG 0.9 with cosine", build=_cosine(partial(Nesterov, momentum=0.9)), rates=(1e-4, 1.0)),
    Baseline(
        name="NAG 0.9 with cooldown", build=_cooldown(partial(Nesterov, momentum=0.9)), rates=(1e-4, 1.0)
    ),
)
"""Momentum as people set it and only the rate tuned, a tenth of the work: for tasks of minutes each."""


def choose_baselines(names: Sequence[str] | None, rates_per_decade: int = RATES_PER_DECADE) -> list[Baseline]:
    """Return the baselines of these names, :data:`BASELINES` for None, to be tuned as finely as that.

    Raises:
        ValueError: for an unknown name, or a number of rates that cannot be.
    """
    known = {baseline.name: baseline for baseline in (*BASELINES, *BY_NAME_ONLY)}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"baselines ({unknown[0]!r}) must be among {', '.join(known)}")
    chosen = BASELINES if names is None else [known[name] for name in names]
    return [replace(baseline, rates_per_decade=rates_per_decade) for baseline in chosen]
