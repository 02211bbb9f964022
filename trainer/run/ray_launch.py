"""The trainer's one file that knows Ray: `datamerge train` on the workers of a cluster, restarted when one dies.

Ray Train joins its workers in a process group; each then runs `trainer.train` as a process of torchrun would.
When one dies all are started again, and the run continues from its newest checkpoint, so RUN and the artifact
must be where every worker can read them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from datamerge.runtime.ray import check_cluster_address, ray_environment

os.environ.update(ray_environment())

import ray
import ray.train
from ray.train.torch import TorchTrainer

from storage_schemas import ConfigError, DatamergeError, UserError
from trainer.config import TrainConfig
from trainer.run.checkpoint import RunFolder, RunSummary
from trainer.run.loop import train
from trainer.run.signals import NotFiniteRun

MAX_FAILURES = 3


def train_on_ray(config: TrainConfig, workers: int, address: str | None = None) -> RunSummary:
    """As `trainer.train`, on the workers of a Ray cluster.

    Args:
        config: settings.
        workers: processes; each takes a GPU unless the device is cpu or the cluster has too few.
        address: of a cluster; without one Ray starts on this machine and ends with the run.

    Raises:
        ConfigError, DatamergeError: as `trainer.train`; also when workers died more than `MAX_FAILURES` times.
    """
    config = config.model_copy(
        update={name: _absolute(getattr(config, name)) for name in ("artifact", "run", "eval_artifact")}
    )
    ours = not ray.is_initialized()
    if ours:
        _start(address, workers)
    try:
        # What Ray keeps of its own bookkeeping is of no use afterwards: our checkpoints are in RUN.
        with tempfile.TemporaryDirectory(prefix="datamerge-ray-") as storage:
            return _fit(config, workers, storage)
    finally:
        if ours:
            ray.shutdown()


def _fit(config: TrainConfig, workers: int, storage: str) -> RunSummary:
    gpus = config.device != "cpu" and ray.cluster_resources().get("GPU", 0) >= workers
    outcome = Path(config.run).parent / f".{Path(config.run).name}-{os.getpid()}.error"
    trainer = TorchTrainer(
        _work,
        train_loop_config={"settings": config.model_dump(), "outcome": str(outcome)},
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
        code, _, message = outcome.read_text("utf-8").partition(" ")
        outcome.unlink()
        raise (UserError if int(code) == UserError.exit_code else DatamergeError)(message)
    summary = RunFolder(config.run).summary()
    if summary is None:
        raise DatamergeError(
            f"{config.run}: the Ray workers ended and left no summary here; put RUN on a file system that this "
            "machine and all workers share"
        )
    return summary


def _work(options: dict[str, Any]) -> None:
    """What each worker does. Errors that would come again are written down, not raised: Ray would try them again."""
    try:
        train(TrainConfig(**options["settings"]))
    except (UserError, NotFiniteRun) as error:
        # All workers come here together, see `Processes.together`.
        if ray.train.get_context().get_world_rank() == 0:
            Path(options["outcome"]).parent.mkdir(parents=True, exist_ok=True)
            Path(options["outcome"]).write_text(f"{error.exit_code} {error}", "utf-8")


def _start(address: str | None, workers: int) -> None:
    quiet: dict[str, Any] = {"logging_level": "ERROR"}
    if address is None:
        cpus = max(os.cpu_count() or 1, workers + 1)
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        return
    check_cluster_address(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray-address {address!r}: expected a Ray cluster, found none ({error})") from None


def _absolute(url: str | None) -> str | None:
    """Workers have a working directory of their own."""
    return url if url is None or "://" in url else str(Path(url).expanduser().absolute())
