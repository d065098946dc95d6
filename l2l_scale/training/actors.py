"""Starts and stops the sampling actors of a rank: one Ray for each node, which its ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L
import torch.distributed as dist

from l2l_scale.cores import available_cores
from l2l_scale.sampling import PoolSettings, RankSampler

if TYPE_CHECKING:
    from l2l_scale.sampling.pool import RayNode, SamplerPool


class Actors:
    """The pool of this rank, and the Ray that it lives in.

    Args:
        settings: of the pool.
    """

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.pool: SamplerPool | None = None

    def check(self, ranks_per_node: int) -> None:
        """Refuse what cannot work, before anything is started.

        Raises:
            ValueError: if there are more actors than CPUs, or the cluster does not answer.
        """
        if self.settings.num_actors == 0:
            return
        if self.settings.ray_address is None:
            self.settings.check_cpus(ranks_per_node, available_cores(), "of this machine")
        else:
            self.settings.prepare_environment()
            from l2l_scale.sampling.pool import check_cluster

            check_cluster(self.settings.ray_address)

    def start(self, sampler: RankSampler, trainer: L.Trainer | None) -> SamplerPool:
        """Collective. Start the actors; Ray as well, on the first rank of a node, if it is to be our own."""
        self.stop()
        self.settings.prepare_environment()
        from l2l_scale.sampling import pool

        ranks = 1 if trainer is None else trainer.num_devices
        if self.settings.ray_address is not None:
            pool.join_ray(pool.RayNode(self.settings.ray_address, None))
            ranks = 1 if trainer is None else trainer.world_size
        elif trainer is None or trainer.world_size == 1:
            pool.start_ray()
        else:
            own: RayNode | str | None = None
            if trainer.local_rank == 0:
                try:
                    own = pool.start_ray()
                except Exception as error:  # to be told to the others, who wait
                    own = str(error)
            node = _from_first_rank_of_node(own, trainer)
            if trainer.local_rank != 0:
                pool.join_ray(node)
        try:
            self.pool = pool.SamplerPool(sampler, self.settings, ranks)
        except BaseException:  # Ctrl-C as well
            pool.stop_ray()
            raise
        return self.pool

    def stop(self) -> None:
        """End the actors, and the Ray that this rank started."""
        if self.pool is not None:
            from l2l_scale.sampling.pool import stop_ray

            self.pool.close()
            self.pool = None
            stop_ray()

    def stop_together(self, trainer: L.Trainer) -> None:
        """Collective. The same at the end of a run: a rank whose Ray is taken away under it would die."""
        if trainer.local_rank != 0:
            self.stop()
        if self.settings.num_actors > 0:
            trainer.strategy.barrier()
        self.stop()


def _from_first_rank_of_node(own: RayNode | str | None, trainer: L.Trainer) -> RayNode:
    """Collective. The Ray of this node.

    Args:
        own: what the first rank of each node started, or why it failed; None on the others.
        trainer: knows who is where.

    Raises:
        RuntimeError: on all ranks, if Ray did not start on some node.
    """
    everyone: list[tuple[int, RayNode | str | None]] = [(0, None)] * trainer.world_size
    dist.all_gather_object(everyone, (trainer.node_rank, own))
    for node, found in everyone:
        if isinstance(found, str):
            raise RuntimeError(f"Ray did not start on node {node}: {found}")
    return next(
        found
        for node, found in everyone
        if node == trainer.node_rank and found is not None and not isinstance(found, str)
    )
