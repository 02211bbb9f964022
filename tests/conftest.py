"""Configuration and fixtures shared by all tests."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from datamerge.runtime.process_end import leave
from datamerge.runtime.ray import ray_environment

if TYPE_CHECKING:
    from tests.support.bench import Bench

# Set before torch and NumPy start: on networks this small, threads cost more than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_status: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    """Make Ctrl-C work here and in processes that tests start, even if a shell started pytest in the background.

    GPUs are hidden from all tests except those that `-m gpu` selects: golden numbers come from a CPU, and tests of
    several processes start more of them than a machine has GPUs.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(ray_environment())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run all tests that use the cluster in one process, so that a run starts one cluster."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_sessionfinish(exitstatus: int) -> None:
    _status.append(int(exitstatus))


@atexit.register  # early, so that it runs after the handlers of Ray and others
def _end() -> None:
    """End the test process as the command ends when it has loaded Ray."""
    # An error after the session has set `sys.last_value` and has an exit status of its own.
    if "ray" in sys.modules and _status and not hasattr(sys, "last_value"):
        leave(_status[0])


@pytest.fixture(scope="session", autouse=True)
def _no_fsync() -> Iterator[None]:
    """Replace fsync, which only matters after a power cut, by nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _temporary_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the heads that tests make out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATAMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A Ray cluster of two nodes, started once because that is slow. Tests request `bench` or `ray_driver`."""
    from tests.support.bench import running_bench

    with running_bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture
def bench(cluster: Bench) -> Iterator[Bench]:
    """The cluster, without faults; the test runs in its environment."""
    with cluster.entered():
        yield cluster


@pytest.fixture
def ray_driver(bench: Bench) -> Iterator[None]:
    """Connect this process to the cluster, as a notebook would, so that merges start no Ray of their own."""
    import ray

    ray.init(address=bench.address, logging_level=40, log_to_driver=False)
    yield
    assert ray.is_initialized()
    ray.shutdown()
