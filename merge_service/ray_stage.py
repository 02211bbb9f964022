"""The one file that knows Ray: shards out, results in, workers that may die."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

# Read when ray is imported: no usage reports, no hiding of GPUs from workers that ask for none.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
from ray.exceptions import RayActorError, RayTaskError

from merge_service.planning import ShardTask
from merge_service.work import ShardResult, ShardWorker, WorkerSetup
from storage_schemas import ConfigError, DatamergeError

RETRIES = 3
# Tasks are small lists of names; results are counts. Nothing large goes through the object store.
OBJECT_STORE_BYTES = 128 * 2**20


def start(address: str | None, workers: int | None, threads: int) -> None:
    """Connect to a cluster, or start Ray on this machine.

    Raises:
        ConfigError: no cluster at the address.
    """
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"ray_address {address!r}: expected a Ray cluster, found none ({error})") from None
        return
    cpus = max(os.cpu_count() or 1, (workers or 1) * threads)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)


def stop() -> None:
    ray.shutdown()


def worker_count(requested: int | None, threads: int, gpus: bool, tasks: int) -> int:
    """Workers that fit the cluster: one a GPU, or as many as its CPUs hold; never more than there is work."""
    resources = ray.cluster_resources()
    fitting = int(resources.get("GPU", 0)) if gpus else int(resources.get("CPU", 1)) // threads
    return max(1, min(requested or fitting, tasks))


def run_shards(tasks: Sequence[ShardTask], setup: WorkerSetup, workers: int, gpus: bool) -> Iterator[ShardResult]:
    """Run every task on a pool of actors, yielding results as they come, in any order.

    An actor that dies is restarted and its task retried, `RETRIES` times.

    Raises:
        DatamergeError: a task kept killing its workers.
        Whatever a task raises itself.
    """
    actor_class = ray.remote(
        num_cpus=setup.config.threads,
        num_gpus=1 if gpus else 0,
        max_restarts=-1,
        max_task_retries=RETRIES,
    )(ShardWorker)
    # By value, not through ray.put: a restarted actor must not depend on an object that died with a node.
    actors: list[Any] = [actor_class.remote(setup) for _ in range(workers)]
    waiting = iter(tasks)
    running: dict[Any, tuple[Any, ShardTask]] = {}

    def submit(actor: Any) -> None:
        task = next(waiting, None)
        if task is not None:
            running[actor.run.remote(task)] = (actor, task)

    # Two tasks per actor: the next one is there when the first ends.
    for actor in [*actors, *actors]:
        submit(actor)
    try:
        while running:
            (ready, *_), _ = ray.wait(list(running))
            actor, task = running.pop(ready)
            try:
                result: ShardResult = ray.get(ready)
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except RayActorError as error:
                raise DatamergeError(
                    f"shard {task.shard:05d}: its worker died {RETRIES + 1} times ({_first_line(error)}); the "
                    "other shards are kept, run the same command again to retry"
                ) from None
            submit(actor)
            yield result
    finally:
        for actor in actors:
            ray.kill(actor)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
