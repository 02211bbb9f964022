"""Optional logging to Weights & Biases: the numbers of `log.jsonl`, in one W&B run for each RUN.

Needs the extra `wandb` and the setting `wandb_project`. W&B's environment variables apply: WANDB_MODE=offline
keeps everything in RUN/wandb until `wandb sync`.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datamerge.runtime.messages import first_line, warn
from storage_schemas import ConfigError, DatamergeError
from trainer.run.checkpoint import LOG

RUN_ID = "wandb-id.txt"


def check_installed(project: str | None) -> None:
    """Check that W&B is installed if a project is set, before anything is written.

    Raises:
        ConfigError: a project is set and the package is missing.
    """
    if project is None:
        return
    found = importlib.util.find_spec("wandb")
    # W&B creates folders named wandb, which Python would find as namespace packages.
    if found is None or found.origin is None:
        raise ConfigError(
            "wandb_project: needs the package 'wandb': pip install 'datamerge[wandb]', or drop `wandb_project`"
        )


class WandbLog:
    """W&B log of one session of a run; continues the W&B run of earlier sessions.

    Args:
        folder: the run's folder; its name becomes the name of the W&B run.
        project: name of the W&B project.
        settings: configuration of the W&B run.

    Raises:
        DatamergeError: W&B cannot be reached, or the user is not logged in.
    """

    def __init__(self, folder: Path, project: str, settings: dict[str, Any]) -> None:
        import wandb

        path = folder / RUN_ID
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8], "utf-8")
        try:
            self._run: Any = wandb.init(
                project=project,
                id=path.read_text("utf-8").strip(),
                name=folder.name,
                dir=str(folder),
                config=settings,
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise DatamergeError(
                f"wandb_project: expected W&B to start for {project!r}, found {first_line(error)}; run "
                "`wandb login`, or set WANDB_MODE=offline"
            ) from None
        # Use our own step as the axis: W&B's own step refuses those that are repeated after a crash.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values of one step; after an error, warn once and log no more."""
        self._try(lambda run: run.log({"step": step, **values}))

    def close(self, failed: bool) -> None:
        """End the session."""
        self._try(lambda run: run.finish(exit_code=int(failed)))

    def _try(self, work: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            work(self._run)
        # A killed W&B process, an unreachable server or a full disk must not end hours of training.
        except Exception as error:
            self._run = None
            warn(f"W&B failed ({error}); the run goes on without it, {LOG} has all numbers")
