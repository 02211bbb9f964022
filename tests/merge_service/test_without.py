"""A merge needs no Ray before workers start, no installed distribution, and no GPU in its driver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from merge_service import MergeConfig
from merge_service.merge import local_device
from storage_schemas import ConfigError
from tests.support.paths import ROOT
from tests.support.refusals import refused

# Workers, plans and measurements, on a machine that has no Ray.
WITHOUT_RAY = """
sys.modules["ray"] = None
import merge_service.adversarial_groups, merge_service.estimate, merge_service.planning, merge_service.precision
from merge_service import MergeConfig, merge
from storage_schemas import DatamergeError
from tests.support.merging import merge_alone

settings = dict(encoder="mlp:3x8x8-4", factors=1, members=3)
print(len(merge_alone(f"{folder}/x.npz", f"{folder}/alone", **settings)))
config = MergeConfig(source=f"{folder}/x.npz", artifact=f"{folder}/out", encoder="mlp:3x8x8-4", device="cpu")
try:
    merge(config)
except DatamergeError as error:
    print(error)
"""
WITHOUT_METADATA = """
import importlib.metadata
find = importlib.metadata.Distribution.from_name

def absent(name):
    if name == "datamerge":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)

importlib.metadata.Distribution.from_name = absent
from tests.support.merging import merge_alone

artifact = merge_alone(f"{folder}/x.npz", f"{folder}/out", encoder="mlp:3x8x8-4")
print(artifact.manifest.writer, artifact.manifest.provenance["versions"]["datamerge"])
"""


def _run(code: str, folder: Path) -> list[str]:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.savez(folder / "x.npz", images=images)
    start = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfolder = {str(folder)!r}\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_only_workers_on_a_cluster_need_ray(tmp_path: Path) -> None:
    groups, refusal = _run(WITHOUT_RAY, tmp_path)
    assert groups == "2"
    assert "pip install 'datamerge[merge]'" in refusal
    assert not (tmp_path / "out").exists()


def test_a_checkout_that_is_not_installed_writes_artifacts(tmp_path: Path) -> None:
    assert _run(WITHOUT_METADATA, tmp_path) == ["datamerge 0+unknown 0+unknown"]


def test_the_driver_leaves_gpus_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MergeConfig(source="x", artifact="y", encoder="mlp:3x8x8-4", device="cuda")
    if not torch.cuda.is_available():
        with refused(ConfigError, "device"):
            local_device(config)

    def touched(*arguments: object, **settings: object) -> None:
        raise AssertionError("a CUDA context takes memory, and in exclusive mode the whole GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", touched)
    assert local_device(config) == "cuda"
