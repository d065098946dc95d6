"""How much memory this process may have: what the machine has left, and what the job was given of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def resident_bytes() -> int:
    """What the process holds now."""
    return int(psutil.Process().memory_info().rss)


def host_available() -> int:
    """Bytes of host memory that the processes of a run can come to, with what this one already holds.

    The least of what the machine has left, what is left in the cgroups of the process (version 1 or 2), and
    what SLURM gave the job on this node.
    """
    left = [int(psutil.virtual_memory().available), *cgroups_left(_CGROUPS, _MEMBERSHIP)]
    return min(min(left) + resident_bytes(), *slurm_given(os.environ), 1 << 62)


def device_available(device: torch.device) -> int | None:
    """Bytes of GPU memory that are free; None if that GPU is not here. Starts CUDA."""
    return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None


def cgroups_left(root: Path, membership: Path) -> Iterator[int]:
    """Bytes that are left in every cgroup with a limit that the process is in."""
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        here = top / path.lstrip("/")
        # In a container the path may be that of the host; then its own cgroup is at the top.
        for folder in (here, *here.parents):
            if folder.is_relative_to(top) and (folder / names[0]).is_file():
                yield from _left(folder, *names)


def _left(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    limit = (folder / limit_name).read_text().strip()
    if limit != "max":
        usage = int((folder / usage_name).read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cache = int(fields.get(cache_name, 0))  # pages of files, which the kernel gives up when it must
        yield max(int(limit) - usage + cache, 0)


def slurm_given(environment: Mapping[str, str]) -> Iterator[int]:
    """Bytes that SLURM gave the job on this node, if it says so (0 is the whole node)."""
    per_node = int(environment.get("SLURM_MEM_PER_NODE", 0))
    per_cpu = int(environment.get("SLURM_MEM_PER_CPU", 0)) * int(environment.get("SLURM_CPUS_ON_NODE", 0))
    yield from (megabytes << 20 for megabytes in (per_node, per_cpu) if megabytes)
