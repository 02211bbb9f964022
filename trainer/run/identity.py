"""The identity of a run: the settings that determine its result, and that may not change when it continues."""

from __future__ import annotations

from typing import Any

from trainer.config import TrainConfig
from trainer.data.order import ORDER_VERSION

# Settings that do not change the result; they may differ when a run is continued.
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
    """The settings that determine the result, and the version of the order."""
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}
    if config.on_overfit == "widen":  # warnings and errors change no update
        settings |= {"on_overfit": "widen", "overfit_every": config.overfit_every}
    # `changes` treats None as missing, and runs of releases without this setting do not record it.
    return {**settings, "clean_weight": config.clean_weight or None, "order": ORDER_VERSION}
