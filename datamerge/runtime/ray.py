"""Starts Ray or joins a cluster, sets its environment, and keeps its workers from importing shadowing modules."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamerge.runtime.machine import usable_cpus
from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError, DatamergeError

CONNECT_SECONDS = 10.0
UV_RUN = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"


@contextmanager
def connected(
    address: str | None, cpus: int, environment: Mapping[str, str] | None = None, **init: Any
) -> Iterator[None]:
    """Inside, Ray is connected: by the caller's connection, to a cluster, or to a local Ray that ends with the block.

    Args:
        address: address of a cluster, e.g. `auto` or HOST:PORT; None to start Ray on this machine.
        cpus: least number of CPUs that a local Ray offers, even if the machine has fewer.
        environment: more environment variables for Ray, for those that the user has not set.
        init: more arguments of `ray.init`.

    Raises:
        ConfigError: there is no cluster at the address.
        DatamergeError: Ray does not start here.
    """
    os.environ.update(ray_environment(environment))
    import ray

    if ray.is_initialized():
        yield
        return
    if address is not None:
        check_cluster_address(address)
    _obey_uv_run()
    try:
        _start(cpus, init) if address is None else _join(address, init)
        yield
    finally:
        ray.shutdown()


def _join(address: str, init: dict[str, Any]) -> None:
    import ray

    try:
        ray.init(address=address, logging_level=logging.ERROR, **init)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"ray_address: expected a Ray cluster at {address!r}, found none ({first_line(error)}); leave it out to "
            "start Ray here"
        ) from None


def _obey_uv_run() -> None:
    """Update Ray's setting for `uv run` from the environment: Ray reads it on import, which may have been earlier."""
    from ray._private import ray_constants

    if hasattr(ray_constants, UV_RUN):
        setattr(ray_constants, UV_RUN, os.environ[UV_RUN] not in ("", "0", "false", "False"))


def _start(cpus: int, init: dict[str, Any]) -> None:
    import ray

    cpus = max(usable_cpus(), cpus)
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, **init)
    except Exception as error:  # Ray raises a plain one if its processes do not start in time
        raise DatamergeError(
            f"Ray did not start on this machine ({first_line(error)}); free some memory and processors, and run the "
            "same command again"
        ) from error


def check_cluster_address(address: str) -> None:
    """Raise ConfigError if HOST:PORT or ray://HOST:PORT accepts no connection.

    Ray itself would try for minutes. Other addresses, such as `auto`, are not checked.
    """
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"ray_address: expected a Ray cluster at {address!r}, found no connection "
            f"({error}); leave it out to start Ray here"
        ) from None


def ray_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables for Ray, without those that the user has set."""
    settings = {
        # No usage reports.
        "RAY_USAGE_STATS_ENABLED": "0",
        # No metrics: ray.init() starts a thread for them that ray.shutdown() leaves running (Ray 2.60).
        "RAY_enable_open_telemetry": "0",
        # Under `uv run` workers would otherwise start in a copy of the working directory.
        UV_RUN: "0",
        **(more or {}),
    }
    return {name: value for name, value in settings.items() if name not in os.environ}


def call_in_worker(target: str, *args: Any) -> Callable[[], Any]:
    """A function without arguments for a Ray worker, which calls `module:name` with `args` there.

    Ray puts the driver's working directory and script folder first on its workers' search path, so that a worker
    would import a user's `trainer/` instead of ours. This function is nested, so Ray pickles it by value, and it
    carries its arguments as bytes. Before it imports anything, it moves the two folders to the end of the path, where
    `python:` specs still find them. It also changes to the driver's working directory, if that exists, so that
    relative paths mean the same on both sides.
    """
    from ray import cloudpickle

    module, name = target.split(":")
    packed = cloudpickle.dumps(args)
    ours = str(Path(__file__).parents[2])
    here = str(Path.cwd())
    users = {here, str(Path(sys.argv[0]).resolve().parent)} - {ours}

    def call() -> Any:
        import contextlib
        import importlib
        import os
        import pickle
        import sys

        with contextlib.suppress(OSError):
            os.chdir(here)
        first = [folder for folder in sys.path if folder not in users]
        last = [folder for folder in sys.path if folder in users]
        # The driver's folder of our packages, for machines on which they are not installed.
        sys.path[:] = [*first, *([] if ours in first else [ours]), *last]
        arguments = pickle.loads(packed)  # noqa: S301 - Ray unpickles all that it sends
        return getattr(importlib.import_module(module), name)(*arguments)

    return call
