"""How windows are drawn: in the trainer's process, or ahead by a pool of Ray actors."""

from __future__ import annotations

import os
from dataclasses import dataclass

from l2l_scale.checks import check_count, check_positive


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """The pool of every rank.

    Args:
        num_actors: processes that draw windows ahead, for each rank; 0 draws them in the trainer's own
            process. What is drawn is the same.
        depth: windows that are drawn ahead at most, for each rank.
        cpus_per_actor: CPUs that an actor counts for; with less than 1 actors share cores.
        ray_address: HOST:PORT of a Ray cluster that is already there, whose machines then draw. If not
            given, every node starts its own Ray, bound to loopback, and stops it at the end.

    Raises:
        ValueError: if a number is out of range, or the address has no port.
    """

    num_actors: int = 0
    depth: int = 4
    cpus_per_actor: float = 1.0
    ray_address: str | None = None

    def __post_init__(self) -> None:
        check_count("num_actors", self.num_actors, least=0)
        check_count("depth", self.depth)
        check_positive("cpus_per_actor", self.cpus_per_actor)
        if self.ray_address is not None and not self.ray_address.rpartition(":")[2].isdigit():
            raise ValueError(f"ray_address ({self.ray_address}) must be HOST:PORT, as `ray start` prints it")

    def prepare_environment(self) -> None:
        """Set what Ray reads when it is imported, unless the user has set it: before the pool is imported.

        No telemetry. A Ray of our own asks for a token, else anyone on the host could run code through it,
        and binds to loopback instead of all interfaces (what the name of that variable says is beside
        the point).
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self.ray_address is None:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

    def check_cpus(self, ranks: int, cpus: float, where: str) -> None:
        """Raise ``ValueError`` if the actors of so many ranks do not fit on so many CPUs.

        Args:
            ranks: that share the CPUs.
            cpus: how many there are.
            where: names the place.
        """
        wanted = self.num_actors * ranks * self.cpus_per_actor
        if wanted > cpus:
            of_ranks = f" on each of {ranks} ranks" if ranks > 1 else ""
            fits = int(cpus / self.cpus_per_actor / ranks)
            raise ValueError(
                f"num_actors ({self.num_actors}){of_ranks}, {self.cpus_per_actor:g} CPUs each, must not need "
                f"more than the {cpus:g} CPUs {where}; num_actors={fits} fits, and a smaller "
                "cpus_per_actor lets actors share them"
            )
