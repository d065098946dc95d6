"""Building the kernel: once, by one process, with any compiler or with none.

A shell script stands in for the compiler where it does not matter what is compiled: it copies the library.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from l2l_scale.optimizers import Concatenate, CoordinatewiseLSTM, LogSign, RNNprop, TanhExp
from l2l_scale.optimizers.kernels import KernelUnavailableError, NativeKernel, build, program_of
from l2l_scale.optimizers.kernels.layout import pack
from l2l_scale.optimizers.kernels.program import flat_weights

BUILD = "from l2l_scale.optimizers.kernels.build import library; library()"


class Workshop:
    """An empty cache, and compilers that write down every call."""

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder, self.cache, self.library = folder, folder / "cache", library
        self.log = folder / "calls"

    def compiler(self, before: str = "", name: str = "compiler") -> str:
        """A script that runs some shell commands and then delivers the library."""
        script = self.folder / name
        deliver = f'for last; do :; done\ncp {shlex.quote(str(self.library))} "$last"'
        script.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(self.log))}\n{before}\n{deliver}\n')
        script.chmod(0o755)
        return str(script)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def built(self) -> list[Path]:
        return sorted(self.cache.rglob("*.so"))

    def start(self, compiler: str, code: str = BUILD) -> subprocess.Popen[str]:
        """Another process that builds."""
        env = {**os.environ, "CXX": compiler, "XDG_CACHE_HOME": str(self.cache)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, **pipes)


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    library = Path(build.library()._name)
    shop = Workshop(tmp_path, library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shop.cache))
    monkeypatch.setattr(build, "_COMPILER", shop.compiler())
    build._library.cache_clear()
    yield shop
    build._library.cache_clear()


def target() -> Path:
    return build._folder() / f"kernel_{build.instruction_set().lower()}_{build._digest()}.so"


def works() -> bool:
    """Whether a kernel made now computes."""
    rule = CoordinatewiseLSTM(hidden_size=3)
    grad = torch.ones(5)
    state = pack(rule.init_state(grad), grad.shape, 12)
    update = NativeKernel(program_of(rule)).step(flat_weights(rule).detach(), grad, state, state)
    return bool(
        (update - rule(grad, grad, rule.init_state(grad))[0]).abs().max() <= 1e-6 < update.abs().max()
    )


def test_a_kernel_is_built_once(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    assert works()
    assert [path.name for path in workshop.built] == [target().name]
    build._library.cache_clear()  # as in another process
    assert works()
    assert len(workshop.calls) == 1
    (notice,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert notice.startswith("building the fused ")
    assert "some seconds" in notice


def test_another_source_compiler_or_instruction_set_is_another_library(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [target()]
    monkeypatch.setattr(build, "_COMPILER", workshop.compiler(name="other"))
    paths.append(target())
    sources = workshop.folder / "cpp"
    sources.mkdir()
    for path in build._SOURCES.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "_SOURCES", sources)
    assert target() == paths[-1]
    with (sources / "simd.h").open("a") as file:
        file.write("// changed\n")
    paths.append(target())
    monkeypatch.setattr(build, "instruction_set", lambda: "OTHER")
    paths.append(target())
    monkeypatch.setattr(build.platform, "machine", lambda: "other")
    paths.append(target())
    assert len(set(paths)) == 5


def test_the_compiler_may_have_arguments(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_COMPILER", f"env WRAPPED=yes {workshop.compiler()} -DMINE")
    assert works()
    assert workshop.calls[0].startswith("-DMINE -O3")


@pytest.mark.parametrize(
    "refuse",
    ["echo 'error: unsupported option -fopenmp' >&2; exit 1", 'for last; do :; done; echo > "$last"; exit 0'],
)
def test_a_compiler_without_openmp_or_its_library_will_do(
    refuse: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = workshop.compiler(f'case "$*" in *-fopenmp*) {refuse};; esac')
    monkeypatch.setattr(build, "_COMPILER", compiler)
    assert works()
    assert ["-fopenmp" in call for call in workshop.calls] == [True, False]


def assert_unavailable(reason: str) -> None:
    for _ in range(2):
        with pytest.raises(KernelUnavailableError, match=reason):
            works()


@pytest.mark.parametrize("missing", [False, True])
def test_no_compiler_is_unavailable_and_says_the_way_out(
    missing: bool, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = workshop.folder / "none"
    if not missing:  # there is something of that name, but it may not be run
        script.write_text("#!/bin/sh\n")
        script.chmod(0o644)
    monkeypatch.setattr(build, "_COMPILER", str(script))
    assert_unavailable(rf"there is no C\+\+ compiler \({script}\); install g\+\+ or clang, or name one: CXX=")
    assert workshop.built == []


def test_a_compiler_that_fails_is_quoted_and_not_tried_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = "printf 'In file:\\nkernel.cpp:9: error: \\377 no such thing\\nmore' >&2; exit 1"
    monkeypatch.setattr(build, "_COMPILER", workshop.compiler(fail))
    assert_unavailable(
        r"the C\+\+ compiler \(.*\) failed: kernel.cpp:9: error: . no such thing; name another one: CXX="
    )
    assert len(workshop.calls) == 2  # with threads, and without
    assert workshop.built == []


def test_a_library_that_cannot_be_loaded_is_unavailable(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop.library = workshop.folder / "text"
    workshop.library.write_text("no library")
    workshop.compiler()
    assert_unavailable("the fused kernel cannot be built or loaded")


def test_what_a_dead_build_left_behind_is_no_obstacle(workshop: Workshop) -> None:
    target().write_bytes(b"")  # the machine went down before its content was on the disk
    target().with_suffix(".lock").touch()
    (target().parent / "tmp1234.so").write_bytes(b"half of it")
    assert works()
    assert len(workshop.calls) == 1
    assert target().stat().st_size > 10_000


def test_a_build_that_was_killed_is_no_obstacle(workshop: Workshop) -> None:
    process = workshop.start(workshop.compiler("sleep 60", name="slow"))
    deadline = time.monotonic() + 60
    while not workshop.calls and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # its compiler lives on
    process.wait()
    try:
        begun = time.monotonic()
        assert works()
        assert time.monotonic() - begun < 10
        assert len(workshop.calls) == 2
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_two_processes_at_once_compile_once(workshop: Workshop) -> None:
    compiler = workshop.compiler("sleep 2")
    processes = [workshop.start(compiler, f"{BUILD}; print('done')") for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["done\n"] * 2
    assert len(workshop.calls) == 1


@pytest.mark.parametrize("cause", ["not a folder", "no home"])
def test_without_a_cache_the_library_goes_to_a_temporary_folder(
    cause: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.tempfile, "tempdir", str(workshop.folder))
    if cause == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    assert works()
    folder = workshop.folder / f"l2l_scale_kernels_{os.getuid()}"
    assert target().parent == folder
    assert target().is_file()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_nothing_is_loaded_from_the_folder_of_another_user(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build.tempfile, "tempdir", str(workshop.folder))
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    (workshop.folder / "l2l_scale_kernels_12345").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(KernelUnavailableError, match="l2l_scale_kernels_12345 belongs to another user"):
        works()


NO_COMPILER = """
import torch
from l2l_scale.optimizers import CoordinatewiseLSTM
from l2l_scale.optimizers.backend import accelerate
rule = CoordinatewiseLSTM(hidden_size=3)
where = torch.device("cpu"), torch.float32
accelerated = accelerate(rule, "auto", *where)
assert accelerate(rule, "auto", *where) == accelerated
assert accelerated.rule is rule
print(accelerated.description)
try:
    accelerate(rule, "fused", *where)
