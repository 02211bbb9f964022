"""Weights & Biases for those who use it: the numbers of `log.jsonl`, in one W&B run for each RUN.

Needs the extra `wandb` and the setting `wandb_project`. W&B's own environment variables hold: WANDB_MODE=offline
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
    """Before anything is written.

    Raises:
        ConfigError: a project is named and the package is missing.
    """
    if project is None:
        return
    found = importlib.util.find_spec("wandb")
    # W&B leaves a folder of its name wherever it ran, which Python takes for a package without code.
    if found is None or found.origin is None:
        raise ConfigError(
            "wandb_project: needs the package 'wandb': pip install 'datamerge[wandb]', or drop `wandb_project`"
        )


class WandbLog:
    """One sitting of a run; continues the W&B run of the sittings before.

    Args:
        folder: the run's folder; its name is shown.
        project: of W&B.
        settings: shown as the run's configuration.

    Raises:
        DatamergeError: W&B cannot be reached or does not know the user.
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
        # The axis is our own step: W&B's refuses the steps that are repeated after a crash.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values of one step; where that fails, say so once and do without."""
        self._try(lambda run: run.log({"step": step, **values}))

    def close(self, failed: bool) -> None:
        """End the sitting."""
        self._try(lambda run: run.finish(exit_code=int(failed)))

    def _try(self, work: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            work(self._run)
        # Its process may be killed, its server refuse, its disk be full; hours of training are worth more.
        except Exception as error:
            self._run = None
            warn(f"W&B failed ({error}); the run goes on without it, {LOG} has all numbers")
