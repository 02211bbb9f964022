"""Batches hold stored integers until they are used, and then the numbers of the records bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from storage_schemas import CorruptShard, Record, open_artifact
from trainer import TrainConfig
from trainer.arms import ArmName
from trainer.data.batches import Batch, ImageBatch, Read, factors, members, moments
from trainer.data.copied import copied_ahead
from trainer.data.order import MEMBER, WHOLE, stream_seeds
from trainer.run.job import make_job

MakeArtifact = Callable[..., str]
SHAPE = (3, 8, 8)


def _record(key: str, count: int, sum_dtype: type, scatter_dtype: type, rng: np.random.Generator) -> Record:
    """A record of random integers, as large as their dtypes and a group of `count` members allow."""
    largest = [min(255 * count, np.iinfo(sum_dtype).max), min((255 * count) ** 2, np.iinfo(scatter_dtype).max)]
    total, scatter = (rng.integers(0, most, SHAPE, np.uint64, endpoint=True) for most in largest)
    arrays: dict[str, Any] = {"sum": total.astype(sum_dtype), "scatter": scatter.astype(scatter_dtype)}
    return Record(key, count, "uint8_moments", arrays)


@pytest.mark.parametrize("counts", [(2, 10), (16, 17), (50, 257), (300, 1000), (70_000, 3)])
@pytest.mark.parametrize("dtypes", [(np.uint16, np.uint16), (np.uint32, np.uint32), (np.uint32, np.uint64)])
def test_moments_equal_those_of_the_records(counts: tuple[int, ...], dtypes: tuple[type, type]) -> None:
    """float32 holds the divisors of some counts (10, 16) and not of others (17, 50); the same holds for integers."""
    rng = np.random.default_rng(0)
    records = [_record(str(count), count, *dtypes, rng) for count in counts]
    batch = moments(Read(records, {"keys": ["a", "b"], "target": torch.zeros(2)}, {}))
    assert batch.mean.dtype == getattr(torch, np.dtype(dtypes[0]).name)
    made = batch.floats()
    assert made.mean.dtype == made.variance.dtype == torch.float32
    assert not made.divisors
    for record, mean, variance in zip(records, made.mean, made.variance, strict=True):
        np.testing.assert_array_equal(mean, record.mean)
        np.testing.assert_array_equal(variance, record.variance)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_factors_equal_those_of_the_records(dtype: type, count: int) -> None:
    rng, records = np.random.default_rng(0), []
    for key in ("a", "b"):
        stored = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (count, *SHAPE), dtype, endpoint=True)
        records.append(Record(key, 10, "float32", {"factors": stored, "mean": rng.random(SHAPE, np.float32)}))
    batch = factors(Read(records, {"keys": ["a", "b"], "target": torch.zeros(2)}, {})).floats()
    for record, mean, made in zip(records, batch.mean, batch.factors, strict=True):
        np.testing.assert_array_equal(made, record.factors)
        np.testing.assert_array_equal(mean, record.arrays["mean"])


def test_grey_levels_become_the_floats_of_numpy() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    record = Record("a", 4, "float32", {"members": levels})
    batch = members(Read([record], {"keys": ["a"], "target": torch.zeros(1)}, {})).floats()
    np.testing.assert_array_equal(batch.images.numpy(), levels.astype(np.float32) / np.float32(255))


def test_a_batch_of_several_dtypes_has_one_that_holds_them_all() -> None:
    rng = np.random.default_rng(0)
    narrow, wide = (_record(str(dtype), 200, dtype, np.uint32, rng) for dtype in (np.uint16, np.uint32))
    plain = {name: rng.random(SHAPE, np.float32) for name in ("mean", "mean_square")}
    shared: dict[str, Any] = {"keys": ["a", "b"], "target": torch.zeros(2)}
    assert moments(Read([narrow, wide], shared, {})).mean.dtype == torch.uint32
    records = [narrow, Record("c", 10, "float32", plain)]
    batch = moments(Read(records, shared, {}))
    assert batch.mean.dtype == torch.float32
    for record, mean, variance in zip(records, batch.floats().mean, batch.floats().variance, strict=True):
        np.testing.assert_array_equal(mean, record.mean)
        np.testing.assert_array_equal(variance, record.variance)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("arm", ["avg", "random-member"])
def test_a_batch_is_as_large_as_its_stored_arrays(
    make_artifact: MakeArtifact, tmp_path: Path, arm: ArmName, workers: int
) -> None:
    """A batch has the stored bytes of the arrays that the arm reads, and their divisors; also from data workers."""
    url = make_artifact()
    job = make_job(
        TrainConfig(artifact=url, run=str(tmp_path / "run"), steps=2, batch_size=4, arm=arm, data_workers=workers)
    )
    layout = open_artifact(url).manifest.layout
    specs = {spec.name: spec for spec in layout.arrays}
    pixels = math.prod(layout.pixels)
    taken = pixels if arm == "random-member" else specs["sum"].nbytes + specs["scatter"].nbytes
    divisors = 4 if arm == "random-member" else 4 + 8  # a scatter of 32 bits is divided in float64
    for batch in job.feed(WHOLE, 0, 2):
        assert batch.nbytes == 4 * (taken + specs["target"].nbytes + divisors)
        assert batch.floats().nbytes > batch.nbytes


@pytest.mark.parametrize("kind", ["zarr", "webdataset"])
@pytest.mark.parametrize("arm", ["ind", "random-member"])
def test_batches_hold_only_the_members_that_the_arm_uses(
    make_artifact: MakeArtifact, arm: ArmName, kind: str
) -> None:
    """The first two of three members, or the one of these two that the random bits of the group select."""
    url = make_artifact(format=kind)
    job = make_job(TrainConfig(artifact=url, run="run", steps=3, batch_size=4, arm=arm, members=2, seed=3))
    artifact = open_artifact(url)
    for step, batch in enumerate(job.feed(WHOLE, 0, 3)):
        assert isinstance(batch, ImageBatch)
        words, expected = stream_seeds(3, MEMBER, step, len(batch.keys)), []
        for index, word in zip(job.order.batch(step).tolist(), words, strict=True):
            stored = artifact[index].members
            assert stored is not None
            expected.append(stored[:2] if arm == "ind" else stored[word % 2 : word % 2 + 1])
        assert batch.counts == [len(one) for one in expected]
        np.testing.assert_array_equal(batch.images.numpy(), np.concatenate(expected))


def test_copies_run_ahead_by_one_and_errors_are_raised_in_order() -> None:
    """When a batch is returned, the next has been read from the source; the source is closed at the end."""
    asked: list[str] = []

    def source() -> Iterator[Batch]:
        try:
            for key in ("a", "b", "c"):
                asked.append(key)
                yield Batch(keys=[key], target=torch.zeros(1))
            asked.append("error")
            raise CorruptShard("shard 7")
        finally:
            asked.append("closed")

    ahead = copied_ahead(source(), torch.device("cpu"))
    assert (next(ahead).keys, asked) == (["a"], ["a", "b"])
    assert [next(ahead).keys, next(ahead).keys] == [["b"], ["c"]]
    assert asked[3:] == ["error", "closed"]
    with pytest.raises(CorruptShard, match="shard 7"):
        next(ahead)
    asked.clear()
    ahead = copied_ahead(source(), torch.device("cpu"))
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]
    assert asked == ["a", "b", "closed"]
