"""Which backend computes a rule, why, and that all give the same results."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_windows, phi_gradient, small_lstm
from torch import Tensor

from l2l_scale.cli.main import main
from l2l_scale.estimators import TruncatedBPTT
from l2l_scale.evaluation import HeldOut, loss_curves
from l2l_scale.optimizers import SGD, CoordinatewiseLSTM, Identity, LogSign, ScaledLinear, UpdateRule
from l2l_scale.optimizers import backend as backends
from l2l_scale.optimizers.backend import CompiledRule, accelerate
from l2l_scale.optimizers.fused import FusedRule
from l2l_scale.optimizers.kernels import KernelUnavailableError, build, native
from l2l_scale.rng import Split
from l2l_scale.sampling import Schedule
from l2l_scale.tasks import Quadratic
from l2l_scale.training import MetaTraining
from l2l_scale.training.checkpoints.folder import TRAINING, read_tensors, slots_file
from l2l_scale.unroll import begin

CPU = torch.device("cpu")
FAMILY = Quadratic(dimension=5)
SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


class MyFeature(Identity):
    pass


class MyHead(ScaledLinear):
    pass


UNSUPPORTED = [
    (lambda: SGD(), "SGD has no fused kernel"),
    (lambda: CoordinatewiseLSTM(hidden_size=65), r"hidden_size \(65\)"),
    (lambda: CoordinatewiseLSTM(layers=4), r"layers \(4\)"),
    (lambda: CoordinatewiseLSTM(features=MyFeature()), "feature MyFeature"),
    (lambda: CoordinatewiseLSTM(head=MyHead()), "head MyHead"),
]


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A machine where nothing can be built; the reason that is given there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "_COMPILER", "/nonexistent/c++")
    build._library.cache_clear()
    backends._warn.cache_clear()
    yield "there is no C++ compiler (/nonexistent/c++); install g++ or clang, or name one: CXX=..."
    build._library.cache_clear()


@pytest.mark.parametrize(
    "choose",
    [
        lambda name: accelerate(SGD(), name, CPU, torch.float32),
        lambda name: MetaTraining(small_lstm(), FAMILY, backend=name),
    ],
)
def test_an_unknown_backend_is_refused(choose: Any) -> None:
    expected = r"backend \('fast'\) must be one of auto, eager, compiled, fused, fused-bf16"
    with pytest.raises(ValueError, match=expected):
        choose("fast")


def test_every_backend_holds_the_very_rule() -> None:
    rule = small_lstm()
    assert accelerate(rule, "eager", CPU, torch.float32) == (rule, "eager")
    for name in ("auto", "fused"):
        accelerated = accelerate(rule, name, CPU, torch.float32)
        assert isinstance(accelerated.rule, FusedRule)
        assert accelerated.rule.rule is rule
        assert [*accelerated.rule.parameters()] == [*rule.parameters()]
        assert accelerated.description == f"fused (C++ {build.instruction_set()})"


@pytest.mark.parametrize(("make", "reason"), UNSUPPORTED)
def test_a_rule_without_a_kernel_is_refused_if_one_was_asked_for(make: Any, reason: str) -> None:
    for name in ("fused", "fused-bf16"):
        with pytest.raises(ValueError, match=reason):
            accelerate(make(), name, CPU, torch.float32)


@pytest.mark.parametrize(("make", "reason"), UNSUPPORTED)
def test_a_rule_without_a_kernel_is_eager_by_default_and_says_why(
    make: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    rule = make()
    accelerated = accelerate(rule, "auto", CPU, torch.float32)
    assert accelerated.rule is rule
    with pytest.raises(ValueError, match=reason) as caught:
        accelerate(rule, "fused", CPU, torch.float32)
    assert accelerated.description == f"eager ({caught.value})"
    assert caplog.records == []  # it is no fault of the machine


def test_double_precision_is_eager_unless_asked_for() -> None:
    rule = small_lstm().double()
    accelerated = accelerate(rule, "auto", CPU, torch.float64)
    assert accelerated == (rule, "eager (fused kernels are for float32, not torch.float64)")
    assert isinstance(accelerate(rule, "fused", CPU, torch.float64).rule, FusedRule)


def test_a_device_without_a_kernel_says_so() -> None:
    rule, device = small_lstm(), torch.device("meta")
    assert accelerate(rule, "auto", device, torch.float32).rule is rule
    with pytest.raises(KernelUnavailableError, match="no fused kernel for meta devices"):
        accelerate(rule, "fused", device, torch.float32)


def test_bfloat16_on_a_cpu_without_it_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "instruction_set", lambda: "AVX2")
    with pytest.raises(KernelUnavailableError, match=r"\(AVX2\).*bfloat16.*use backend 'fused'"):
        accelerate(small_lstm(), "fused-bf16", CPU, torch.float32)
    assert isinstance(accelerate(small_lstm(), "fused", CPU, torch.float32).rule, FusedRule)


def window_gradient(rule: UpdateRule, name: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses and the meta-gradient of one window from the start."""
    (batch,) = draw_windows(FAMILY, Schedule(horizon=8, window=8), 1, range(6), dtype)
    accelerated = accelerate(rule, name, CPU, dtype).rule
    estimate = TruncatedBPTT()(accelerated, FAMILY, begin(rule, batch, None), batch)
    return estimate.rollout.losses.detach(), phi_gradient(rule, estimate.surrogate)


