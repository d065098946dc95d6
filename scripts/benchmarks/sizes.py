"""Workloads. W1: 128 quadratics of 10 coordinates. W2: one MNIST MLP 784-20-10 (15,910 coordinates),
minibatches of 128 images. W3: 16 such MLPs at once. N=...: one sphere of so many coordinates, so cheap that
nearly all the time goes into the rule. S=...: so many quadratics of 10 coordinates. All: windows of 20 inner
steps.
"""

from __future__ import annotations

NAMES = ("W1", "W2", "W3")
SWEEPS = {
    "S": [f"S={slots}" for slots in (8, 64, 512, 4096)],
    "N": [f"N={10**power}" for power in (3, 4, 5, 6, 7)],
}
WINDOW = 20
_MLP_COORDINATES = 15_910


def is_known(name: str) -> bool:
    """Whether there is such a workload."""
    axis, _, size = name.partition("=")
    return name in NAMES or (axis in SWEEPS and size.isdecimal() and int(size) > 0)


def coordinate_steps(name: str) -> int:
    """Coordinates × tasks × inner steps of a window."""
    axis, _, size = name.partition("=")
    coordinates = {"W1": 1280, "W2": _MLP_COORDINATES, "W3": 16 * _MLP_COORDINATES}.get(name)
    if coordinates is None:
        coordinates = int(size) * {"N": 1, "S": 10}[axis]
    return coordinates * WINDOW


def slots(name: str) -> int:
    """Tasks at once."""
    axis, _, size = name.partition("=")
    return {"W1": 128, "W2": 1, "W3": 16, "N": 1}.get(axis) or int(size)


def smallest_alike(name: str) -> str:
    """The smallest workload with the same kind of task."""
    axis = name.partition("=")[0]
    return {"N": "N=10", "S": "S=1", "W1": "S=1", "W2": "W2", "W3": "W2"}[axis]
