"""One suite of behaviour tests for all stores; they differ only in how stock libraries read their raw bytes.

A new format adds a class here, with its name and its `raw` reader, and inherits every test.
"""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from storage_schemas import (
    ArraySpec,
    ArtifactWriter,
    ConfigError,
    CorruptShard,
    ExactMoments,
    Layout,
    Location,
    Record,
    open_artifact,
)
from storage_schemas.access.lru import Lru
from storage_schemas.schema.manifest import Format
from storage_schemas.schema.moments import LEVELS, scatter_dtype, sum_dtype
from storage_schemas.schema.record import encode_exact
from storage_schemas.stores import STORES
from tests.support.refusals import refused

Write = Callable[..., list[Record]]
Same = Callable[[Record, Record], None]
Raw = list[dict[str, npt.NDArray[np.generic]]]


class StoreBehaviour(ABC):
    """Tests that every format must pass. Raw bytes are read by stock libraries, never by the code under test."""

    format: str

    @abstractmethod
    def raw(self, folder: Path) -> Raw:
        """The stored arrays of every record, in storage order, with `count` and `label` (-1: none)."""

    @pytest.mark.parametrize("rejected", [(), (1, 3), (3, 4, 5)])
    def test_stock_libraries_read_what_was_written(
        self,
        tmp_path: Path,
        make_layout: Callable[..., Layout],
        write_artifact: Write,
        same_record: Same,
        encoding_name: str,
        rejected: tuple[int, ...],
    ) -> None:
        records = write_artifact(tmp_path / "a", make_layout(self.format, encoding_name), rejected)
        raw = self.raw(tmp_path / "a")
        assert len(raw) == len(records) == 7 - len(rejected)
        for found, expected in zip(raw, records, strict=True):
            assert int(found.pop("count")) == expected.count
            assert int(found.pop("label")) == (-1 if expected.label is None else expected.label)
            assert found.keys() == expected.arrays.keys()
            for name, array in expected.arrays.items():
                assert found[name].dtype == array.dtype
                np.testing.assert_array_equal(found[name], array)
        for index, expected in enumerate(records):
            same_record(open_artifact(tmp_path / "a")[index], expected)

    def test_the_order_is_that_of_the_plan(
        self, tmp_path: Path, make_layout: Callable[..., Layout], make_shards: Any, provenance: dict[str, Any]
    ) -> None:
        """Not the order in which shards were committed."""
        layout = make_layout(self.format)
        shards = make_shards(layout)
        writer = ArtifactWriter(Location(tmp_path), layout, provenance)
        writer.begin({})
        for shard in (2, 0, 1):
            writer.commit(shard, shards[shard], [])
        writer.finish()
        artifact = open_artifact(tmp_path)
        assert [record.key for record in artifact] == [f"k{number}" for number in range(7)]
        assert artifact.shard_sizes == [3, 3, 1]

    @settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
    @given(members=arrays(np.uint8, st.tuples(st.integers(1, 9), st.just(1), st.just(2), st.just(2))))
    def test_exact_from_members_to_disk_and_back(self, tmp_path: Path, members: npt.NDArray[np.uint8]) -> None:
        self._check_exact(tmp_path / str(len(list(tmp_path.iterdir()))), members)

    @pytest.mark.parametrize("count", [6_000, 66_000])
    def test_a_class_of_thousands_is_exact(self, tmp_path: Path, count: int) -> None:
        """6,000 members need a uint32 sum and a uint64 scatter: 6,000² · 255² / 4 is 5.9e11."""
        rng = np.random.default_rng(count)
        members = rng.integers(0, 256, (count, 1, 2, 2)).astype(np.uint8)
        members[: count // 2, 0, 0, 0], members[count // 2 :, 0, 0, 0] = 0, 255  # the largest scatter there is
        record = self._check_exact(tmp_path / "a", members)
        assert {name: array.dtype.name for name, array in record.items()} == {"sum": "uint32", "scatter": "uint64"}

    def _check_exact(self, folder: Path, members: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.generic]]:
        count, shape = len(members), members.shape[1:]
        specs = (
            ArraySpec.of("sum", sum_dtype(count), shape),
            ArraySpec.of("scatter", scatter_dtype(count, 255), shape),
        )
        document = {"format": self.format, "encoding": "uint8_moments", "arrays": specs}
        layout = Layout.model_validate({**document, "groups": 1, "groups_per_shard": 1})
        writer = ArtifactWriter(Location(folder), layout, {})
        writer.begin({})
        encoded = encode_exact(ExactMoments.of(members), layout)
        writer.commit(0, [Record("class-0", count, layout.encoding, encoded)], [])
        writer.finish()
        (raw,) = self.raw(folder)
        columns = members.reshape(count, -1).T.tolist()
        totals = [sum(column) for column in columns]
        assert raw["sum"].ravel().tolist() == totals
        squares = [sum(x * x for x in column) for column in columns]
        assert raw["scatter"].ravel().tolist() == [count * q - s * s for s, q in zip(totals, squares, strict=True)]
        record = open_artifact(folder)["class-0"]
        scaled = members.astype(np.float64) / LEVELS
        np.testing.assert_allclose(record.mean, scaled.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(record.variance, scaled.var(axis=0), rtol=1e-6, atol=1e-15)
        return {name: raw[name] for name in ("sum", "scatter")}

    def test_arrays_that_this_release_does_not_know_are_kept(
        self, tmp_path: Path, make_layout: Callable[..., Layout], make_record: Callable[..., Record]
    ) -> None:
        """A later release may add optional arrays: they are served and checked, and change nothing else."""
        plain = make_layout(self.format, groups=1)
        extra = ArraySpec.of("curvature", np.dtype("f2"), (2, 3))
        layout = plain.model_copy(update={"arrays": (*plain.arrays, extra)})
        record, values = make_record(0, plain), np.arange(6, dtype=np.float16).reshape(2, 3)
        writer = ArtifactWriter(Location(tmp_path), layout, {})
        writer.begin({})
        more = {**record.arrays, "curvature": values}
        writer.commit(0, [Record("k0", record.count, record.encoding, more)], [])
        writer.finish()
        np.testing.assert_array_equal(self.raw(tmp_path)[0]["curvature"], values)
        found = open_artifact(tmp_path)[0]
        np.testing.assert_array_equal(found.arrays["curvature"], values)
        np.testing.assert_array_equal(found.mean, record.mean)

    def test_sound_records_are_read_in_every_verify_mode(
        self, tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, same_record: Same
    ) -> None:
        records = write_artifact(tmp_path / "a", make_layout(self.format))
        for mode in ("off", "record", "shard"):
            for found, expected in zip(open_artifact(tmp_path / "a", verify=mode), records, strict=True):
                same_record(found, expected)
        with refused(ConfigError, "verify", "off", "record", "shard", "True"):
            open_artifact(tmp_path / "a", verify=True)  # type: ignore[arg-type]

    def test_shard_mode_checks_each_file_once(
        self, tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
    ) -> None:
        """Later damage is noticed by a new reader only."""
        write_artifact(tmp_path / "a", make_layout(self.format))
        artifact = open_artifact(tmp_path / "a", verify="shard")
        assert artifact[0].key == "k0"
        path = tmp_path / "a" / artifact.commit(0).files[-1].path
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert artifact[1].key == "k1"
        with refused(CorruptShard, None, path, "sha256"):
            open_artifact(tmp_path / "a", verify="shard")[1]

    def test_a_lookup_reads_one_sidecar_and_memory_is_bounded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By index or key; memory does not grow with the number of records that were read."""
        layout = self._many_shards(tmp_path)
        reads: list[str] = []
        read = Location.read

        def counted(location: Location, relative: str, *arguments: Any) -> bytes:
            reads.append(relative)
            return read(location, relative, *arguments)

        monkeypatch.setattr(Location, "read", counted)
        artifact = open_artifact(tmp_path)
        for index in (0, 199, 123, 50):
            reads.clear()
            key = f"group-{index:06d}"
            assert artifact[key].key == artifact[index].key == key
            assert artifact.index_of(key) == index
            assert reads == [f"commits/{index // 2:05d}.json"]
        with pytest.raises(KeyError, match="group-9"):
            artifact["group-9"]
        peaks = []
        for records in (140, len(artifact)):
            fresh = open_artifact(tmp_path)
            tracemalloc.start()
            for index in range(records):
                assert fresh[index].count == 2
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert layout.shards == 100
        assert peaks[1] < 1.25 * peaks[0]  # the caches are full at 64 shards; if they grew, the ratio would be 1.4

    def _many_shards(self, folder: Path) -> Layout:
        """Write a hundred shards of two groups each."""
        arrays_ = tuple(ArraySpec.of(name, np.dtype("f4"), (1, 1, 1)) for name in ("mean", "mean_square"))
        document = {"format": self.format, "encoding": "float32", "arrays": arrays_}
        layout = Layout.model_validate({**document, "groups": 200, "groups_per_shard": 2})
        writer = ArtifactWriter(Location(folder), layout, {})
        writer.begin({})
        one = {spec.name: np.full(spec.shape, 0.5, np.float32) for spec in arrays_}
        for shard in range(layout.shards):
            keys = (f"group-{2 * shard + i:06d}" for i in (0, 1))
            writer.commit(shard, [Record(key, 2, "float32", one) for key in keys], [])
        writer.finish()
        return layout


class TestZarr(StoreBehaviour):
    format = "zarr"

    def raw(self, folder: Path) -> Raw:
        group = zarr.open_group(folder / "groups.zarr", mode="r")
        names = list(group.array_keys())
        whole = {name: np.asarray(group[name][...]) for name in names}  # type: ignore[index]
        return [{name: whole[name][row] for name in names} for row in np.flatnonzero(whole["count"])]


class TestWebDataset(StoreBehaviour):
    format = "webdataset"

    def raw(self, folder: Path) -> Raw:
        records: dict[str, dict[str, Any]] = {}
        for path in sorted((folder / "shards").iterdir()):
            with tarfile.open(path) as tar:
                for header in tar:
                    stream = tar.extractfile(header)
                    assert stream is not None
                    key, _, name = header.name.partition(".")
                    record = records.setdefault(key, {})
                    if name == "json":
                        facts = json.load(stream)
                        record["count"] = np.int64(facts["count"])
                        record["label"] = np.int64(-1 if facts["label"] is None else facts["label"])
                    else:
                        record[name.removesuffix(".npy")] = np.load(io.BytesIO(stream.read()), allow_pickle=False)
        return list(records.values())


def test_every_format_has_a_store_and_its_tests() -> None:
    assert STORES.keys() == set(get_args(Format)) == {tests.format for tests in StoreBehaviour.__subclasses__()}


def test_lru_keeps_the_most_recently_used() -> None:
    kept = Lru[str, int](2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    kept.put("c", 3)
    assert [kept.get(key) for key in "abc"] == [1, None, 3]
