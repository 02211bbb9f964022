"""Third-party readers, used as the dataset card says, return the same arrays as this package."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from storage_schemas import ArtifactWriter, Layout, Location, Record, open_artifact
from storage_schemas.card import croissant as croissant_module
from storage_schemas.card import finish as presentation
from storage_schemas.card.finish import finish
from tests.support.artifacts import build_layout, build_shards

Write = Callable[..., list[Record]]


@pytest.fixture
def published(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> Callable[..., tuple[Path, list[Record]]]:
    """A function that writes an artifact with its card, contact sheet and Croissant file."""

    def publish(*form: str, rejected: tuple[int, ...] = (1,), **more: Any) -> tuple[Path, list[Record]]:
        records = write_artifact(tmp_path / "a", make_layout(*form, **more), rejected)
        artifact = open_artifact(tmp_path / "a")
        layout, provenance = artifact.manifest.layout, artifact.manifest.provenance
        finish(ArtifactWriter(Location(tmp_path / "a"), layout, provenance))
        return tmp_path / "a", records

    return publish


def test_xarray_reads_all_arrays(published: Callable[..., tuple[Path, list[Record]]], encoding_name: str) -> None:
    import xarray

    folder, records = published("zarr", encoding_name)
    groups = xarray.open_zarr(folder / "groups.zarr", consolidated=False, chunks=None)
    first = "sum" if encoding_name == "uint8_moments" else "mean"
    assert groups[first].dims == ("group", "channel", "height", "width")
    assert groups["target"].dims == ("group", "embedding")
    assert groups["members"].dims == ("group", "member", "channel", "height", "width")
    groups = groups.isel(group=np.flatnonzero(groups["count"].values))
    assert groups.sizes["group"] == len(records)
    for row, record in enumerate(records):
        assert int(groups["count"][row]) == record.count
        for name, expected in record.arrays.items():
            found = groups[name][row].values
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found, expected)


def test_tensorstore_reads_all_arrays(
    published: Callable[..., tuple[Path, list[Record]]], encoding_name: str
) -> None:
    import tensorstore

    folder, records = published("zarr", encoding_name)

    def read(name: str) -> Any:
        path = str(folder / "groups.zarr" / name)
        return (
            tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": path}})
            .result()
            .read()
            .result()
        )

    rows = np.flatnonzero(read("count"))
    assert len(rows) == len(records)
    for name, expected in records[0].arrays.items():
        found = read(name)[rows]
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, np.stack([record.arrays[name] for record in records]))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_datasets_reads_all_groups(
    published: Callable[..., tuple[Path, list[Record]]], encoding_name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Loaded by `data_files`, and from the folder through the card's configuration."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    folder, records = published("webdataset", encoding_name)
    cache = str(tmp_path / "cache")
    by_files = datasets.load_dataset(
        "webdataset", data_files=str(folder / "shards" / "*.tar"), split="train", cache_dir=cache
    )
    by_folder = datasets.load_dataset(str(folder), split="train", cache_dir=cache)
    for groups in (by_files, by_folder):
        assert groups["__key__"] == [record.key for record in records]
        for row, record in zip(groups, records, strict=True):
            assert row["json"] == {"count": record.count, "label": record.label, "samples": list(record.samples)}
            for name, expected in record.arrays.items():
                np.testing.assert_array_equal(np.asarray(row[f"{name}.npy"], expected.dtype), expected)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("labels", [lambda n: None, lambda n: n if n > 5 else None, lambda n: n if n < 3 else None])
def test_datasets_reads_labels_that_some_groups_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: Callable[[int], int | None]
) -> None:
    """Without the card's types, `datasets` infers them from the first five groups of the first shard."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    layout = build_layout("webdataset").model_copy(update={"groups_per_shard": 6})
    writer = ArtifactWriter(Location(tmp_path / "a"), layout, {})
    writer.begin({})
    for shard, records in enumerate(build_shards(layout)):
        numbered = [replace(record, label=labels(6 * shard + number)) for number, record in enumerate(records)]
        writer.commit(shard, numbered, [])
    finish(writer)
    groups = datasets.load_dataset(str(tmp_path / "a"), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["label"] for row in groups["json"]] == [labels(number) for number in range(7)]


