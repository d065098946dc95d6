"""Writes a workload's problem and the first φ to a file that is read without PyTorch, for the JAX peer."""

from __future__ import annotations

from pathlib import Path

import methods
import numpy as np
import workloads
from torch import Tensor

_KINDS = {"N": "sphere", "S": "quadratic", "W1": "quadratic", "W2": "mlp", "W3": "mlp"}


def export(name: str, folder: Path) -> Path:
    """Write a workload.

    Keys: theta0 (S, N); steps; kind; the kind's constants; the weights of φ, ``phi.*``.
    """
    workload = workloads.make(name)
    batch, kind = workload.batch, _KINDS[name.partition("=")[0]]
    arrays: dict[str, Tensor] = {"theta0": batch.theta0, **batch.task, **batch.data}
    arrays |= {f"phi.{key}": weight for key, weight in methods.plain_weights().items()}
    if kind == "mlp":
        pixels, labels = workloads.pixels_and_labels(workload.family.dataset)
        arrays |= {"pixels": pixels, "labels": labels.int(), "index": batch.data["index"].int()}
    path = folder / f"{name}.npz"
    plain = {key: tensor.numpy() for key, tensor in arrays.items()}
    np.savez(path, kind=np.asarray(kind), steps=np.asarray(batch.window_length), **plain)
    return path
