"""MNIST where it can be found; elsewhere noise of the same shape, which costs the same to compute with."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from l2l_scale.rng import Split
from l2l_scale.tasks.datasets import describe_images

_BESIDE = Path(__file__).parents[3] / "shared" / "data" / "mnist"


def mnist_or_noise() -> tuple[str, str]:
    """A data set's name for ``ImageClassifier``, and what it is in words.

    MNIST in $L2L_SCALE_DATA, else beside the repository, else from the Hub.
    """
    name = str(_BESIDE) if "L2L_SCALE_DATA" not in os.environ and _BESIDE.is_dir() else "mnist"
    try:
        describe_images(name, Split.TRAIN)
    except ValueError:
        return _noise(), "noise (MNIST was not found)"
    return name, "MNIST"


def _noise(count: int = 1000) -> str:
    """A folder with random images of MNIST's shape, gone when the program ends."""
    import datasets
    from PIL import Image

    folder = tempfile.mkdtemp(prefix="l2l_scale-noise-")
    atexit.register(shutil.rmtree, folder)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 28, 28), np.uint8)
    rows = {"image": [Image.fromarray(one) for one in pixels], "label": [i % 10 for i in range(count)]}
    datasets.Dataset.from_dict(rows).to_parquet(f"{folder}/train.parquet")
    return folder
