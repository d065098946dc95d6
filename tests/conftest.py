"""Shared by all tests: a double-precision fixture, a family with minibatches, windows, a small rule."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from l2l_scale.flat import FlatSpec, Segment
from l2l_scale.optimizers import Concatenate, CoordinatewiseLSTM, LogSign, RNNprop, UpdateRule
from l2l_scale.rng import Split
from l2l_scale.sampling import Batch, Schedule, SeatBatch, WindowSampler
from l2l_scale.tasks import Arrays, TaskFamily, Tensors
from l2l_scale.unroll import WindowBatch

torch.set_num_threads(1)  # the tensors of tests are tiny: more threads only wait for each other


SHARED = Path(os.environ.get("L2L_SCALE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shared_data(name: str) -> str:
    """The folder of a real data set; the test is skipped where it is missing."""
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {name} at {SHARED}; set L2L_SCALE_DATA to the folder that holds it")
    return str(SHARED / name)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep results of tuning out of the user's cache, and the user's out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_uploaded() -> Iterator[None]:
    """A key that the user has for W&B is not for tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        yield


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of scripts/benchmarks."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts/benchmarks")
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(Path(__file__).parents[1] / "scripts") in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _no_traces_of_ranks() -> Iterator[None]:
    """What a run of several ranks leaves in the environment must not reach the next test's processes."""
    names = (
        "L2L_SCALE_RUN_DIR",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
        "LOCAL_RANK",
        "RANK",
        "WORLD_SIZE",
    )
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A real Slurm of two virtual nodes, for all tests of this process."""
    from cluster import Cluster, missing  # of tests/slurm

    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="l2l-slurm-"))  # pytest's own folders are too long for sockets
    folder.chmod(0o755)
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def double() -> Iterator[torch.dtype]:
    """Make float64 the default for what the test creates."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield torch.float64
    torch.set_default_dtype(before)


@dataclass(frozen=True)
class Regression(TaskFamily):
    """Least squares on minibatches of a problem's own 16 rows; data are the rows' indices."""

    features: int = 3

    @property
    def spec(self) -> FlatSpec:
        return FlatSpec((Segment("weight", (self.features,), "linear"), Segment("bias", (), "bias")))

    def sample_task(self, rng: np.random.Generator) -> Arrays:
        return {"x": rng.standard_normal((16, self.features)), "y": rng.standard_normal(16)}

    def sample_init(self, rng: np.random.Generator, task: Arrays) -> np.ndarray:
        return rng.standard_normal(self.features + 1)

    def sample_data(self, rng: np.random.Generator, task: Arrays) -> Arrays:
        return {"rows": rng.integers(len(task["y"]), size=5)}

    def loss(self, params: Tensors, task: Tensors, data: Tensors) -> Tensor:
        prediction = task["x"][data["rows"]] @ params["weight"] + params["bias"]
        return (prediction - task["y"][data["rows"]]).square().mean()


def draw_windows(
    family: TaskFamily,
    schedule: Schedule,
    count: int,
    slots: range = range(4),
    dtype: torch.dtype = torch.float64,
) -> list[WindowBatch]:
    """The first ``count`` windows of the training stream of seed 0."""
    sampler = WindowSampler(family, schedule, 0, Split.TRAIN)
    return [sampler(index, slots).to_batch(dtype) for index in range(count)]


def one_seat(window: WindowBatch) -> Batch:
    """The batch of a rank that works on one family."""
    return (SeatBatch("", 1.0, window),)


def small_lstm(seed: int = 0) -> CoordinatewiseLSTM:
    """A learned rule with every kind of state, in the default precision."""
    torch.manual_seed(seed)
    features = Concatenate([LogSign(), RNNprop(log_scale=True)])
    return CoordinatewiseLSTM(hidden_size=5, layers=2, features=features, output_scale=1.0)


def phi_gradient(rule: UpdateRule, scalar: Tensor) -> Tensor:
    """Derivative of a scalar in φ, as one vector."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(scalar, list(rule.parameters()))])