except RuntimeError as error:
    print(error)
"""


def test_without_a_compiler_rules_run_eagerly_and_say_why(workshop: Workshop) -> None:
    output, errors = workshop.start("/nonexistent/c++", NO_COMPILER).communicate(timeout=120)
    reason = "there is no C++ compiler (/nonexistent/c++); install g++ or clang, or name one: CXX=..."
    assert output.splitlines() == [f"eager ({reason})", reason]
    assert errors == f"learned rules run without a fused kernel, several times slower: {reason}\n"


COMPUTE = """
import sys, torch
from l2l_scale.optimizers.kernels import NativeKernel
from l2l_scale.optimizers.kernels.build import instruction_set
program, inputs = torch.load(sys.argv[1], weights_only=False)
kernel, results = NativeKernel(program), {}
for dtype in (torch.float32, torch.float64):
    weights, grads, loss_weights, state, d_state = (x.to(dtype) for x in inputs)
    after = torch.empty_like(state)
    update = kernel.step(weights, grads[0], state, after)
    step = kernel.step_gradient(weights, grads[0], state, grads[1], d_state)
    results[dtype] = [update, after, *step, kernel.window_gradient(weights, grads, loss_weights, state)]
torch.save((instruction_set(), results), sys.argv[2])
"""


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_every_instruction_set_gives_the_same_numbers(
    capability: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    torch.manual_seed(0)
    features = Concatenate([LogSign(), RNNprop(log_scale=True)])
    rule = CoordinatewiseLSTM(7, 2, features, TanhExp(), output_scale=1.0)
    program, grads = program_of(rule), torch.randn(4, 75)
    state = pack(rule.init_state(grads[0].view(3, 25)), torch.Size((3, 25)), program.state_rows)
    inputs = flat_weights(rule).detach(), grads, torch.rand(3, 3), state, torch.randn_like(state)
    torch.save((program, inputs), tmp_path / "inputs.pt")

    arguments = ["-c", str(tmp_path / "inputs.pt"), str(tmp_path / "results.pt")]
    monkeypatch.setattr(sys, "argv", arguments)
    exec(COMPUTE, {})
    _, expected = torch.load(arguments[2], weights_only=False)
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", COMPUTE, *arguments[1:]], env=env, check=True, timeout=300)
    used, results = torch.load(arguments[2], weights_only=False)
    assert used == capability.upper()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        lanes = torch.ones_like(state, dtype=torch.bool)
        lanes[-1, :, 75 % 32 :] = False  # beyond the last coordinate
        for value, truth in zip(results[dtype], expected[torch.float64], strict=True):
            if truth.shape == state.shape:
                value, truth = value[lanes], truth[lanes]
            assert (value.double() - truth).norm() <= tolerance * truth.norm()
