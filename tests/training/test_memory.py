"""Predicted memory: the counting itself, what a prediction is made of, and the peaks of real processes."""

import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_seat
from torch import nn

from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.optimizers import CoordinatewiseLSTM, SharedMemory, UpdateRule
from l2l_scale.optimizers.backend import accelerate
from l2l_scale.optimizers.kernels import UnsupportedRuleError
from l2l_scale.rng import Split
from l2l_scale.sampling import WindowSampler
from l2l_scale.tasks import ImageClassifier, ModuleTask, Quadratic, RandomScaling, TestFunction
from l2l_scale.training import MetaTraining, WindowData
from l2l_scale.training.memory import Machine, check_memory, predict
from l2l_scale.training.memory import prediction as memory_file
from l2l_scale.training.memory.limits import cgroups_left, resident_bytes, slurm_given
from l2l_scale.training.memory.live_bytes import META, LiveBytes, Tag
from l2l_scale.training.memory.prediction import FIRST_USE

CPU = Machine(device=torch.device("cpu"))
ONE_GPU = Machine(device=torch.device("cuda"))
WINDOW, HOST = Tag("device", "window"), Tag("host", "drawn windows")


def experiment(family=None, backend="fused", second_order=False, **data):
    family = Quadratic() if family is None else family
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM()
    model = MetaTraining(rule, family, TruncatedBPTT(second_order), backend=backend)
    return model, WindowData(family, **{"slots": 4, "valid_tasks": 1, **data})


def window_bytes(**settings) -> float:
    return predict(*experiment(**settings), CPU).window_per_coordinate_step


def test_a_rule_whose_layers_are_kernels_is_rehearsed_as_such():
    torch.manual_seed(0)
    family = Quadratic(dimension=500)
    data = WindowData(family, slots=4, valid_tasks=1, horizon=5, window=5)
    predictions = {
        backend: predict(MetaTraining(SharedMemory(), family, backend=backend), data, CPU)
        for backend in ("auto", "fused", "eager")
    }
    assert predictions["auto"].backend == predictions["fused"].backend == "fused LSTM layers"
    held = {backend: one.window_per_coordinate_step for backend, one in predictions.items()}
    assert held["auto"] == held["fused"] < 0.8 * held["eager"]
    chunked = MetaTraining(SharedMemory(chunk=100), family)
    assert predict(chunked, data, CPU).backend.startswith("eager (chunk (100) must be left out")


def test_counts_what_is_alive_and_the_most_of_it():
    live = LiveBytes(shared=True)
    live.phase = "x"
    with live:
        a = torch.empty(1000, device=META)
        b = a * 2  # 8 kB are alive
        c = b.view(10, 100)[0]  # a view holds its whole storage
        del b
        d = a + 1  # 12 kB
        del a, d
        e = c + 1
        assert live._now[WINDOW] == 4000 + 400
        del c, e
    assert live._now[WINDOW] == 0
    assert live.peak["host", "x"][WINDOW] == 12000


def test_counts_what_autograd_keeps_until_it_is_not_needed():
    live = LiveBytes(shared=True)
    with live:
        x = torch.empty(1000, device=META, requires_grad=True)
        y = x.sin().cos()  # keeps sin(x), for the derivative of cos
        assert live._now[WINDOW] == 12000
        y.sum().backward()
        del y
        assert live._now[WINDOW] == 8000  # x and its gradient


def test_tensors_of_device_and_host_are_kept_apart():
    live = LiveBytes(shared=False)
    live.phase = "x"
    with live:
        with live.counting(HOST):
            a = torch.empty(1000, device=META)
        b = torch.empty(1000, device=META)
    assert live.peak["host", "x"][HOST] == 4000
    assert live.peak["device", "x"] == {WINDOW: 4096}  # blocks of 512 bytes
    del a, b


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("backend", ["eager", "fused"])
def test_rehearsal_counts_what_torch_allocates_in_a_real_window(backend, second_order):
    """The truth is what torch's profiler saw being allocated and freed in a window of the real thing."""
    model, data = experiment(backend=backend, second_order=second_order, slots=16, window=5)
    predicted = predict(model, data, CPU).window_per_coordinate_step * 16 * 10 * 5
    model.accelerated[""] = accelerate(model.rule, backend, torch.device("cpu"), torch.float32)
    sampler = WindowSampler(data.family, data.schedule, 0, Split.TRAIN)
    batches = [one_seat(sampler(index, range(16)).to_batch()) for index in range(2)]
    with torch.profiler.profile(profile_memory=True) as profile:  # from the start: it must see every tensor
        for index, batch in enumerate(batches):
            output = model.training_step(batch, index)
            model.zero_grad()
            output["loss"].backward()
            del output
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    assert predicted == pytest.approx(alive.max(), rel=1e-3)