def small() -> CoordinatewiseLSTM:
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=8, layers=2, features=LogSign(), output_scale=1.0)


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("auto", torch.float32, 1e-5),
        ("fused", torch.float32, 1e-5),
        ("fused", torch.float64, 1e-12),
        ("fused-bf16", torch.float32, 3e-2),
    ],
)
def test_every_backend_equals_eager(name: str, dtype: torch.dtype, tolerance: float) -> None:
    if name == "fused-bf16" and build.instruction_set() != build.BFLOAT16:
        pytest.skip("this CPU has no products of bfloat16")
    rule = small().to(dtype)
    expected, results = window_gradient(rule, "eager", dtype), window_gradient(rule, name, dtype)
    for value, truth in zip(results, expected, strict=True):
        assert (value - truth).norm() <= tolerance * truth.norm()
    if name == "fused-bf16":
        assert (results[1] - expected[1]).norm() > 1e-5 * expected[1].norm()  # it is not ignored


@pytest.mark.slow
def test_the_compiled_backend_equals_eager() -> None:
    rule = small()
    accelerated = accelerate(rule, "compiled", CPU, torch.float32)
    assert isinstance(accelerated.rule, CompiledRule)
    assert accelerated.description == "compiled by torch"
    assert [*accelerated.rule.parameters()] == [*rule.parameters()]
    expected = window_gradient(rule, "eager", torch.float32)
    for value, truth in zip(window_gradient(rule, "compiled", torch.float32), expected, strict=True):
        assert (value - truth).norm() <= 1e-5 * truth.norm()


def fit(folder: Path, *arguments: str) -> str:
    common = ["--trainer.enable_progress_bar=false", "--trainer.max_steps=25", "--run_dir", str(folder)]
    main(["fit", "-c", str(SMOKE), *common, *arguments])
    return (folder / "metrics.csv").read_text()


def test_training_runs_eagerly_without_a_compiler_and_says_so_once(
    no_compiler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path / "run")
    assert f"backend eager ({no_compiler})" in capsys.readouterr().out
    accelerate(small_lstm(), "auto", CPU, torch.float32)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"learned rules run without a fused kernel, several times slower: {no_compiler}"]


def test_a_fused_backend_without_a_compiler_stops_with_the_way_out(
    no_compiler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KernelUnavailableError) as caught:
        accelerate(small_lstm(), "fused", CPU, torch.float32)
    assert str(caught.value) == no_compiler
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", "--model.backend=fused")
    assert capsys.readouterr().err.splitlines()[-1] == f"l2l-scale fit: {no_compiler}"
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


def test_the_command_line_chooses_the_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {}
    for name in ("eager", "fused"):
        output = fit(tmp_path / name, f"--model.backend={name}", "--trainer.log_every_n_steps=1")
        header, *lines = output.splitlines()
        column = header.split(",").index("train/loss")
        losses = [float(line.split(",")[column]) for line in lines if line.split(",")[column]]
        rows[name] = torch.tensor(losses, dtype=torch.float64)
        described = f"fused (C++ {build.instruction_set()})" if name == "fused" else "eager"
        assert f"backend {described}," in capsys.readouterr().out
    assert len(rows["eager"]) == 25
    assert torch.allclose(rows["fused"][:10], rows["eager"][:10], rtol=1e-5, atol=0)


def test_a_run_and_its_checkpoint_know_nothing_of_the_backend(tmp_path: Path) -> None:
    checkpoints, slots = {}, {}
    for name in ("eager", "fused"):
        fit(tmp_path / name, f"--model.backend={name}")
        last = tmp_path / name / "checkpoints" / "last"
        checkpoints[name] = read_tensors(last / TRAINING)
        slots[name] = read_tensors(last / slots_file(0, 1))
    eager, fused = checkpoints["eager"], checkpoints["fused"]
    assert eager["state_dict"].keys() == fused["state_dict"].keys()
    assert eager["l2l_scale"]["rule"] == fused["l2l_scale"]["rule"]
    shapes = [[leaf.shape for leaf in slots[name][0][""]["leaves"]] for name in slots]
    assert shapes[0] == shapes[1]


def held_out(name: Any) -> HeldOut:
    return HeldOut(family=FAMILY, seed=0, split=Split.TEST, num_tasks=7, inner_steps=12, backend=name)


def test_evaluation_uses_the_backend() -> None:
    rule = small()
    assert isinstance(held_out("auto").accelerate(rule), FusedRule)
    assert isinstance(held_out("fused").accelerate(rule), FusedRule)
    assert held_out("eager").accelerate(rule) is rule
    classic = SGD()
    assert held_out("fused").accelerate(classic) is classic  # there is nothing learned to be computed
    eager, fused = (loss_curves(rule, held_out(name)) for name in ("eager", "fused"))
    assert eager.shape == (13, 7)
    assert not torch.equal(eager, fused)
    assert (eager - fused).norm() <= 1e-5 * eager.norm()


def test_fused_curves_do_not_depend_on_how_tasks_are_grouped() -> None:
    rule, whole = small(), held_out("fused")
    assert torch.equal(loss_curves(rule, whole), loss_curves(rule, replace(whole, max_coordinates=10)))


@pytest.mark.parametrize(
    ("name", "own", "theta"),
    [
        ("fused", torch.float16, torch.float16),
        ("fused", torch.float64, torch.float32),
        ("fused-bf16", torch.float64, torch.float64),
    ],
)
def test_a_precision_that_no_kernel_has_is_refused(name: Any, own: torch.dtype, theta: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"backend \('{name}'\) computes in torch.float32"):
        accelerate(small().to(own), name, CPU, theta)
