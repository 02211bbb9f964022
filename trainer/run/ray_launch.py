"""Train on the workers of a Ray cluster; the only file of the trainer that uses Ray.

Ray Train joins its workers in a process group; each then runs `train_here` as a process of torchrun would.
When a worker dies all of them restart and the run continues from its newest checkpoint, so every worker must be able
to read RUN and the artifact.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

from datamerge.runtime.ray import call_in_worker, connected
from storage_schemas import DatamergeError, UserError
from storage_schemas.access.local_paths import user_path
from storage_schemas.schema.run import RunSummary
from trainer.config import TrainConfig
from trainer.data.caching import NONE
from trainer.errors import NotFiniteRun
from trainer.run.checkpoint import RunFolder
from trainer.run.distributed import BACKENDS
from trainer.run.loop import train_here

MAX_FAILURES = 3


def train_on_ray(config: TrainConfig) -> RunSummary:
    """Train on `config.ray_workers` workers of the cluster at `config.ray_address`, or of Ray started here.

    Each worker takes a GPU, unless the device is cpu or the cluster has too few GPUs.

    Raises:
        DatamergeError: as `train`; also if workers died more than `MAX_FAILURES` times.
    """
    places = ["artifact", "run", "eval_artifact"]
    if config.cache != NONE:
        places.append("cache")
    for name in ("encoder", "head"):
        named = getattr(config, name)
        if named is not None and user_path(named).exists():  # the folder of a run, or a file
            places.append(name)
    config = config.model_copy(update={name: _absolute(getattr(config, name)) for name in places})
    # Ray's own records go to a temporary folder: the checkpoints are in RUN.
    workers = config.ray_workers or 1
    with connected(config.ray_address, workers + 1), tempfile.TemporaryDirectory(prefix="datamerge-ray-") as storage:
        return _fit(config, workers, storage)


def _fit(config: TrainConfig, workers: int, storage: str) -> RunSummary:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= workers
    outcome = Path(config.run).parent / f".{Path(config.run).name}-{os.getpid()}.error"
    trainer = TorchTrainer(
        call_in_worker("trainer.run.ray_launch:work", config, outcome),
        torch_config=TorchConfig(backend=BACKENDS if gpus else None),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpus),
        run_config=ray.train.RunConfig(
            storage_path=storage, failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].strip()[:300] if lines else "no reason given"
        raise DatamergeError(
            f"the Ray workers failed {MAX_FAILURES + 1} times ({reason}); "
            "the same command continues from the newest checkpoint"
        ) from error
    if outcome.exists():
        refusal: DatamergeError = pickle.loads(outcome.read_bytes())  # noqa: S301 - written by our own workers in `work`
        outcome.unlink()
        raise refusal
    summary = RunFolder(config.run).summary()
    if summary is None:
        raise DatamergeError(
            f"run: expected a summary in {config.run} after the Ray workers ended, found none; put `run` on a file "
            "system that this machine and all workers share"
        )
    return summary


def work(config: TrainConfig, outcome: Path) -> None:
    """Train in one Ray worker. Errors that a retry would repeat go to the file `outcome`; Ray retries all others."""
    from ray.train import get_context

    try:
        train_here(config)
    except (UserError, NotFiniteRun) as error:
        # All workers raise these errors together, see `Processes.together`.
        if get_context().get_world_rank() == 0:
            outcome.parent.mkdir(parents=True, exist_ok=True)
            outcome.write_bytes(pickle.dumps(error))


def _absolute(url: str | list[str] | None) -> str | list[str] | None:
    """Make local paths absolute, since workers have other working directories."""
    if isinstance(url, list):
        return [str(_absolute(one)) for one in url]
    return url if url is None or "://" in url else str(user_path(url).absolute())
