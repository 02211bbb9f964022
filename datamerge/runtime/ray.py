"""Ray as a guest in a process of ours: joined or started, and kept out of the search path."""

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
    """Ray in here: the connection that the caller has, a cluster, or Ray on this machine, which ends with the block.

    Args:
        address: of a cluster, e.g. `auto` or HOST:PORT; None to start Ray here.
        cpus: that Ray started here offers at least, where the machine has fewer.
        environment: variables for Ray besides those of `ray_environment`, where the user has not set them.
        init: more arguments of `ray.init`.

    Raises:
        ConfigError: no cluster at the address.
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
    """Tell Ray what the environment says of `uv run`: it has read that when it was imported, perhaps before."""
    from ray._private import ray_constants

    if hasattr(ray_constants, UV_RUN):
        setattr(ray_constants, UV_RUN, os.environ[UV_RUN] not in ("", "0", "false", "False"))


def _start(cpus: int, init: dict[str, Any]) -> None:
    import ray

    cpus = max(usable_cpus(), cpus)
    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, **init)
    except Exception as error:  # that is what Ray raises where its processes do not come up in time
        raise DatamergeError(
            f"Ray did not start on this machine ({first_line(error)}); free some memory and processors, and run the "
            "same command again"
        ) from error


def check_cluster_address(address: str) -> None:
    """Raise ConfigError where HOST:PORT of a Ray cluster, also as ray://HOST:PORT, takes no connection.

    Ray itself would try for minutes. Other addresses, such as `auto`, are left to it.
    """
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"ray_address: expected a Ray cluster at {address!r}, found nothing that takes connections there "
            f"({error}); leave it out to start Ray here"
        ) from None


def ray_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What Ray reads from the environment when it starts, without what the user has set already."""
    settings = {
        # No reports to its makers.
        "RAY_USAGE_STATS_ENABLED": "0",
        # No metrics of a driver: ray.init() starts a thread for them that ray.shutdown() leaves running (Ray 2.60).
        "RAY_enable_open_telemetry": "0",
        # Under `uv run` workers would otherwise start in a copy of the working directory.
        UV_RUN: "0",
        **(more or {}),
    }
    return {name: value for name, value in settings.items() if name not in os.environ}


def call_in_worker(target: str, *args: Any) -> Callable[[], Any]:
    """A function without arguments that Ray can send to a worker, where it calls `module:name` with these.

    Ray puts the driver's working directory and script folder in front of its workers' search path, and whatever a
    worker is sent by name it imports from there: a user's own `trainer/` instead of ours. This function is sent as
    code, because it is nested, and its arguments as bytes. It moves the two folders to the end, where they serve
    `python:` specs, before it imports anything. Where there is the driver's working directory, it enters it: relative
    paths mean the same on both sides.
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
        # Where the driver found us, for machines on which we are not installed.
        sys.path[:] = [*first, *([] if ours in first else [ours]), *last]
        arguments = pickle.loads(packed)  # noqa: S301 - as Ray does with all that it sends
        return getattr(importlib.import_module(module), name)(*arguments)

    return call
