"""Workers of a merge on a GPU: shards from two threads, moments on the device, and too little memory."""

from __future__ import annotations

import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamerge.encoders import load_encoder
from merge_service import MergeConfig
from merge_service.adversarial_groups import Attacker
from merge_service.merge import Prepared, prepare, worker_setup
from merge_service.worker import ShardWorker
from storage_schemas import ArtifactWriter, DatamergeError, ExactMoments, Location, encode_exact, open_artifact
from storage_schemas.schema.factors import stored_factors
from storage_schemas.verify import verify
from tests.support.on_device import assert_stored_arrays_are_numpys
from tests.support.refusals import refused

SHARDS = 4


def _prepared(folder: Path, device: torch.device, **settings: Any) -> Prepared:
    images = np.random.default_rng(0).integers(0, 256, (4 * SHARDS, 32, 32, 3), np.uint8)
    np.savez(folder / "x.npz", images=images)
    shared = {
        "source": str(folder / "x.npz"),
        "artifact": str(folder / "artifact"),
        "encoder": "mlp:3x32x32-64-16",
        "members": 3,
        "batch_size": 6,
        "groups_per_shard": 4,
        "device": device.type,
    }
    return prepare(MergeConfig.model_validate(shared | settings))


def _worker(prepared: Prepared, folder: Path) -> tuple[ShardWorker, ArtifactWriter]:
    writer = ArtifactWriter(Location(folder), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    worker = ShardWorker(worker_setup(prepared, writer, prepared.config.device))
    worker.prepare()
    return worker, writer


def _shards(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shards_from_two_threads_equal_those_from_one(device: torch.device, tmp_path: Path, precision: str) -> None:
    prepared = _prepared(
        tmp_path, device, precision=precision, factors=1, keep_members=True, keep_clean=True, restarts=2
    )
    artifacts = []
    for threads in (1, 2):
        folder = tmp_path / str(threads)
        worker, writer = _worker(prepared, folder)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda shard, worker=worker: worker.run(prepared.plan.task(shard)), range(SHARDS)))
        writer.finish()
        assert verify(Location(folder)).problems == []
        artifacts.append(_shards(folder))
    assert artifacts[0] == artifacts[1]
    layout = prepared.plan.layout
    for record in open_artifact(folder):
        assert record.members is not None
        expected = dict(encode_exact(ExactMoments.of(record.members), layout))
        expected["factors"] = stored_factors(record.members, layout, "sketch", 0, record.key)
        for name, array in expected.items():
            np.testing.assert_array_equal(record.arrays[name], array)


def test_clean_images_are_stored_from_two_threads(device: torch.device, tmp_path: Path) -> None:
    prepared = _prepared(tmp_path, device, attack="none", members=None, batch_size=3)
    worker, writer = _worker(prepared, tmp_path / "out")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda shard: worker.run(prepared.plan.task(shard)), range(SHARDS)))
    writer.finish()
    assert verify(Location(tmp_path / "out")).problems == []
    images = np.load(tmp_path / "x.npz")["images"].transpose(0, 3, 1, 2)
    encoder = load_encoder("mlp:3x32x32-64-16")
    for record in open_artifact(tmp_path / "out"):
        image = images[int(record.samples[0].rpartition("#")[2])]
        np.testing.assert_array_equal(record.arrays["sum"], image)
        assert record.target is not None
        assert not record.arrays["scatter"].any()
        with torch.no_grad():
            np.testing.assert_allclose(
                record.target, encoder(torch.from_numpy(image)[None].float() / 255)[0], atol=1e-5
            )


@pytest.mark.parametrize("number", [2, 10, 200])
def test_moments_on_the_device_equal_numpys(device: torch.device, number: int) -> None:
    assert_stored_arrays_are_numpys(device.type, number, (1, 3))


def test_inputs_are_pinned(device: torch.device, tmp_path: Path) -> None:
    prepared = _prepared(tmp_path, device)
    worker, _ = _worker(prepared, tmp_path / "out")
    attacker = worker._maker
    assert isinstance(attacker, Attacker)
    inputs = attacker.inputs([(group, np.zeros((3, 32, 32), np.uint8)) for group in prepared.plan.groups_of(0)])
    assert len(inputs.draws) == 1
    pinned = [tensor.is_pinned() for tensor in (inputs.clean, *inputs.draws)]
    assert pinned == [device.type == "cuda"] * 2


def test_out_of_memory_names_batch_size(device: torch.device, tmp_path: Path) -> None:
    if device.type != "cuda":
        pytest.skip("a share of a GPU's memory needs a GPU")
    prepared = _prepared(tmp_path, device, encoder="mlp:3x4x4-400000-16", batch_size=100_000, members=3)
    worker, _ = _worker(prepared, tmp_path / "out")
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((reserved + 2**20) / total)
    try:
        with refused(DatamergeError, "batch_size", "`members`"):
            worker.run(prepared.plan.task(0))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert worker.run(prepared.plan.task(0)).groups == 4


def test_compiling_does_not_warn_of_tf32(device: torch.device, tmp_path: Path) -> None:
    if device.type != "cuda" or not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("the advice comes where a GPU is compiled for, which needs a C compiler")
    prepared = _prepared(tmp_path, device, compile=True, steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        worker, _ = _worker(prepared, tmp_path / "out")
        assert worker.run(prepared.plan.task(0)).groups == 4
    assert not [warning for warning in caught if "TensorFloat32" in str(warning.message)]
