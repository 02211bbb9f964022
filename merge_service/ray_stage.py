"""Runs the work on Ray: hands pieces to a pool of workers and yields their results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from datamerge.runtime.messages import first_line, say, warn
from datamerge.runtime.ray import connected
from datamerge.sources.columns import Samples
from merge_service.config import MergeConfig
from merge_service.failures import cause_of_death, explain, is_hopeless, is_lasting
from merge_service.grouping import Places
from merge_service.planning import Plan
from merge_service.ray_pool import LOOK_SECONDS, PIECES_PER_WORKER, TRIES, Pool, Worker
from merge_service.work_queue import GivenUp, Piece, WorkQueue
from merge_service.worker import ShardResult, WorkerSetup
from merge_service.worker_memory import WorkerMemory
from storage_schemas import DatamergeError

# Number of different shards that fail in a row, before and after the first success, at which the job stops.
MOST_FAILING, MOST_FAILING_LATER = 3, 8
# A small store is enough: tasks are lists of names, results are counts, and only partial moments are large.
OBJECT_STORE_BYTES = 128 * 2**20
# Do not hide GPUs from workers that request none.
ENVIRONMENT = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def on_ray(config: MergeConfig) -> AbstractContextManager[None]:
    """A context with Ray: connected to a cluster, or started on this machine until the block ends.

    Raises:
        ConfigError: there is no cluster at the address.
        DatamergeError: Ray does not start here.
    """
    here: dict[str, Any] = {} if config.ray_address else {"object_store_memory": OBJECT_STORE_BYTES}
    cpus = (config.max_workers or 1) * config.cpus
    return connected(config.ray_address, cpus, environment=ENVIRONMENT, log_to_driver=False, **here)


def device(config: MergeConfig, local: str) -> str:
    """Device of the workers' encoders: with `device="auto"` a cluster's GPUs if it has any; else `local`."""
    if config.ray_address is None or config.device != "auto":
        return local
    return "cuda" if ray.cluster_resources().get("GPU", 0) > 0 else "cpu"


class _Stage:
    """Runs pieces from a queue on a pool; subclasses submit pieces and receive results."""

    def __init__(self, setup: WorkerSetup, queue: WorkQueue, pieces: int, memory: WorkerMemory | None = None) -> None:
        self._pool, self._queue, self._left = Pool(setup, memory), queue, pieces
        self._where = setup.config.artifact
        self._failing: set[int] = set()
        self._succeeded = False

    def _submit(self, actor: Any, piece: Piece) -> Any:
        """Submit a piece to an actor; returns the reference to wait for."""
        raise NotImplementedError

    def _received(self, piece: Piece, result: Any) -> Iterator[Any]:
        """Yield the results of a finished piece."""
        raise NotImplementedError

    def _dropped(self, shard: int) -> None:
        """Subtract all remaining pieces of a shard that needs no more work from `_left`."""
        self._left -= 1

    def run(self) -> Iterator[Any]:
        """Yield results, and `GivenUp` for failed shards, until no work is left."""
        try:
            while self._left > 0:
                self._pool.fit(self._left)
                owners: dict[Any, Worker] = {}
                for worker in self._pool.workers:
                    if worker.starting is not None:
                        owners[worker.starting] = worker
                    else:
                        self._hand_out(worker)
                    owners |= dict.fromkeys(worker.running, worker)
                ready, _ = ray.wait(list(owners), timeout=LOOK_SECONDS)
                for reference in ready:
                    yield from self._settle(owners[reference], reference)
        finally:
            self._pool.close()

    def _hand_out(self, worker: Worker) -> None:
        while True:
            alone = any(self._queue.is_suspect(piece) for piece in worker.running.values())
            piece = self._queue.take(len(worker.running), PIECES_PER_WORKER, alone)
            if piece is None:
                return
            worker.running[self._submit(worker.actor, piece)] = piece

    def _settle(self, worker: Worker, reference: Any) -> Iterator[Any]:
        """Handle one ready reference: a start, a result, an exception, or the death of a worker."""
        try:
            if reference is worker.starting:
                self._pool.started(worker)
                self._ready(worker.actor)
                return
            result = ray.get(reference)
        except RayActorError as error:
            pieces = list(worker.running.values())
            if self._pool.lost(worker, error):
                for piece in reversed(pieces):
                    self._queue.add(piece)
            else:
                yield from self._failed(pieces, f"its worker died: {cause_of_death(error)}")
            return
        except (RayTaskError, ObjectLostError) as error:
            cause = error.cause if isinstance(error, RayTaskError) and isinstance(error.cause, Exception) else error
            if reference is worker.starting or is_hopeless(cause):
                raise explain(cause, self._where) from error
            piece = worker.running.pop(reference)
            if isinstance(cause, ObjectLostError):
                self._lost_parts(piece)
                return
            self._failing.add(piece.shard)
            yield from self._failed([piece], f"{type(cause).__name__}: {first_line(cause)}", is_lasting(cause))
            return
        piece = worker.running.pop(reference)
        self._queue.succeeded(piece)
        self._succeeded, self._failing = True, set()
        if not self._queue.gives_up(piece.shard):
            yield from self._received(piece, result)

    def _ready(self, actor: Any) -> None:
        """Called once a worker has started."""

    def _lost_parts(self, piece: Piece) -> None:
        """Redo a piece whose inputs were lost with a node."""
        self._queue.add(piece)

    def _failed(self, pieces: Sequence[Piece], reason: str, lasting: bool = False) -> Iterator[GivenUp]:
        for given_up in self._queue.failed(pieces, reason, lasting):
            self._failing.add(given_up.shard)
            self._dropped(given_up.shard)
            yield given_up
        if len(self._failing) >= (MOST_FAILING_LATER if self._succeeded else MOST_FAILING):
            raise DatamergeError(
                f"{len(self._failing)} shards failed in a row, the last: {reason}; finished shards are "
                "kept, remove the cause and run the same command again"
            )


class _Shards(_Stage):
    """Merges shards, whole or in parts that several workers add up."""

    def __init__(self, plan: Plan, shards: Sequence[int], setup: WorkerSetup, memory: WorkerMemory | None) -> None:
        counts = {shard: plan.parts(shard) for shard in shards} if plan.in_parts else {}
        self._counts = {shard: parts for shard, parts in counts.items() if parts > 1}
        pieces = len(shards) + sum(self._counts.values())
        super().__init__(setup, WorkQueue(plan.pieces(shards), TRIES), pieces, memory)
        self._plan, self._first = plan, shards[0]
        self._check = setup.config.precision != "float32"
        # References only: partial moments stay on their nodes until they are combined.
        self._partials: dict[int, dict[int, Any]] = {}

    def _submit(self, actor: Any, piece: Piece) -> Any:
        if piece.completes:
            parts = self._partials[piece.shard]
            return actor.call.remote(
                "complete", self._plan.task(piece.shard), *(parts[part] for part in sorted(parts))
            )
        if piece.part is None:
            return actor.call.remote("run", self._plan.task(piece.shard))
        part = self._plan.part(piece.shard, piece.part)
        done, partial = actor.call.options(num_returns=2).remote("part_apart", part)
        self._partials.setdefault(piece.shard, {})[piece.part] = partial
        return done

    def _received(self, piece: Piece, result: Any) -> Iterator[ShardResult]:
        if piece.part is None:
            self._dropped(piece.shard)
            yield result
            return
        self._counts[piece.shard] -= 1
        self._left -= 1
        if self._counts[piece.shard] == 0:
            self._queue.add(Piece(piece.shard, completes=True))

    def _dropped(self, shard: int) -> None:
        self._left -= 1 + self._counts.pop(shard, 0)
        self._partials.pop(shard, None)

    def _lost_parts(self, piece: Piece) -> None:
        if not piece.completes:  # a whole shard or a part has no such inputs
            super()._lost_parts(piece)
            return
        self._partials.pop(piece.shard, None)
        parts = self._plan.parts(piece.shard)
        self._counts[piece.shard] = parts
        self._left += parts
        for part in reversed(range(parts)):
            self._queue.add(Piece(piece.shard, part))

    def _ready(self, actor: Any) -> None:
        if not self._check:
            return
        self._check = False
        try:
            say(ray.get(actor.call.remote("check_precision", self._plan.task(self._first))))
        except RayTaskError as error:
            warn(f"the precision could not be checked: {first_line(error.cause)}")


class _Clusters(_Stage):
    """Runs k-means; the pieces are classes instead of shards."""

    def __init__(
        self, setup: WorkerSetup, samples: Samples, classes: Mapping[int, Places], counts: Mapping[int, int]
    ) -> None:
        super().__init__(setup, WorkQueue((Piece(label) for label in classes), TRIES), len(classes))
        self._samples, self._classes, self._counts = samples, classes, counts

    def _submit(self, actor: Any, piece: Piece) -> Any:
        samples = self._samples.take(self._classes[piece.shard])
        return actor.call.remote("cluster", piece.shard, samples, self._counts[piece.shard])

    def _received(self, piece: Piece, result: Any) -> Iterator[tuple[int, list[int]]]:
        self._dropped(piece.shard)
        yield piece.shard, result


def run_shards(
    plan: Plan, shards: Sequence[int], setup: WorkerSetup, memory: WorkerMemory | None = None
) -> Iterator[ShardResult | GivenUp]:
    """Merge shards on a pool of workers, yielding results in the order in which they finish.

    Args:
        plan: plan of the merge.
        shards: indices of the shards to merge.
        setup: setup of the workers.
        memory: memory of a worker, which limits the number of workers on a node.

    Raises:
        DatamergeError: a failure that every shard would repeat, such as a full disk or other weights.
    """
    yield from _Shards(plan, shards, setup, memory).run()


def run_clusters(
    setup: WorkerSetup, samples: Samples, classes: Mapping[int, Places], counts: Mapping[int, int]
) -> Iterator[tuple[int, list[int]]]:
    """Cluster every class; yields (label, cluster of each sample) in the order in which classes finish.

    Args:
        setup: setup of the workers.
        samples: samples of the source.
        classes: indices of the samples of each label.
        counts: number of clusters of each label.

    Raises:
        DatamergeError: a class cannot be clustered.
    """
    for found in _Clusters(setup, samples, classes, counts).run():
        if isinstance(found, GivenUp):
            raise DatamergeError(f"class {found.shard} cannot be clustered: {found.reason}")
        yield found
