"""The pool of a merge's Ray workers: starts as many as the nodes have room for, and replaces those that die."""

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

# Failures after which a shard is given up, and failed starts in a row after which the job ends.
TRIES = 3
# A worker attacks one piece while it writes or decodes another.
PIECES_PER_WORKER = 2
# Interval between checks for nodes that joined or left.
LOOK_SECONDS = 5.0
# Time after which the user is warned that no worker has started.
START_SECONDS = 60


class RayWorker(ShardWorker):
    """A worker that reports its node, and keeps large results away from the driver."""

    def begin(self) -> str:
        """Prepare the worker; returns the id of its node."""
        self.prepare()
        return str(ray.get_runtime_context().get_node_id())

    def _machine(self) -> tuple[float, float]:
        """CPUs and GPUs of this node, from Ray: a worker sees only the GPUs that it was assigned."""
        here = ray.get_runtime_context().get_node_id()
        resources: dict[str, float] = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
        return resources.get("CPU", 1), resources.get("GPU", 0)

    def part_apart(self, items: Items) -> tuple[None, Partial]:
        """`part` as two Ray objects: one that signals the end, and the moments, which only `complete` fetches."""
        return None, self.part(items)


def _actor_class() -> Any:
    """A Ray actor class around a `RayWorker`; nested, so that Ray pickles it by value (see `call_in_worker`)."""

    class _RayWorker:
        def __init__(self, make: Callable[[], RayWorker]) -> None:
            self._make = make

        def begin(self) -> str:
            try:
                self._worker = self._make()
                return self._worker.begin()
            except SystemExit as end:  # raised by an imported module; Ray would end the worker without a reason
                raise ImportError(f"imported code called exit (SystemExit: {end})") from end

        def call(self, method: str, *args: Any) -> Any:
            try:
                return getattr(self._worker, method)(*args)
            except SystemExit as end:
                raise ValueError(f"code of the encoder or of the source called exit (SystemExit: {end})") from end

    return ray.remote(_RayWorker)


@dataclass(eq=False)
class Worker:
    """An actor, the reference of its start (None once it is ready), and the pieces that it holds."""

    actor: Any
    starting: Any
    node: str | None = None
    running: dict[Any, Piece] = field(default_factory=dict)


class Pool:
    """Workers on a cluster; dead ones are replaced, and nodes that join get some too."""

    def __init__(self, setup: WorkerSetup, memory: WorkerMemory | None) -> None:
        config = setup.config
        self._memory, self._said = memory, ""
        # Free memory of this machine before workers start; Ray reports that of a cluster's nodes.
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

    def fit(self, pieces: int) -> None:
        """Start as many workers as the cluster has room for and the settings allow, at most one per piece."""
        now = time.monotonic()
        if self.workers and now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        resources = ray.cluster_resources()
        fitting = int(resources.get("CPU", 1)) // self._cpus
        if self._gpus:
            fitting = min(fitting, int(resources.get("GPU", 0) / self._gpus + 1e-9))
        # Request one even where none fits: an autoscaler may add a node for it.
        target = min(max(1, fitting), self._limit or max(1, fitting), max(1, pieces))
        if self._memory is not None:
            target = self._with_room(self._memory, target)
        while len(self.workers) < target:
            # Passed by value, not through ray.put: an object may be lost with its node before a later worker starts.
            actor = self._class.options(**self._options).remote(self._make)
            self.workers.append(Worker(actor, actor.begin.remote()))
        if any(worker.starting is None for worker in self.workers):
            self._worked = now
        elif now - self._worked > START_SECONDS:
            self._worked = now
            warn(
                f"no worker has started yet: one needs {self._cpus} CPU and {self._gpus:g} GPU, the cluster has "
                f"{resources.get('CPU', 0):g} and {resources.get('GPU', 0):g} in all"
            )

    def _with_room(self, memory: WorkerMemory, wanted: int) -> int:
        """How many of the wanted workers the nodes have memory for, at least one; warns if it is not all of them."""
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
        """Mark a worker as ready, or raise the error of its start."""
        worker.node, worker.starting = ray.get(worker.starting), None
        self._failed_starts = 0

    def lost(self, worker: Worker, error: RayActorError) -> bool:
        """Drop a dead worker; returns whether its node is gone too, in which case its work is not to blame.

        Raises:
            DatamergeError: workers keep dying before they are ready.
        """
        self.workers.remove(worker)
        self._looked = 0.0
        ray.kill(worker.actor)  # it may be alive and only unreachable
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