def _validate(path: Path) -> Any:
    import mlcroissant

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = mlcroissant.Dataset(str(path))
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    return dataset


@pytest.mark.parametrize("rejected", [(1,), (2, 5)])
def test_croissant_is_valid_and_lists_every_file(
    published: Callable[..., tuple[Path, list[Record]]], format_name: str, rejected: tuple[int, ...]
) -> None:
    """mlcroissant accepts and reads the document, which lists every file with its hash.

    Without k2 and k5 all groups have labels.
    """
    folder, records = published(format_name, rejected=rejected)
    dataset = _validate(folder / "croissant.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = list(dataset.records("groups"))
    assert [row["groups/key"].decode() for row in rows] == [record.key for record in records]
    assert [row["groups/count"] for row in rows] == [record.count for record in records]
    if rejected == (2, 5):
        assert [row["groups/label"] for row in rows] == [record.label for record in records]
    document = json.loads((folder / "croissant.json").read_bytes())
    files = {entry["contentUrl"]: entry for entry in document["distribution"] if entry["@type"] == "cr:FileObject"}
    for path, entry in files.items():
        data = (folder / path).read_bytes()
        assert entry["sha256"] == sha256(data).hexdigest()
        assert entry["contentSize"] == f"{len(data)} B"
    shards = {str(p.relative_to(folder)) for p in folder.rglob("*") if "/c/" in str(p) or p.suffix == ".tar"}
    assert files.keys() == {path for path in shards if (folder / path).is_file()} | {
        f"commits/0000{shard}.json" for shard in range(3)
    }


def test_croissant_states_shape_and_type_of_every_array(
    published: Callable[..., tuple[Path, list[Record]]], format_name: str, encoding_name: str
) -> None:
    """In the form of version 1.1 of the specification, as mlcroissant understands it."""
    folder, records = published(format_name, encoding_name)
    dataset = _validate(folder / "croissant.json")
    assert dataset.metadata.ctx.is_v1_1()
    (arrays,) = (one for one in dataset.metadata.record_sets if one.id == "arrays")
    found = {field.id: (field.is_array, field.array_shape_tuple, field.data_type) for field in arrays.fields}
    assert found == {
        f"arrays/{name}": (True, array.shape, array.dtype.type) for name, array in records[0].arrays.items()
    }


def test_croissant_of_many_shards_stays_small(
    published: Callable[..., tuple[Path, list[Record]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = published("zarr")
    listed = len((folder / "croissant.json").read_bytes())
    for module in (croissant_module, presentation):
        monkeypatch.setattr(module, "LISTED_FILES", 2)
    layout, provenance = (manifest := open_artifact(folder).manifest).layout, manifest.provenance
    finish(ArtifactWriter(Location(folder), layout, provenance))
    _validate(folder / "croissant.json")
    assert len((folder / "croissant.json").read_bytes()) < 0.6 * listed


def test_an_artifact_without_groups_has_a_card(published: Callable[..., tuple[Path, list[Record]]]) -> None:
    folder, _ = published("zarr", rejected=tuple(range(7)))
    _validate(folder / "croissant.json")
    assert not (folder / "preview.png").exists()


@pytest.mark.parametrize("license", [None, "cc-by-4.0", 'odd: "one" #'])
def test_card_front_matter_and_licence(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    make_shards: Callable[..., list[list[Record]]],
    format_name: str,
    license: str | None,
) -> None:
    layout = make_layout(format_name)
    writer = ArtifactWriter(Location(tmp_path), layout, {} if license is None else {"license": license})
    writer.begin({})
    for shard, records in enumerate(make_shards(layout)):
        writer.commit(shard, records, [])
    finish(writer)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == (license or "other")
    assert front["size_categories"] == ["n<1K"]
    assert json.loads((tmp_path / "croissant.json").read_bytes())["license"] == (license or "other")
    files = [{"split": "train", "path": "shards/*.tar"}]
    configs = {"webdataset": [{"config_name": "default", "data_files": files}], "zarr": None}
    assert front.get("configs") == configs[format_name]
    assert front.get("viewer", True) == (format_name == "webdataset")
    assert "xarray.open_zarr" in card if format_name == "zarr" else "datasets.load_dataset" in card