CHILD = """
import json, sys
import torch
from l2l_scale.cli.main import main
from l2l_scale.training.memory import advice
predict, kept = advice.predict, []
advice.predict = lambda *arguments: kept.append(predict(*arguments)) or kept[0]
main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
print(json.dumps({"peak": peak, "predicted": kept[0].host.total, "parts": kept[0].host.parts}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "options",
    [
        ["--model.backend=eager", "--data.slots=500"],
        pytest.param(["--model.backend=fused", "--data.slots=6000"], marks=pytest.mark.slow),
    ],
)
def test_peak_of_a_real_run_is_as_predicted(options, tmp_path):
    command = [
        *("fit", "--model.rule=CoordinatewiseLSTM", "--data.family=Quadratic", "--data.valid_tasks=1"),
        *("--trainer.max_steps=4", "--data.windows_per_epoch=2", "--trainer.accelerator=cpu", "--threads=1"),
        *(f"--run_dir={tmp_path}/run", "--trainer.enable_progress_bar=false"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *command, *options], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["peak"], rel=0.15)
    start = found["parts"]["process itself"]
    assert found["predicted"] - start > 100e6  # so that the process does not hide an error
    assert found["predicted"] - start == pytest.approx(found["peak"] - start, rel=0.25)


def test_memory_of_a_coordinate_step_is_flat_and_small_in_two_phases():
    sizes = ((500, 20), (500, 200), (5000, 20))
    flat = [window_bytes(family=TestFunction(dimension=n, rotate=False), slots=slots) for n, slots in sizes]
    assert flat == pytest.approx([flat[0]] * 3, rel=0.02)
    assert flat[0] < 60
    # Autograd keeps at least the gates, cells and outputs of two layers of 20 units, 4 bytes each.
    eager = window_bytes(backend="eager", slots=200)
    assert eager > 2 * 20 * 6 * 4
    assert eager > 5 * window_bytes(slots=200)


def test_true_gradient_and_longer_windows_need_more():
    assert window_bytes(second_order=True, slots=200) > 2 * window_bytes(slots=200)
    short, long = (
        predict(*experiment(backend="eager", slots=200, window=window), CPU).host.parts["window"]
        for window in (10, 20)
    )
    assert long == pytest.approx(2 * short, rel=0.1)


def test_nothing_is_touched():
    model, data = experiment(ImageClassifier(), slots=2)
    before, state = deepcopy(model.rule.state_dict()), torch.get_rng_state()
    predict(model, data, CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.rule.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.carries == {}
    assert all(parameter.grad is None for parameter in model.parameters())
    sampler = WindowSampler(data.family, data.schedule, 0, Split.TRAIN)
    model.training_step(one_seat(sampler(0, range(2)).to_batch()), 0)["loss"].backward()  # on the real images


def test_images_count_once_per_split_in_their_two_forms():
    pixels, images = 64, 1152 + 143  # digits: 8 × 8, TRAIN and VALID
    as_floats_with_labels, as_bytes = images * (4 * pixels + 8), images * pixels
    for family in (ImageClassifier(), ImageClassifier(), RandomScaling(ImageClassifier())):
        parts = predict(*experiment(family, slots=1), CPU).host.parts  # what is cached by now still counts
        assert parts["data set"] == as_floats_with_labels + as_bytes


def test_streamed_images_are_kept_nowhere_but_travel_with_the_windows():
    streamed, resident = (
        predict(*experiment(ImageClassifier(source=source), slots=2), CPU).host.parts
        for source in ("streamed", "resident")
    )
    assert "data set" not in streamed
    # Pixels (K + 1, S, B, D) as arrays and as tensors; labels in place of indices.
    assert streamed["drawn windows"] - resident["drawn windows"] == 2 * 21 * 2 * 128 * 64


def test_kernel_is_told_as_the_run_will_choose_it(monkeypatch):
    model, data = experiment(backend="auto")
    assert predict(model, data, CPU).backend == "fused"
    double = Machine(device=torch.device("cpu"), dtype=torch.float64)
    assert predict(model, data, double).backend == "eager"
    model.rule = Learnable()
    assert predict(model, data, CPU).backend.startswith("eager (Learnable has no fused kernel")
    with pytest.raises(UnsupportedRuleError, match="has no fused kernel"):
        predict(model, data, CPU, "fused")


class Learnable(UpdateRule):
    """Gradient descent with a learned rate."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.01))

    def init_state(self, theta):
        return ()

    def forward(self, grad, theta, state):
        return -self.rate * grad, state


