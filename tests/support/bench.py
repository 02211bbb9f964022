"""A local Ray cluster of two nodes, photos of which some are unusable, and faults that can be switched on."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

import datamerge.cli
from storage_schemas.access import retries
from tests.support.paths import ROOT, SUPPORT
from tests.support.servers import S3Server

FAULTS = SUPPORT / "faults"
SHARDS, GROUPS = 9, 13
STORE_BYTES = 80 * 2**20


@dataclass
class Bench:
    """A cluster, the photos, and how to merge them.

    Attributes:
        address: address of the Ray cluster.
        cluster: a ray.cluster_utils.Cluster with a head and one more node.
        photos: folder of images, 13 usable ones.
        faults: folder whose files switch faults on.
        store: an S3 server that the cluster's workers use.
        environment: variables of the cluster's processes and of processes that merge on it.
    """

    address: str
    cluster: Any
    photos: Path
    faults: Path
    store: S3Server
    environment: dict[str, str]

    @contextlib.contextmanager
    def entered(self) -> Iterator[Bench]:
        """Give this process and those that it starts the cluster's environment; switch all faults off."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            # This process is running and does not read PYTHONPATH again.
            patch.setattr(sys, "path", [*sys.path, str(FAULTS)])
            # In workers, the encoder that they load sets this.
            patch.setattr(retries, "FIRST_DELAY", 0.01)
            # A process keeps its connections, including those to another server.
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            self.switch()
            self.store.fault = None
            yield self
        fsspec.get_filesystem_class("s3").clear_instance_cache()

    def arguments(self, artifact: str | Path, *more: str) -> list[str]:
        """Command line of the merge that all tests compare."""
        settings = "--encoder python:faulty:encoder --members 3 --steps 2 --groups-per-shard 2 --no-resize"
        settings += " --keep-members --batch-size 6 --device cpu"
        return ["merge", str(self.photos), str(artifact), *settings.split(), "--ray-address", self.address, *more]

    def start(self, artifact: str | Path, *more: str) -> subprocess.Popen[str]:
        """Start a merge in its own process."""
        command = [sys.executable, "-m", "datamerge", *self.arguments(artifact, *more)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def merge(self, artifact: str | Path, *more: str) -> tuple[int, str]:
        """Run a merge in this process; return its exit code and stderr."""
        errors, code = io.StringIO(), 0
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(sys, "argv", ["datamerge", *self.arguments(artifact, *more)])
            try:
                datamerge.cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
        return code, errors.getvalue()

    def switch(self, *switches: str) -> None:
        """Switch exactly these faults on: `slow`, `poison`, or `lost`, which happens once."""
        for name in ("slow", "poison", "lost"):
            (self.faults / name).unlink(missing_ok=True)
        shutil.rmtree(self.faults / "busy", ignore_errors=True)
        (self.faults / "busy").mkdir()
        for name in switches:
            (self.faults / name).touch()


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder with their bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(condition: Callable[[], Any], seconds: float = 180) -> Any:
    """Wait until a condition returns something true, and return that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"the condition was not met within {seconds:g} seconds")


def write_photos(folder: Path) -> None:
    """13 good photos, and four that are corrupt, cut short, of the wrong size, and without a finite gradient."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(14):
        pixels = generator.integers(0, 248, (8, 8, 3), np.uint8)
        pixels[0, 0, 0] = {5: 255, 8: 249}.get(index, 100)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    (folder / "03-corrupt.jpg").write_text("not an image")
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
    (folder / "06-cut.png").write_bytes(buffer.getvalue()[:120])
    Image.fromarray(generator.integers(0, 256, (9, 8, 3), np.uint8)).save(folder / "09-large.png")


@contextlib.contextmanager
def running_bench(folder: Path) -> Iterator[Bench]:
    """Start the cluster and the store; photos and faults go into the folder."""
    (folder / "faults").mkdir()
    write_photos(folder / "photos")
    with S3Server().running() as store:
        environment = _environment(folder / "faults", store)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            cluster = _cluster()
        yield Bench(cluster.address, cluster, folder / "photos", folder / "faults", store, environment)
        cluster.shutdown()


def _environment(faults: Path, store: S3Server) -> dict[str, str]:
    return {
        # Variables that a user would set; one attempt, because botocore's retries would hide ours.
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "TESTKEYID",
        "AWS_SECRET_ACCESS_KEY": "verysecret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(FAULTS)]),
        "DATAMERGE_FAULTS": str(faults),
    }


def _cluster() -> Any:
    """A Ray cluster of a head and one more node."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    return cluster
