"""Builds the C++ kernel on first use: one source, one compiler call, kept for all later processes.

The source needs no header of torch, so it compiles in seconds and a built library serves every torch version.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import get_cxx_compiler

_COMPILER: str = get_cxx_compiler() or "c++"  # type: ignore[no-untyped-call]  # or "ccache g++", say
_LOG = logging.getLogger(__name__)
_SOURCES = Path(__file__).parent / "cpp"
_FLAGS = [
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
]
_THREADS = ["-fopenmp"]
BFLOAT16 = "AVX512_BF16"
"""The instruction set that has products of bfloat16."""
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
_INSTRUCTION_SETS = {"AVX2": _AVX2, "AVX512": _AVX512, BFLOAT16: [*_AVX512, "-mavx512bf16"]}


class KernelUnavailableError(RuntimeError):
    """The kernel could not be built or loaded here; says why."""


def instruction_set() -> str:
    """What the kernel is built for: that of torch's own kernels (so ATEN_CPU_CAPABILITY=avx2 lowers both)."""
    name = torch.backends.cpu.get_cpu_capability()
    return BFLOAT16 if name == "AVX512" and torch.cpu._is_avx512_bf16_supported() else name


def library() -> ctypes.CDLL:
    """The kernel's library, built if this machine has not built it before.

    Raises:
        KernelUnavailableError: if there is no C++ compiler, or it fails, or what it built cannot be loaded.
    """
    result = _library()
    if isinstance(result, str):
        raise KernelUnavailableError(result)
    return result


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why there is none: nobody waits twice for a compiler that fails."""
    try:
        return _loaded()
    except KernelUnavailableError as error:
        return str(error)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        return f"the fused kernel cannot be built or loaded: {error}"


def _loaded() -> ctypes.CDLL:
    """Load what was built before, else build; whoever comes while another process builds waits for it."""
    target = _folder() / f"kernel_{instruction_set().lower()}_{_digest()}.so"
    with suppress(OSError):  # not there yet, or cut short when the machine went down: then it is replaced
        return ctypes.CDLL(str(target))
    with FileLock(target.with_suffix(".lock")):  # given up by the system when its holder dies
        with suppress(OSError):  # another process has built it meanwhile
            return ctypes.CDLL(str(target))
        compile_library(target)
    return ctypes.CDLL(str(target))


def compile_library(target: Path) -> None:
    """Compile for this machine's instruction set, beside ``target``, and rename: it is whole or not there.

    Raises:
        KernelUnavailableError: if the compiler is missing or fails.
    """
    if shutil.which(shlex.split(_COMPILER)[0]) is None:
        raise KernelUnavailableError(
            f"there is no C++ compiler ({_COMPILER}); install g++ or clang, or name one: CXX=..."
        )
    _LOG.warning("building the fused %s kernel, once (some seconds): %s", instruction_set(), target)
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    built = Path(name)
    flags = [*_FLAGS, *_INSTRUCTION_SETS.get(instruction_set(), [])]
    try:
        try:
            _compile([*flags, *_THREADS], built)
            ctypes.CDLL(str(built))
        except (subprocess.CalledProcessError, OSError):  # no OpenMP, or not its library: then one thread
            _compile(flags, built)
        built.replace(target)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [error.stderr[-200:]]
        raise KernelUnavailableError(
            f"the C++ compiler ({_COMPILER}) failed: {lines[0]}; name another one: CXX=..."
        ) from error
    finally:
        built.unlink(missing_ok=True)


def _compile(flags: list[str], output: Path) -> None:
    command = [*shlex.split(_COMPILER), *flags, str(_SOURCES / "kernel.cpp"), "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")


def _digest() -> str:
    """Of everything that decides what is built."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.[hc]*")):
        digest.update(path.read_bytes())
    system = [sys.platform, platform.machine()]  # homes are shared between machines
    digest.update(repr([_FLAGS, _THREADS, _INSTRUCTION_SETS, _COMPILER, system]).encode())
    return digest.hexdigest()[:16]


def _folder() -> Path:
    """The user's cache, or a temporary folder of the user's own where that cannot be written."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = base / "l2l_scale" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        pass
    folder = Path(tempfile.gettempdir()) / f"l2l_scale_kernels_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise KernelUnavailableError(f"{folder} belongs to another user, whose code must not be loaded")
    return folder