def test_ranks_share_the_host_and_each_writes_its_slots_into_a_checkpoint():
    family, four = Quadratic(dimension=100), Machine(device=CPU.device, ranks_per_node=4, world_size=40)
    alone = predict(*experiment(family=family, slots=100), CPU).host
    host = predict(*experiment(family=family, slots=4000), four).host
    assert alone.parts["slots"] > 100 * 100 * 80 * 4  # h and c of two layers
    assert host.total == 4 * sum(host.parts.values())
    assert host.parts["slots"] == alone.parts["slots"]
    assert host.parts.get("checkpoint") == alone.parts.get("checkpoint")


def test_on_a_gpu_the_window_is_the_devices_and_the_arrays_are_the_hosts():
    prediction = predict(*experiment(backend="eager", slots=100), ONE_GPU)
    on_cpu = predict(*experiment(backend="eager", slots=100), CPU)
    assert prediction.device.parts["window"] == pytest.approx(on_cpu.host.parts["window"], rel=0.01)
    assert "window" not in prediction.host.parts
    assert prediction.host.parts["drawn windows"] > 3 * 8 * 100 * 10  # θ0 in float64, remembered and stacked
    assert prediction.device.available is None
    assert prediction.fits


def given(monkeypatch, spare: float) -> None:
    """Leave so many bytes besides what the process holds."""
    monkeypatch.setattr(memory_file, "host_available", lambda: int(resident_bytes() + FIRST_USE + spare))


TIMES = {"horizon": 20, "window": 10}


def test_run_that_cannot_fit_is_refused_with_options_that_do_fit(monkeypatch):
    model, data = experiment(backend="eager", slots=1000, **TIMES)
    check_memory(model, data, CPU)
    given(monkeypatch, 50e6)
    with pytest.raises(ValueError, match="of the host's memory") as refusal:
        check_memory(model, data, CPU)
    message = str(refusal.value)
    assert "--model.backend fused (" in message
    assert "--check_memory false" in message
    slots, window = (int(re.search(rf"--data.{name} (\d+)", message)[1]) for name in ("slots", "window"))
    assert 100 < slots < 1000
    assert window in (1, 2, 4, 5)
    assert predict(*experiment(backend="eager", slots=slots, **TIMES), CPU).fits
    assert predict(*experiment(backend="eager", slots=1000, horizon=20, window=window), CPU).fits


def test_too_many_validation_tasks_are_named(monkeypatch):
    model, data = experiment(slots=4, valid_tasks=20_000)
    given(monkeypatch, 100e6)
    with pytest.raises(ValueError, match="a validation window") as refusal:
        check_memory(model, data, CPU)
    tasks = int(re.search(r"--data.valid_tasks (\d+)", str(refusal.value))[1])
    assert predict(*experiment(slots=4, valid_tasks=tasks), CPU).fits


def test_where_nothing_fits_the_advice_says_so(monkeypatch):
    given(monkeypatch, -1e6)
    with pytest.raises(ValueError, match="more memory, or a smaller task"):
        check_memory(*experiment(), CPU)


def test_run_that_cannot_be_rehearsed_goes_on_with_a_warning(caplog):
    def objective(model, task, data):
        return torch.from_numpy(model(torch.ones(1, 1)).detach().numpy()).sum()

    check_memory(*experiment(ModuleTask(build=lambda: nn.Linear(1, 1), objective=objective)), CPU)
    assert "could not be predicted" in caplog.text


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/job/step", "job", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:memory:/job/step",
            "memory/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
        ("3:cpu:/a\n0::/elsewhere/on/the/host", "", ("memory.max", "memory.current", "inactive_file")),
    ],
)
def test_limits_of_cgroups_are_found_up_to_the_top(line, folder, files, tmp_path):
    (tmp_path / "membership").write_text(line + "\n")
    group = tmp_path / "root" / folder
    (group / "step").mkdir(parents=True)
    limit, usage, cache = files
    (group / limit).write_text("1000\n")
    (group / usage).write_text("700\n")
    (group / "memory.stat").write_text(f"anon 1\n{cache} 50\n")
    (group / "step" / limit).write_text("max\n")
    assert list(cgroups_left(tmp_path / "root", tmp_path / "membership")) == [1000 - 700 + 50]


def test_memory_that_slurm_gave_is_read():
    assert list(slurm_given({"SLURM_MEM_PER_NODE": "16"})) == [16 << 20]
    assert list(slurm_given({"SLURM_MEM_PER_CPU": "4", "SLURM_CPUS_ON_NODE": "8"})) == [32 << 20]
    assert list(slurm_given({"SLURM_MEM_PER_NODE": "0"})) == []


def test_a_data_set_that_is_not_there_stops_the_run_at_once(tmp_path: Path) -> None:
    family = ImageClassifier(dataset=str(tmp_path / "nowhere"))
    data = WindowData(family, horizon=4, window=2, slots=1)
    module = MetaTraining(CoordinatewiseLSTM(), family)
    with pytest.raises(ValueError, match="nowhere"):
        check_memory(module, data, Machine(device=torch.device("cpu")))
