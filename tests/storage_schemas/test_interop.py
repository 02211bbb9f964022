"""Stock readers return the same arrays without this package; equal records give equal bytes."""

from __future__ import annotations

import gc
import io
import json
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zarr

from storage_schemas import Layout, Record, open_artifact

Write = Callable[..., list[Record]]


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_zarr_keeps_one_chunk_a_group_and_one_file_a_shard(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout("zarr"))
    store = tmp_path / "a" / "groups.zarr"
    for name in ("sum", "scatter", "target", "members", "clean"):
        metadata = json.loads((store / name / "zarr.json").read_text())
        sharding = metadata["codecs"][0]
        assert sharding["name"] == "sharding_indexed"
        assert sharding["configuration"]["chunk_shape"] == [1, *metadata["shape"][1:]]
        assert [codec["name"] for codec in sharding["configuration"]["codecs"]][-1] == "crc32c"
        assert len([path for path in (store / name / "c").rglob("*") if path.is_file()]) == 3
        fill = metadata["fill_value"]
        assert fill == "NaN" if metadata["data_type"] == "float32" else fill > 0


def test_rows_of_rejected_groups_hold_the_sentinel(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout("zarr"), (1,))
    group = zarr.open_group(tmp_path / "a" / "groups.zarr", mode="r")
    assert np.asarray(group["count"]).tolist() == [2, 4, 0, 2, 3, 4, 2]
    assert np.isnan(np.asarray(group["target"])[2]).all()
    total = np.asarray(group["sum"])[2]
    assert (total == np.iinfo(total.dtype).max).all()


@pytest.mark.parametrize("rejected", [(), (1, 3)])
def test_stock_webdataset_reads_records(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    encoding_name: str,
    rejected: tuple[int, ...],
) -> None:
    records = write_artifact(tmp_path / "a", make_layout("webdataset", encoding_name), rejected)
    urls = [str(path) for path in sorted((tmp_path / "a" / "shards").glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset 1.0.2 does not close its files
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        gc.collect()
    assert [sample["__key__"] for sample in samples] == [record.key for record in records]
    for sample, record in zip(samples, records, strict=True):
        assert sample["json"] == {"count": record.count, "label": record.label, "samples": list(record.samples)}
        names = {name.removesuffix(".npy") for name in sample if name.endswith(".npy")}
        assert names == set(record.arrays)
        for name, expected in record.arrays.items():
            assert sample[f"{name}.npy"].dtype == expected.dtype
            np.testing.assert_array_equal(sample[f"{name}.npy"], expected)


def test_tarfile_and_numpy_read_records(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, encoding_name: str
) -> None:
    records = write_artifact(tmp_path / "a", make_layout("webdataset", encoding_name))
    members: dict[str, bytes] = {}
    for path in sorted((tmp_path / "a" / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for header in tar:
                assert header.mtime == 0
                assert (header.uid, header.gid, header.uname, header.gname) == (0, 0, "", "")
                stream = tar.extractfile(header)
                assert stream is not None
                members[header.name] = stream.read()
    assert len(members) == sum(1 + len(record.arrays) for record in records)
    for record in records:
        assert json.loads(members[f"{record.key}.json"])["count"] == record.count
        for name, expected in record.arrays.items():
            array = np.load(io.BytesIO(members[f"{record.key}.{name}.npy"]), allow_pickle=False)
            np.testing.assert_array_equal(array, expected)


def test_offsets_point_at_the_raw_data(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    """What a reader in another language needs: bytes at an offset of a file, little-endian."""
    layout = make_layout("webdataset")
    records = write_artifact(tmp_path / "a", layout)
    artifact = open_artifact(tmp_path / "a")
    commit = artifact.commit(1)
    data = (tmp_path / "a" / commit.files[0].path).read_bytes()
    for entry, record in zip(commit.records, records[3:6], strict=True):
        assert entry.offsets is not None
        for spec in layout.arrays:
            start = entry.offsets[spec.name]
            raw = np.frombuffer(data[start : start + spec.nbytes], np.dtype(spec.dtype).newbyteorder("<"))
            np.testing.assert_array_equal(raw.reshape(spec.shape), record.arrays[spec.name])


def test_the_same_records_give_the_same_bytes(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    format_name: str,
    encoding_name: str,
) -> None:
    layout = make_layout(format_name, encoding_name)
    for name in ("a", "b"):
        write_artifact(tmp_path / name, layout, (4,))
    one, two = _tree(tmp_path / "a"), _tree(tmp_path / "b")
    assert len(one) > 6
    assert one == two


def test_commits_describe_their_files(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str
) -> None:
    """Sizes and hashes in sidecars and manifest are those of the files, and no file is left out."""
    from hashlib import sha256

    write_artifact(tmp_path / "a", make_layout(format_name))
    artifact = open_artifact(tmp_path / "a")
    tree = _tree(tmp_path / "a")
    entries = [file for position in range(3) for file in artifact.commit(position).files]
    for file in (*entries, *artifact.manifest.files):
        assert file.bytes == len(tree[file.path])
        assert file.sha256 == sha256(tree[file.path]).hexdigest()
    sidecars = {f"commits/{shard:05d}.json" for shard in range(3)}
    for entry in artifact.manifest.shards:
        assert entry.commit_sha256 == sha256(tree[f"commits/{entry.shard:05d}.json"]).hexdigest()
    named = {file.path for file in (*entries, *artifact.manifest.files)}
    assert set(tree) == named | sidecars | {"manifest.json"}
    assert artifact.manifest.bytes == sum(file.bytes for file in entries)
