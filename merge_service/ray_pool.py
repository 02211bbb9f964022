"""Ray's side of a merge's workers: actors that may die, as many as fit the nodes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from datamerge.runtime.memory import free_memory
from datamerge.runtime.messages import warn
from datamerge.runtime.ray import call_in_worker
from merge_service.failures import cause_of_death, remedy_of_starts
from merge_service.planning import Items
from merge_service.sample_groups import Partial
from merge_service.work_queue import Piece
from merge_service.worker import ShardWorker, WorkerSetup
from merge_service.worker_memory import WorkerMemory
from storage_schemas import DatamergeError

# Failures after which a shard is set aside, or a worker that never starts ends the job.
TRIES = 3
# A worker holds the piece it attacks, and one that it writes or decodes meanwhile.
PIECES_PER_WORKER = 2
# How often the cluster is looked at for nodes that came or went.
LOOK_SECONDS = 5.0
# How long a first worker may take until it is missed.
START_SECONDS = 60


class RayWorker(ShardWorker):
    """A worker that reports its node, and keeps large results away from the driver."""

    def begin(self) -> str:
        """Prepare; returns the node's id."""
        self.prepare()
        return str(ray.get_runtime_context().get_node_id())

    def _machine(self) -> tuple[float, float]:
        """CPUs and GPUs of this node, as Ray deals them out; a worker of a GPU does not see the others."""
        here = ray.get_runtime_context().get_node_id()
        resources: dict[str, float] = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
        return resources.get("CPU", 1), resources.get("GPU", 0)

    def part_apart(self, items: Items) -> tuple[None, Partial]:
        """`part`, as two results: one to wait for, and the moments, which only `complete` fetches."""
        return None, self.part(items)


def _actor_class() -> Any:
    """A Ray actor around a `RayWorker`. It is nested, so that Ray sends it as code; see `call_in_worker`."""

    class _RayWorker:
        def __init__(self, make: Callable[[], RayWorker]) -> None:
            self._make = make

        def begin(self) -> str:
            try:
                self._worker = self._make()
                return self._worker.begin()
            except SystemExit as end:  # of a module that is imported; Ray would end the worker and not say why
                raise ImportError(f"code that was loaded ended its process (SystemExit: {end})") from end

        def call(self, method: str, *args: Any) -> Any:
            try:
                return getattr(self._worker, method)(*args)
            except SystemExit as end:
                raise ValueError(
                    f"code of the encoder's or the source's ended its process (SystemExit: {end})"
                ) from end

    return ray.remote(_RayWorker)


@dataclass(eq=False)
class Worker:
    """An actor, the start it is in, and what it holds."""

    actor: Any
    starting: Any
    node: str | None = None
    running: dict[Any, Piece] = field(default_factory=dict)


class Pool:
    """Workers on a cluster: replaced when they die, more when nodes join."""

    def __init__(self, setup: WorkerSetup, memory: WorkerMemory | None) -> None:
        config = setup.config
        self._memory, self._said = memory, ""
        # Of this machine, before there are workers; for a cluster's nodes Ray says it.
        self._free = free_memory() if config.ray_address is None else None
        self._gpus = (config.num_gpus or 1.0) if setup.device.startswith("cuda") else 0.0
        self._cpus, self._limit = config.cpus, config.max_workers
        self._make = call_in_worker(f"{RayWorker.__module__}:{RayWorker.__name__}", setup)
        self._failed_starts, self.workers = 0, list[Worker]()
        self._looked = self._worked = time.monotonic()
        self._class = _actor_class()
        self._options = {
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": PIECES_PER_WORKER,
            "scheduling_strategy": "SPREAD",
        }

    def fit(self, wanted: int) -> None:
        """Start workers until there are as many as fit the cluster, are allowed, and have work."""
        now = time.monotonic()
        if self.workers and now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        resources = ray.cluster_resources()
        fitting = int(resources.get("CPU", 1)) // self._cpus
        if self._gpus:
            fitting = min(fitting, int(resources.get("GPU", 0) / self._gpus + 1e-9))
        # One is asked for even where none fits: an autoscaler may add a node for it.
        target = min(max(1, fitting), self._limit or max(1, fitting), max(1, wanted))
        if self._memory is not None:
            target = self._with_room(self._memory, target)
        while len(self.workers) < target:
            # By value, not through ray.put: a later worker must not depend on an object that died with a node.
            actor = self._class.options(**self._options).remote(self._make)
            self.workers.append(Worker(actor, actor.begin.remote()))
        if any(worker.starting is None for worker in self.workers):
            self._worked = now
        elif now - self._worked > START_SECONDS:
            self._worked = now
            warn(
                f"no worker has started yet; one needs {self._cpus} CPU and {self._gpus:g} GPU, the cluster has "
                f"{resources.get('CPU', 0):g} and {resources.get('GPU', 0):g} in all"
            )

    def _with_room(self, memory: WorkerMemory, wanted: int) -> int:
        """How many of so many workers the nodes have memory for, one in any case; says so where it is not all."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room, short = 0, ""
        for node in nodes:
            free = self._free if len(nodes) == 1 and self._free is not None else node.get("memory", math.inf)
            if most := min(int(node.get("CPU", 0)) // self._cpus, wanted):
                room += memory.fitting(free, most)
                short = short or memory.shortage(free, most) or ""
        if short and short != self._said and (len(nodes) == 1 or room < wanted):
            self._said = short
            warn(short)
        return min(wanted, max(1, room))

    def started(self, worker: Worker) -> None:
        """Record that a worker is ready; raises the error of its start."""
        worker.node, worker.starting = ray.get(worker.starting), None
        self._failed_starts = 0

    def lost(self, worker: Worker, error: RayActorError) -> bool:
        """Drop a dead worker; returns whether its node went too, which is not its work's fault.

        Raises:
            DatamergeError: workers keep dying before they are ready.
        """
        self.workers.remove(worker)
        self._looked = 0.0
        ray.kill(worker.actor)  # it may only be out of reach
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        gone = bool(getattr(error, "preempted", False)) or (worker.node is not None and worker.node not in alive)
        if worker.starting is not None:
            self._failed_starts += 1
            if self._failed_starts >= TRIES:
                cause = cause_of_death(error)
                raise DatamergeError(
                    f"{TRIES} workers in a row died while they started ({cause}); "
                    f"{remedy_of_starts(cause, Path.cwd())}, and run the same command again"
                )
        return gone

    def close(self) -> None:
        for worker in self.workers:
            ray.kill(worker.actor)
