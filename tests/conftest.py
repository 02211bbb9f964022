"""What holds for all tests."""

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

# Before torch and NumPy start: networks this small lose more in the hand-over between threads than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_status: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C works in here and in the processes that tests start, also where a shell started us in the background.

    GPUs are out of sight of all tests but those that `-m gpu` asks for: golden numbers are the CPU's, and tests of
    several processes start more of them than a machine has GPUs.
    """
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(ray_environment())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests that use the cluster run in one process, so that there is one cluster in a run."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ray"))


def pytest_sessionfinish(exitstatus: int) -> None:
    _status.append(int(exitstatus))


@atexit.register  # so early that it runs after what Ray and others register
def _end() -> None:
    """What the command does about Ray when it ends, for the process of the tests."""
    # Whatever failed after the session has left its traceback here, and has an exit status of its own.
    if "ray" in sys.modules and _status and not hasattr(sys, "last_value"):
        leave(_status[0])


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Files outlive their process without fsync; what it is for, a power cut, no test can cause."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Heads that tests make are none of those that the user keeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATAMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Ray on two nodes; it starts once, because that takes a while. Tests ask for `bench` or `ray_driver`."""
    from tests.support.bench import running_bench

    with running_bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture
def bench(cluster: Bench) -> Iterator[Bench]:
    """The cluster, in whose environment the test runs, without faults."""
    with cluster.entered():
        yield cluster


@pytest.fixture
def ray_driver(bench: Bench) -> Iterator[None]:
    """This process is connected to the cluster as a notebook would be, so that merges start no Ray of their own."""
    import ray

    ray.init(address=bench.address, logging_level=40, log_to_driver=False)
    yield
    assert ray.is_initialized()
    ray.shutdown()
