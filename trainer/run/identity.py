"""Which settings make a run what it is; with others its folder is refused."""

from __future__ import annotations

from typing import Any

from trainer.config import TrainConfig
from trainer.data.order import ORDER_VERSION

# Settings that say where and how fast, not what comes out; they may differ when a run is continued.
_FREE = {
    "artifact",
    "run",
    "epochs",
    "accumulate",
    "compile",
    "grad_checkpointing",
    "eval_artifact",
    "eval_every",
    "on_overfit",
    "overfit_every",
    "device",
    "checkpoint_every",
    "keep_checkpoints",
    "data_workers",
    "cache",
    "cache_bytes",
    "threads",
    "ray_workers",
    "ray_address",
    "log_every",
    "wandb_project",
}


def free_of_place(config: TrainConfig) -> dict[str, Any]:
    """The settings that determine the result, and how they are turned into an order."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}
    if config.on_overfit == "widen":  # warnings and errors change no update
        settings |= {"on_overfit": "widen", "overfit_every": config.overfit_every}
    # None is as good as nothing, and runs that were started before there was such a term say nothing of it.
    return {**settings, "clean_weight": config.clean_weight or None, "order": ORDER_VERSION}
